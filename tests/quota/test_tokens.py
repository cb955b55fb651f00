"""`Tokens`: a frozen value with three counts."""

import copy
import pickle
from decimal import Decimal

import numpy as np
import pytest

from modelquota.quota.tokens import Tokens


def test_a_value():
    tokens = Tokens(input=6, cached=4, output=5)
    assert tokens == Tokens(6, 4, 5)
    assert tokens != Tokens(6, 4, 6)
    assert tokens != (6, 4, 5)
    assert hash(tokens) == hash(Tokens(6, 4, 5))
    assert repr(tokens) == "Tokens(input=6, cached=4, output=5)"
    assert pickle.loads(pickle.dumps(tokens)) == copy.copy(tokens) == tokens
    assert tokens.total == 15
    assert tokens.replace(output=0) == Tokens(6, 4)
    assert Tokens() == Tokens(0, 0, 0)
    match tokens:
        case Tokens(read, cached, written):
            assert (read, cached, written) == (6, 4, 5)


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        Tokens().input = 5
    with pytest.raises((AttributeError, TypeError)):  # the latter from Python 3.11, by a slip of its dataclasses
        Tokens().more = 5


@pytest.mark.parametrize("field", ["input", "cached", "output"])
@pytest.mark.parametrize("count", [0, 1, 2**62, np.int64(7), np.uint8(7)])
def test_integers_are_accepted_and_kept_as_int(field, count):
    found = getattr(Tokens(**{field: count}), field)
    assert found == count
    assert type(found) is int


@pytest.mark.parametrize("field", ["input", "cached", "output"])
@pytest.mark.parametrize("count", [-1, 2**62 + 1, 10**5000, np.int64(-7)], ids=["-1", "2**62 + 1", "10**5000", "int64"])
def test_counts_out_of_range_are_named(field, count):
    with pytest.raises(ValueError, match=rf"{field}=.* is not accepted; expected an integer from 0 to 2\*\*62"):
        Tokens(**{field: count})


@pytest.mark.parametrize("field", ["input", "cached", "output"])
@pytest.mark.parametrize("count", [True, 1.0, "1", None, Decimal(1), np.float64(1)])
def test_what_is_no_integer_is_named(field, count):
    with pytest.raises(TypeError, match=rf"{field}=.* is not accepted; expected an integer"):
        Tokens(**{field: count})


def test_the_sum_is_bounded_too():
    assert Tokens(2**61, 0, 2**61).total == 2**62
    with pytest.raises(ValueError, match=r"input \+ cached \+ output = 4611686018427387905 is not accepted"):
        Tokens(2**61, 1, 2**61)
