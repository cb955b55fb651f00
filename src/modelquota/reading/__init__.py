"""Reading a manager or a state file: usage, reports, snapshots and utilization."""
