"""Structured fields as RFC 9651 has them, as far as lists of strings with parameters; strict, to see any slip."""

import re

_STRING = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_KEY = re.compile(r"[a-z*][a-z0-9_.*-]*")
_INTEGER = re.compile(r"-?[0-9]{1,15}(?![0-9.])")


def parse_list(text):
    """Return the items by their string, each with its parameters; ValueError where the grammar is not kept."""
    items = {}
    at = 0
    while True:
        name, at = _take(_STRING, text, at, "a string", 1)
        if name in items:
            raise ValueError(f"{name!r} twice")
        items[name] = {}
        while text[at : at + 1] == ";":
            at += 1
            while text[at : at + 1] == " ":
                at += 1
            key, at = _take(_KEY, text, at, "a key", 0)
            if text[at : at + 1] != "=":
                raise ValueError(f"no value for {key}")
            at += 1
            if text[at : at + 1] == '"':
                items[name][key], at = _take(_STRING, text, at, "a string", 1)
            else:
                number, at = _take(_INTEGER, text, at, "an integer", 0)
                items[name][key] = int(number)
        if at == len(text):
            return items
        _, at = _take(re.compile(r"[ \t]*,[ \t]*"), text, at, "a comma", 0)


def _take(pattern, text, at, what, group):
    match = pattern.match(text, at)
    if match is None:
        raise ValueError(f"expected {what} at {at}: {text[at:]!r}")
    return match.group(group), match.end()
