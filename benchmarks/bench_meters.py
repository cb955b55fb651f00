"""What do meters and kinds of tokens add to a check?"""

import pytest

from benchmarks.harness.loops import Loop
from benchmarks.harness.models import GENEROUS
from benchmarks.harness.results import Row, ratio_at_most
from modelquota import Tokens

QUESTION = "meters"
ROUNDS = 400


@pytest.mark.parametrize(("asked", "tokens"), [("100", 100), ("Tokens", Tokens(1_200, 800, 256))], ids=str)
def test_two_meters(bench, manager, asked, tokens):
    """One decision over three rows, beside the same check of a model alone."""
    manager.set_quota("plain", **GENEROUS)
    manager.set_quota("llama#output", **GENEROUS, token_weights=(0, 0, 1))
    manager.set_quota("llama#usd", **GENEROUS, token_weights=(3, 0.3, 15), unit="usd")
    metered = Loop('manager.check_quota("llama", tokens)', manager=manager, tokens=tokens)
    single = Loop('manager.check_quota("plain", tokens)', manager=manager, tokens=tokens)
    series = bench.interleave(ROUNDS, metered.round_ns, single=single.round_ns, empty=metered.empty_round_ns)
    least = {name: min(values) for name, values in series.items()}
    bench.add(
        Row(
            QUESTION,
            f"a model and two meters, {asked}",
            least["ours"] - least["empty"],
            "ns",
            "without meters",
            least["single"] - least["empty"],
            (ratio_at_most(2.2),),
        )
    )
