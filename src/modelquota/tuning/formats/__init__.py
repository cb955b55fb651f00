"""The formats of traces: one file for each, over the interface in `base`.

To add one, write its file and name it in `FORMATS`; the order does not matter, since a trace that fits two is refused.
"""

from modelquota.tuning.formats.aiperf import AIPERF
from modelquota.tuning.formats.azure import AZURE
from modelquota.tuning.formats.bailian import BAILIAN
from modelquota.tuning.formats.base import ROLES, Format, Kind
from modelquota.tuning.formats.burstgpt import BURSTGPT
from modelquota.tuning.formats.ledger import LEDGER
from modelquota.tuning.formats.mooncake import MOONCAKE

__all__ = ["FORMATS", "ROLES", "Format", "Kind"]

FORMATS: dict[str, Format] = {known.name: known for known in (AZURE, BURSTGPT, MOONCAKE, BAILIAN, AIPERF, LEDGER)}
"""Every format by the name that ``--format`` takes."""
