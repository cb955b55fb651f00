"""Quotas on the client's side: transports for httpx that keep a program within the limits of the APIs that it calls.

They work with every client that takes an ``http_client`` of httpx or httpx2, such as those of openai and anthropic.
"""

from modelquota.client.transport import AsyncQuotaTransport, QuotaTransport

__all__ = ["AsyncQuotaTransport", "QuotaTransport"]
