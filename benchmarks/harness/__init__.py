"""What the benchmarks share: loops, models, processes, and how results are kept and printed."""
