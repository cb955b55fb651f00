"""A store for tests: the shipped script in a Lua interpreter, over a dict of hashes and sorted sets."""

import functools
import hashlib
import time
import zlib
from importlib.resources import files

import lupa.lua51

from modelquota.cluster.store import parse_reply

SCRIPT = files("modelquota.cluster").joinpath("exchange.lua").read_text(encoding="utf-8")

# As much of JSON as the script uses: arrays of integers. The numbers of those that it has written are kept, since
# taking a text apart takes long here.
JSON = """
local kept, count, format = {}, 0, string.format
local string = setmetatable({format = function(pattern, ...)
  local text = format(pattern, ...)
  if string.sub(pattern, 1, 1) == '[' then
    count = count + 1
    if count % 1000 == 0 then
      kept = {}
    end
    kept[text] = {...}
  end
  return text
end}, {__index = string})
local cjson = {decode = function(text)
  if not kept[text] then
    return loadstring('return {' .. string.sub(text, 2, -2) .. '}')()
  end
  return {unpack(kept[text])}
end}
"""

LUA = lupa.lua51.LuaRuntime(encoding="latin-1", unpack_returned_tuples=True)


def sha1hex(text):
    return hashlib.sha1(text.encode("latin-1")).hexdigest()


@functools.cache
def compiled(script):
    """The script as a function of `redis.call`, KEYS and ARGV."""
    wrapped = LUA.execute(f"""
{JSON}
return function(sha1hex)
  return function(call, KEYS, ARGV)
    local redis = {{call = call, sha1hex = sha1hex}}
    {script}
  end
end
""")
    return wrapped(sha1hex)


class LuaServer:
    """As much of a server as the script calls. `time_ns` is its wall clock, which the test sets.

    Strings are bytes in Lua, and in Python text with one character for each of them.
    """

    def __init__(self, script=SCRIPT, run_id="a" * 40, data=None):
        self.script = compiled(script)
        self.data = {} if data is None else data
        self.run_id = run_id
        self.time_ns = 0

    def evaluate(self, keys, arguments):
        as_bytes = [[text.encode().decode("latin-1") for text in texts] for texts in (keys, arguments)]
        return self.script(self.call, *map(LUA.table_from, as_bytes))

    def snapshot(self):
        return {key: dict(fields) for key, fields in self.data.items()}

    def call(self, command, *arguments):
        result = getattr(self, command.lower())(*arguments)
        return LUA.table_from(result) if isinstance(result, list) else result

    # -- commands

    def time(self):
        return [str(self.time_ns // 10**9), str(self.time_ns // 1000 % 10**6)]

    def info(self, section):
        return f"# Server\r\nredis_version:6.2.0\r\nrun_id:{self.run_id}\r\n"

    def hget(self, key, field):
        return self.data.get(key, {}).get(field, False)

    def hmget(self, key, *fields):
        stored = self.data.get(key, {})
        return [stored.get(field, False) for field in fields]

    def hgetall(self, key):
        return [text for pair in self.data.get(key, {}).items() for text in pair]

    def hscan(self, key, cursor, match, pattern, count, most):
        """In the order of a hash, so that a cursor stays valid while fields come and go."""
        assert (match, pattern, count) == ("MATCH", "m:*", "COUNT")
        ordered = sorted((zlib.crc32(field.encode()), field) for field in self.data.get(key, {}))
        found = []
        for place, field in ordered:
            if len(found) >= 2 * int(most):
                return [str(place), LUA.table_from(found)]
            if place >= int(cursor) and field.startswith("m:"):
                found += [field, self.data[key][field]]
        return ["0", LUA.table_from(found)]

    def hset(self, key, *pairs):
        self.data.setdefault(key, {}).update(zip(pairs[::2], pairs[1::2], strict=True))

    def hdel(self, key, *fields):
        stored = self.data.get(key, {})
        for field in fields:
            stored.pop(field, None)
        if not stored:
            self.data.pop(key, None)

    def zadd(self, key, *pairs):
        self.data.setdefault(key, {}).update(
            (member, float(score)) for score, member in zip(pairs[::2], pairs[1::2], strict=True)
        )

    zrem = hdel

    def zscore(self, key, member):
        score = self.data.get(key, {}).get(member)
        return False if score is None else format(score, ".17g")

    def zcard(self, key):
        return len(self.data.get(key, {}))

    def zcount(self, key, low, high):
        return sum(float(low) <= score for score in self.data.get(key, {}).values())

    def zrange(self, key, first, last):
        assert (first, last) == (0, -1)
        return sorted(self.data.get(key, {}), key=lambda member: (self.data[key][member], member))

    def zrangebyscore(self, key, low, high, limit, offset, count):
        assert (low, high[0], limit, offset) == ("-inf", "(", "LIMIT", 0)
        due = sorted((score, member) for member, score in self.data.get(key, {}).items() if score < float(high[1:]))
        return [member for _, member in due[: int(count)]]

    def __getattr__(self, name):
        if name == "del":
            return lambda key: self.data.pop(key, None)
        raise AttributeError(name)


class LuaStore:
    """A `Store` over a LuaServer, without a network."""

    def __init__(self, server, base="mq:{test:0}:"):
        self.server = server
        self.base = base

    def exchange(self, request):
        return parse_reply(self.server.evaluate(request.keys(self.base), request.arguments()))


class LocalStore(LuaStore):
    """What a manager takes for a `RedisStore`: on the machine's clock, and down while `error` is set."""

    namespace, lease_sec, renew_sec, on_store_down, wait_replicas = "test", 2.0, 0.1, "lease_only", 0

    def __init__(self):
        super().__init__(LuaServer())
        self.error = None

    def exchange(self, request):
        if self.error is not None:
            raise self.error
        self.server.time_ns = time.time_ns()
        return super().exchange(request)

    def close(self):
        pass
