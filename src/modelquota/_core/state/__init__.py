"""The shared memory: bytes, locks, and the life and death of processes."""
