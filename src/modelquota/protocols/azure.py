"""Azure OpenAI: OpenAI's API with the deployment, which is the model, in the path."""

from __future__ import annotations

from modelquota.protocols.openai import OpenAI
from modelquota.protocols.protocol import Operation


class Azure(OpenAI):
    """Azure OpenAI. Its newer paths below ``/openai/v1`` name the model in the body."""

    name = "azure"

    def operations(self) -> dict[str, Operation]:
        """See `Protocol`."""
        found = self.below_version()
        roots = ("/openai/deployments/{model}", "/openai/v1", "/openai")
        return {f"{root}{path}": operation for root in roots for path, operation in found.items()}
