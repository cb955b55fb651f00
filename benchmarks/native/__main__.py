"""``python -m benchmarks.native`` measures the native original and prints its figures as JSON."""

import json
import sys

from benchmarks.native import NativeUnavailableError, measure

try:
    print(json.dumps(measure(), indent=2))
except NativeUnavailableError as error:
    sys.exit(str(error))
