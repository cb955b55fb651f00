"""The Mooncake traces: milliseconds, and an id for each 512 tokens of the prompt, equal if the prefix is."""

from modelquota.tuning.formats.base import Format

MOONCAKE = Format(
    name="mooncake",
    title="Mooncake JSONL",
    container="JSONL",
    columns={"time": "timestamp", "prompt": "input_length", "output": "output_length", "blocks": "hash_ids"},
    required=("time", "prompt", "output"),
    time_unit="ms",
    block_tokens=512,
)
