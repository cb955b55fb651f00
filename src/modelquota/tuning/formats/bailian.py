"""The Bailian (Qwen) traces: Mooncake's form with seconds, chats and turns, and an id for each 16 tokens."""

from modelquota.tuning.formats.base import Format

BAILIAN = Format(
    name="bailian",
    title="Bailian JSONL",
    container="JSONL",
    columns={"time": "timestamp", "prompt": "input_length", "output": "output_length", "blocks": "hash_ids"},
    required=("time", "prompt", "output"),
    marks=("chat_id", "parent_chat_id", "turn"),
    time_unit="s",
    block_tokens=16,
)
"""A chat id is of one turn, not of a user."""
