"""``python -m benchmarks`` measures everything in one run and draws the pictures."""

import sys

from benchmarks.drawing.report import main

sys.exit(main())
