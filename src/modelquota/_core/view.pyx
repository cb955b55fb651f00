"""Reading copies of rows: what they say of a moment, without a lock and without a trace."""
import numpy as np
cimport numpy as cnp
from libc.stdint cimport int64_t

from modelquota._core.layout cimport Ledger, Limits, Row
from modelquota._core.packing cimport unpack
from modelquota._core.usage cimport Usage, read_limits, read_usage

from modelquota._core.packing import dtypes

cnp.import_array()


def read_copies(cnp.ndarray rows, cnp.ndarray ledgers, int64_t now_ns):
    """Use and limits that copies of rows and their ledgers state at `now_ns`; time passes in the copies.

    Returns
    -------
    usage : structured array of the dtype ``dtypes()["usage"]``
    limits : list of dict
        Keywords of `ResourceQuotaConfig`.
    """
    cdef Py_ssize_t i, count = rows.shape[0]
    cdef Limits limits
    cdef Row* row
    cdef Ledger* ledger
    cdef Usage* records
    cdef list found = []
    for array, size in ((rows, sizeof(Row)), (ledgers, sizeof(Ledger))):
        if not (array.flags.c_contiguous and array.flags.writeable and array.ndim == 1 and array.itemsize == size
                and array.shape[0] == count):
            raise ValueError("rows and ledgers are to be private copies of one part of the state")
    usage = np.zeros(count, dtypes()["usage"])
    row = <Row*> cnp.PyArray_DATA(rows)
    ledger = <Ledger*> cnp.PyArray_DATA(ledgers)
    records = <Usage*> cnp.PyArray_DATA(usage)
    for i in range(count):
        read_usage(&row[i], &ledger[i], now_ns, &records[i])
        read_limits(&ledger[i], &limits)
        found.append(unpack(&limits))
    return usage, found
