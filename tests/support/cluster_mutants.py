"""Five ways to be wrong, which the simulation has to find: each is a script or a node with one promise left out."""

from lua_store import SCRIPT

from modelquota.cluster.book import Book
from modelquota.cluster.node import Node
from modelquota.cluster.quantities import KEEP, QUANTITIES


def replaced(*changes):
    script = SCRIPT
    for old, new in changes:
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


class GreedyBook(Book):
    __slots__ = ()

    def returned(self, wants, now_ns):
        shares = [KEEP] * QUANTITIES
        for quantity, (held, used) in enumerate(zip(self.held, self.used, strict=True)):
            if held and 2 * used > held:
                shares[quantity] = held - used // 2
        return tuple(shares)


class ShrinksBelowUse(Node):
    """It returns what it has used, too."""

    def _read(self, codes, asked, now_ns, below_used=False):
        super()._read(codes, asked, now_ns, below_used)
        for book in self._books.values():
            book.__class__ = GreedyBook

    def _shrink(self, codes, shares, below_used=False):
        super()._shrink(codes, shares, below_used)
        for code, lower in zip(codes, shares, strict=True):
            book = self._books.get(code)
            if book is not None:
                lower = tuple(have if share == KEEP else share for have, share in zip(book.held, lower, strict=True))
                book.claim = tuple(map(min, book.claimed, lower))
                book.used = tuple(map(min, book.used, book.claim))


class AdoptsStaleReplies(Node):
    """It takes every reply for that of the request that is under way."""

    def awaits(self, request):
        return self.busy

    def adopt(self, request, reply):
        grew = super().adopt(request, reply)
        if not self.busy and not grew and request.models and reply.models:
            self._adopt_shares(list(self._books)[: len(reply.models)], reply)
        return grew


MUTANTS = {
    "ghost kept only until the end of the lease": {
        "script": replaced(("text(ended + hold), 'd:'", "text(ended), 'd:'"))
    },
    "no learning": {"script": replaced(("local learning = now < learning_until", "local learning = false"))},
    "no nonce": {
        "script": replaced(
            ("  if number == last and token ~= node[2] then\n", "  if false then\n"),
            ("  if number == last then\n", "  if number == last and token == node[2] then\n"),
            ("  if tonumber(node[4]) == generation and node[3] ~= nonce then\n", "  if false then\n"),
        )
    },
    "shrinking below use": {"node_class": ShrinksBelowUse},
    "adopting a stale reply": {"node_class": AdoptsStaleReplies},
}
