"""What a request says about its size, and the error that answers a request that says it wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from modelquota.errors import QuotaError
from modelquota.quota.config import MAX_COUNT, MAX_MODEL_ID_BYTES
from modelquota.quota.tokens import Tokens

OUTPUT_FIELDS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""Fields of OpenAI's and Anthropic's APIs that bound an output."""

_MOST_DIGITS: Final = 32


class RequestRefusedError(QuotaError):
    """The request is answered with an HTTP error instead of being checked. No quota is touched.

    Raise it in a callable given to `QuotaMiddleware`, for a body that is not accepted or a key that is not known.

    Parameters
    ----------
    status : int
        HTTP status, 400 .. 599.
    message : str
        What is wrong, to show to the client.
    code : str, optional
        A short identifier, for programs.
    param : str, optional
        The field of the body that is wrong.

    Examples
    --------
    >>> print(RequestRefusedError(401, "this key is not known", code="invalid_api_key"))
    401: this key is not known
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(status, message, code, param)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"


class Reading(NamedTuple):
    """What the body and the path of a request say.

    Attributes
    ----------
    model : str or None
        The model; None if the request names none.
    prompt_tokens : int
        The prompt, estimated.
    outputs : int
        How many outputs are generated; 0 for requests that generate none, such as embeddings.
    output_bound : int or None
        The most tokens of one output; None if the request sets no bound.
    stream : bool
        Whether the answer is to be a stream.
    priority : int
        Higher is served first.
    """

    model: str | None
    prompt_tokens: int
    outputs: int = 1
    output_bound: int | None = None
    stream: bool = False
    priority: int = 0

    @property
    def is_guess(self) -> bool:
        """Whether the length of the output has to be guessed, since the request does not bound it."""
        return self.output_bound is None and self.outputs > 0

    def estimate(self, default_output_tokens: int, most: int | None = None) -> int:
        """Return the tokens of prompt and outputs; a guessed output is cut so that the sum stays within `most`.

        Examples
        --------
        >>> Reading("m", 10, 2, 100).estimate(256), Reading("m", 10).estimate(256), Reading("m", 10).estimate(256, 50)
        (210, 266, 50)
        """
        prompt = self.prompt_tokens
        if self.output_bound is not None or not self.outputs:
            return min(prompt + self.outputs * (self.output_bound or 0), MAX_COUNT)
        guess = self.outputs * default_output_tokens
        if most is not None and prompt + guess > most:
            guess = max(most - prompt, 0)
        return min(prompt + guess, MAX_COUNT)


def whole_number(body: Mapping[str, Any], field: str, *, least: int = 0) -> int | None:
    """Return a field that is a whole number from `least` to 2**62; None if it is missing or null.

    100.0 and "100" are 100, as for servers made with pydantic. RequestRefusedError (400) for anything else: there is no
    telling how the server would read it.

    Examples
    --------
    >>> [whole_number({"n": n}, "n") for n in (100, 100.0, "100", None)]
    [100, 100, 100, None]
    """
    value = body.get(field)
    if value is None:
        return None
    number = _whole(value)
    if number is None or not least <= number <= MAX_COUNT:
        raise RequestRefusedError(400, f"{field} is not an integer from {least} to 2**62", "invalid_value", field)
    return number


def output_bound(body: Mapping[str, Any], *fields: str, unbounded: tuple[int, ...] = (-1,)) -> int | None:
    """Return the largest of the fields that bound an output; None if none is set. -1 is "no bound", as null is.

    Examples
    --------
    >>> output_bound({"max_tokens": 5, "max_completion_tokens": 7}, "max_tokens", "max_completion_tokens")
    7
    """
    most = None
    for field in fields:
        value = body.get(field)
        if value is None:
            continue
        if type(value) is not int or value < 0:
            if _whole(value) in unbounded:
                continue
            value = whole_number(body, field)
        elif value > MAX_COUNT:
            value = whole_number(body, field)
        if most is None or (value is not None and value > most):
            most = value
    return most


def model_name(body: Mapping[str, Any], field: str = "model") -> str | None:
    """Return the field that names the model; None if it is missing or null.

    RequestRefusedError (400) if no quota can have it as an id.
    """
    value = body.get(field)
    if value is None:
        return None
    if isinstance(value, str) and is_model_id(value):
        return value
    raise RequestRefusedError(
        400, f"{field} is not a string of 1 to {MAX_MODEL_ID_BYTES} bytes without NUL", "invalid_value", field
    )


def estimate_of(prompt_tokens: int, tokens: int) -> Tokens:
    """Return the estimate of a request of so many tokens by kind: the prompt is input, and the rest is output.

    Examples
    --------
    >>> estimate_of(100, 356)
    Tokens(input=100, cached=0, output=256)
    """
    prompt = min(prompt_tokens, tokens)
    return Tokens(prompt, 0, tokens - prompt)


def is_model_id(value: str) -> bool:
    """Whether a quota can have this id."""
    if not 0 < len(value) <= MAX_MODEL_ID_BYTES or "\0" in value:
        return False
    if value.isascii():
        return True
    try:
        return len(value.encode()) <= MAX_MODEL_ID_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _whole(value: Any) -> int | None:
    if type(value) is int:
        return value
    if isinstance(value, str) and len(value) <= _MOST_DIGITS:
        try:
            return int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None
