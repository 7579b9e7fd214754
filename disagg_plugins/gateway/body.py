"""A request's body, of which only what somebody asks for is ever decoded (sans-IO).

Bodies come from anyone, so reading one must not stop the event loop, and what the gateway does not
understand must arrive as it was sent. The top level is split into raw values, which costs a
nanosecond a byte; a value is decoded when it is asked for; the rest is passed on byte for byte.
"""

from __future__ import annotations

from typing import Any

import msgspec

from disagg_plugins.gateway.refusals import RequestError

MAX_DEPTH = 128
"""Objects and arrays inside each other; tool schemas, the deepest in use, stay below 30. Far below
what parsers and encoders here and in the workers can follow."""

MAX_FIELDS = 1024
"""Fields of the body itself; OpenAI's API and the engines' own have about 100."""

MAX_STRUCTURE = 131_072
"""Brackets and colons in a body that is still read, text included: decoding so many objects takes
20 ms. A body with more goes to its worker unread."""

MAX_UNREAD_BYTES = 65_536
"""The largest value that is decoded in a body with more than ``MAX_STRUCTURE``."""

_BRACKETS_AND_QUOTES = b'[]{}"'
_OTHERS = bytes(set(range(256)) - set(_BRACKETS_AND_QUOTES))

_split = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_get = dict.get
_check = msgspec.json.Decoder(msgspec.Raw).decode
_decode = msgspec.json.Decoder().decode


class Body(dict[str, object]):
    """A JSON object: ``get`` and ``[]`` give plain values, ``items`` and copies the raw ones.

    Raw values may be encoded again, and come out as they came in.

    Attributes:
        crowded: It holds so much structure that its large values are not decoded.
    """

    __slots__ = ("_plain", "crowded")

    def __init__(self, raws: dict[str, msgspec.Raw], *, crowded: bool) -> None:
        super().__init__(raws)
        self.crowded = crowded
        self._plain: dict[str, object] = {}

    def raw_bytes(self, key: str) -> int:
        """Return the length of a value as it was sent, in bytes; 0 when there is none."""
        value = _get(self, key)
        return memoryview(value).nbytes if isinstance(value, msgspec.Raw) else 0

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, decoded.

        Raises:
            RequestError: 400; it cannot be decoded.
        """
        value = _get(self, key, default)
        return self._read(key, value) if isinstance(value, msgspec.Raw) else value

    def __getitem__(self, key: str) -> Any:
        value = dict.__getitem__(self, key)
        return self._read(key, value) if isinstance(value, msgspec.Raw) else value

    def _read(self, key: str, value: msgspec.Raw) -> Any:
        plain = self._plain
        if key in plain:
            return plain[key]
        if self.crowded and self.raw_bytes(key) > MAX_UNREAD_BYTES:
            raise RequestError(400, f"{key} is too large to read", code="too_large", param=key)
        try:
            plain[key] = _decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise _invalid(str(exc)) from exc
        return plain[key]


def read_body(raw: bytes) -> Body:
    """Split a request's body into its fields.

    Raises:
        RequestError: 400; it is not a JSON object, or larger than anybody needs.
    """
    crowded = len(raw) > MAX_STRUCTURE and sum(map(raw.count, b"[{:")) > MAX_STRUCTURE
    try:
        if not raw.isascii():
            raw.decode("utf-8")  # what is not decoded is not checked otherwise
        if raw.lstrip()[:1] != b"{":
            _check(raw)
            raise RequestError(400, "the body must be a JSON object", code="invalid_json")
        raws = _split_counting(raw) if crowded else _split(raw)
    except msgspec.ValidationError as exc:
        raise _too_many_fields() from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise _invalid(str(exc)) from exc
    if len(raws) > MAX_FIELDS:
        raise _too_many_fields()
    if not crowded and _has_many(raw, b"[", b"{") and _too_deep(raw):
        raise _invalid(f"it nests objects and arrays more than {MAX_DEPTH} deep")
    return Body(raws, crowded=crowded)


def _invalid(why: str) -> RequestError:
    return RequestError(400, f"the body is not valid JSON: {why}", code="invalid_json")


class _Key(str):
    """A field's name, counted."""

    __slots__ = ()


def _too_many_fields() -> RequestError:
    message = f"the body has more than {MAX_FIELDS} fields"
    return RequestError(400, message, code="invalid_json")


def _split_counting(raw: bytes) -> dict[str, msgspec.Raw]:
    left = MAX_FIELDS

    def count(kind: type[_Key], name: str) -> _Key:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many fields")
        return kind(name)

    split = msgspec.json.Decoder(dict[_Key, msgspec.Raw], dec_hook=count).decode
    return {str(name): value for name, value in split(raw).items()}


def _has_many(raw: bytes, *marks: bytes) -> bool:
    """Return whether the marks occur more than ``MAX_DEPTH`` times; faster than counting them."""
    left = MAX_DEPTH
    for mark in marks:
        at = raw.find(mark)
        while at >= 0:
            left -= 1
            if left < 0:
                return True
            at = raw.find(mark, at + 1)
    return False


def _too_deep(raw: bytes) -> bool:
    """Return whether valid JSON nests deeper than about ``MAX_DEPTH``.

    A few passes of bytes methods; a loop over the characters would take a hundred times as long.
    Each round takes away the innermost pairs of brackets, or more.
    """
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(unescaped.translate(None, _OTHERS).split(b'"')[::2])
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if not brackets:
            return False
    return True
