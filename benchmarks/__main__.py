"""``python -m benchmarks`` measures everything in one run and draws the pictures."""

import sys

from benchmarks.report import main

sys.exit(main())
