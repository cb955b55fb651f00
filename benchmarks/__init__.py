"""How fast modelquota is, each figure beside the least that it could be and beside what else one could take.

Everything here needs ``pip install -e '.[bench]'``; what is missing is left out and named.

``pytest benchmarks``
    Measures and prints one table. Each file ``bench_*.py`` asks one question; ``pytest benchmarks -k batch`` asks only
    that. ``--benchmark-json=FILE`` saves the figures, with versions, CPU and build flags.
``python -m benchmarks``
    The same, saved, and drawn: ``benchmarks/drawing/pictures/comparison.svg`` and ``growth.svg``.
``python -m benchmarks.compare BASELINE.json NEW.json [NEW.json ...]``
    Fails where a ratio to a floor is worse in the new run, by more than 15 %. Save a run before a change and one after;
    on a busy machine two or three after, of which the best counts.

How figures come about
----------------------
- A statement stands fifty times in its loop, and the empty loop is subtracted.
- A *floor* is an extension method of the same signature that does all but decide (``floor.pyx``). Figure and floor are
  measured in turn, a millisecond each, hundreds of times, and the least of either counts: what disturbs the machine
  for a while disturbs both, and some rounds pass undisturbed.
- So compare ratios. Nanoseconds differ by tens of percent between runs on a shared machine, and by factors between
  machines.
- pytest-benchmark runs the rounds and writes the JSON; seconds in its ``stats`` are those of a whole round. Nanoseconds
  per operation, floor, ratio and targets are under ``extra_info``.
"""
