"""A coroutine's first step without a task: most of them have nothing to wait for.

In C since there its end is a value, and no exception.
"""
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF

from modelquota.asgi.rest import rest_of, steps_of

cdef extern from "Python.h":
    enum:
        PYGEN_RETURN
    int PyCoro_CheckExact(object value)
    int PyIter_Send(object steps, object value, PyObject** result) except -1


def first_step(awaitable):
    """Run it to where it waits: ``(result, None)`` if it does not, otherwise ``(None, rest)``, to be awaited.

    The rest may be awaited in another task, unless the coroutine looks at the task that runs it.
    """
    cdef PyObject* sent = NULL
    cdef object steps = awaitable if PyCoro_CheckExact(awaitable) else steps_of(awaitable)
    cdef int outcome = PyIter_Send(steps, None, &sent)
    result = <object> sent
    Py_DECREF(result)       # what it returns is the caller's
    return (result, None) if outcome == PYGEN_RETURN else (None, rest_of(steps, result))
