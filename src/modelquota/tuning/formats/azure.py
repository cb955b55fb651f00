"""The Azure LLM inference traces of 2023 and 2024, and of 2025 with images."""

from modelquota.tuning.formats.base import Format

AZURE = Format(
    name="azure",
    title="Azure CSV",
    container="CSV",
    columns={
        "time": "TIMESTAMP",
        "prompt": "ContextTokens",
        "output": "GeneratedTokens",
        "model": "Model",
        "user": "User",
        "duration": "DurationSeconds",
        "estimated": "EstimatedTokens",
        "priority": "Priority",
    },
    required=("time", "prompt", "output"),
)
"""The optional columns are not Azure's: they are for traces that are written by hand in this form."""
