"""The core: how a request is decided, in Cython.

Three floors on one layout. A floor imports those below it and knows nothing above it.

- ``layout.pxd``: the structs of the shared memory, with the meaning, unit and writer of each field. Beside it
  ``atomics.pxd``: atomic loads, stores, additions and swaps, and the compiler barrier.
- ``row/``: arithmetic on rows whose locks are held: windows, levels, the decision, what a grant holds, the queue of a
  model. No clock, no lock, no Python object; time is a parameter.
- ``state/``: the shared memory: its mapping and file, locks, seats of processes, the registry of models, records of
  grants and of waiting requests, and what is repaired or given back after a process has died.
- ``table/``: extension classes. `QuotaTable` has the public verbs and is composed of `State`, `Pools` (this process's
  records), `Interned` (id to row), `Admission` (one decision over one or several models) and `Queues` (this process's
  waiting requests). `ResourceQuotaManager` inherits it, so that nothing runs before a check.

Rules

1. From lock to unlock: ``noexcept nogil``. Nothing takes the GIL, allocates, raises or touches a Python object.
2. Locks in order: the registry's before a row's; rows by their number. No lock is held while another one is waited for,
   but for the registry's, and then not for longer than a millisecond.
3. Every wait for a lock has an end. Callers return to Python in between, for signals and timeouts.
4. A check keeps the GIL. It is released to wait for a lock, and for a whole batch.
5. One call goes up: `Watcher.wake`, to the requests that wait. What the facade wants to know is an object of its own.
6. Process-local fields are guarded by the GIL, rows and their records by the row's lock, generations and names also by
   the registry's.
"""
