"""Many hosts, one limit: each host decides alone, within shares of the limits that a store keeps within the whole."""

from modelquota.cluster.redis import RedisStore

__all__ = ["RedisStore"]
