"""``python -m benchmarks.peers [--json FILE]`` checks the adapters, measures all peers and prints the table."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.peers import render, table

parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
options = parser.parse_args()

rows = table(progress=lambda name: print(f"measuring {name} ...", file=sys.stderr, flush=True))
print(render(rows))
if options.json:
    options.json.write_text(json.dumps([row.to_dict() for row in rows], indent=2) + "\n")
