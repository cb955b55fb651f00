"""What a user could pick instead of modelquota, each doing the same work.

``python -m benchmarks.peers`` prints the comparison; `table` returns it as rows and `bars` as input of
``benchmarks.drawing.plot``. The libraries come with the extra ``bench``; one that is missing leaves a row that says so.

What is compared, and where it is not quite like with like:

- State is in memory, calls are synchronous. aiolimiter has no synchronous calls and is timed inside its event loop;
  it takes no lock, for it serves one thread.
- Six limits are requests and tokens per second, hour and day. No library charges all six or none in one call:
  limits and throttled-py are called six times and pyrate-limiter twice, so a refusal leaves charged what was asked
  before it. Making that right would cost them more; not doing so is in their favour.
- Libraries that log every admitted token (limits' moving window, pyrate-limiter's default) slow down as the log
  grows, and pyrate-limiter looks into its log only once it holds as many entries as the lowest limit. They are timed
  on short logs and far below their limits, which is in their favour.
- The garbage collector rests while anything is timed, and the figure is the least of five rounds.
- "1,000 keys" and the bytes per key are under one limit, not six.
"""

from benchmarks.peers.comparison import Row, bars, render, table
from benchmarks.peers.protocol import Peer, Rule, VirtualClock
from benchmarks.peers.true_window import most_admitted

__all__ = ["Peer", "Row", "Rule", "VirtualClock", "bars", "most_admitted", "render", "table"]
