"""`python -m modelquota` is the command `modelquota`."""

from modelquota.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
