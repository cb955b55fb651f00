"""Threads that start at once."""

import threading

THREADS = 8


def run_together(work, count=THREADS):
    """Run work(i) in `count` threads that start at once; return what they returned."""
    barrier = threading.Barrier(count)
    results, errors = [None] * count, []

    def body(i):
        barrier.wait()
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results
