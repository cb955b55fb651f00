"""Requests in the format of OpenAI's API: which model they name and how many tokens they may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from modelquota.asgi.request import Demand, IncomingRequest, model_name, whole_number
from modelquota.quota.config import MAX_COUNT

BYTES_PER_TOKEN: Final = 4
"""Bytes of text that count as one token: the usual rule for English."""

MEDIA_TOKENS: Final = 1000
"""Tokens that an image, a piece of audio or a file counts as, regardless of its size."""

_OUTPUT_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_TEXT_FIELDS = ("messages", "prompt", "input", "instructions", "tools", "functions")
_MEDIA_FIELDS = frozenset(("image_url", "input_audio", "file", "file_data", "image"))


def estimate_prompt(body: Mapping[str, Any]) -> int:
    """Estimate the tokens in the prompt of an OpenAI-style request, cheaply and without a tokenizer.

    Text counts one token for four bytes, a prompt of token ids counts one each, and an image, audio or file 1,000.

    Examples
    --------
    >>> estimate_prompt({"messages": [{"role": "user", "content": "What is the tallest mountain?"}]})
    9
    >>> estimate_prompt({"prompt": [15339, 11, 1917]})
    3
    """
    text_bytes = tokens = 0
    # An explicit stack instead of recursion: a body may be nested as deeply as its parser allows.
    stack = [body[field] for field in _TEXT_FIELDS if field in body]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            text_bytes += len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict):
            for field, part in value.items():
                if field in _MEDIA_FIELDS:
                    tokens += MEDIA_TOKENS
                else:
                    stack.append(part)
        elif isinstance(value, list):
            if value and type(value[0]) is int:  # token ids, of which there may be millions
                tokens += len(value)
            else:
                stack.extend(value)
        elif value is not None:
            tokens += 1
    return tokens + -(-text_bytes // BYTES_PER_TOKEN)


def openai_routes(
    *, prompt_tokens: Callable[[Mapping[str, Any]], int] = estimate_prompt, default_output_tokens: int = 256
) -> dict[str, Callable[[IncomingRequest], Demand]]:
    """Return the paths of OpenAI's API, each with the callable that reads a request: the default of `QuotaMiddleware`.

    The estimate is the prompt, and for every output (``n``, ``best_of``, each prompt of a list) the largest of
    ``max_tokens``, ``max_completion_tokens`` and ``max_output_tokens``. Embeddings have no output.

    Parameters
    ----------
    prompt_tokens : callable
        Given the parsed body, returns how many tokens its prompt has.
    default_output_tokens : int
        Tokens of an output if the request sets no bound.

    Examples
    --------
    >>> sorted(openai_routes())
    ['/v1/chat/completions', '/v1/completions', '/v1/embeddings', '/v1/responses']
    """

    def generation(request: IncomingRequest) -> Demand:
        body = request.json()
        model_id = model_name(body)
        bounds = [bound for field in _OUTPUT_FIELDS if (bound := whole_number(body, field)) is not None]
        outputs = max(whole_number(body, "n", least=1) or 1, whole_number(body, "best_of", least=1) or 1)
        prompts = body.get("prompt")
        if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
            outputs *= len(prompts)
        prompt = prompt_tokens(body)
        tokens = prompt + outputs * (max(bounds) if bounds else default_output_tokens)
        return Demand(model_id, min(tokens, MAX_COUNT), min(prompt, MAX_COUNT))

    def embedding(request: IncomingRequest) -> Demand:
        body = request.json()
        model_id = model_name(body)
        prompt = min(prompt_tokens(body), MAX_COUNT)
        return Demand(model_id, prompt, prompt)

    return {
        "/v1/chat/completions": generation,
        "/v1/completions": generation,
        "/v1/embeddings": embedding,
        "/v1/responses": generation,
    }
