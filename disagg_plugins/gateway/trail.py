"""What a stream has said so far in token ids, so that another worker can go on from it (sans-IO).

Every resumable stream is asked for token ids. They are taken out of its events again on the way to
the client, on the bytes: ``null`` stands there, as in a stream that was not asked for them.

An engine holds text back while a character is incomplete. So a stream goes on not from the last id
but from the last one after which nothing was held: an event of one id that carries text. Ids after
it whose events carried no text are computed again. Where several ids shared an event, nobody knows
which of them held text back: the text since is kept, and skipped in what the next worker says.
"""

from __future__ import annotations

import re
from array import array

import msgspec

MAX_TOKENS = 262_144
"""Ids kept of one answer, 8 bytes each; twice the longest context in common use."""

MAX_UNSURE_EVENTS = 64
"""Events kept since the last sure place; a busy engine bundles a few in a row, not so many."""

MAX_PROMPT_TOKENS = 50_000
"""Estimate of the longest prompt whose ids are asked for: its first event must stay below
``sse.MAX_HELD_BYTES`` at 7 bytes an id, even where the estimate is half of the truth."""

TOO_LONG = "an event that is too long to be looked at"

MAX_ID_DIGITS = 10
"""Digits of an id; engines keep them in 32 bits, and no vocabulary comes near that."""

UNREADABLE = "token ids that cannot be read"

IDS = b'"token_ids":['
_PROMPT_IDS = re.compile(rb'"prompt_token_ids":\[([^\]]*)\]')
_LIST = re.compile(rb" *(?:[0-9]{1,10} *(?:, *[0-9]{1,10} *)*)?")

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.encode


class Trail:
    """The ids of one answer.

    Attributes:
        ids: The ids of the answer.
        sure: How many of them an answer can go on from.
        why_not: Why it cannot go on, or None.
        noted: How many of them were noted one event at a time. Those after them were appended from
            outside, each from an event of its own that carries text.
        head: ``id``, ``created`` and ``model`` of the stream's events.
    """

    __slots__ = ("_lost", "_prompt", "_told", "head", "ids", "noted", "sure", "unsure", "why_not")

    def __init__(self) -> None:
        self._prompt: list[int] = []
        self._told: bytes | None = None  # the prompt's ids as they came
        self._lost = False  # ids are missing
        self.ids = array("l")
        self.sure = self.noted = 0
        self.why_not: str | None = None
        self.head: dict[str, object] = {}
        self.unsure: list[bytes] = []

    @property
    def knows_prompt(self) -> bool:
        """Whether the ids of the prompt were told."""
        return bool(self._told)

    @property
    def prompt(self) -> list[int]:
        """The ids of the prompt; empty where they were not told, or cannot be read.

        Hardly any answer has to go on elsewhere, so they are read when somebody asks.
        """
        if self._told and not self._prompt:
            self._prompt = read_ids(self._told) or []
        return self._prompt

    def take(self, data: bytes) -> bytes:
        """Note the ids of whole events; return the events without them."""
        if not whole_events(data):
            self.lose(TOO_LONG)
        events = data.replace(b"\r\n", b"\n").split(b"\n\n")
        return b"\n\n".join([self._take_one(event) if event else event for event in events])

    def _take_one(self, event: bytes) -> bytes:
        if (found := _PROMPT_IDS.search(event)) is not None:
            self._told = found[1]
            event = b'%b"prompt_token_ids":null%b' % (event[: found.start()], event[found.end() :])
        if not self.head:
            self._begin(event)
        at = event.find(IDS)
        end = event.find(b"]", at) if at >= 0 else -1
        if end < 0:
            if at >= 0:
                self.lose(UNREADABLE)
            elif has_text(event):
                self.lose("the worker's events carry no token ids")
            return event
        said = event[at + 13 : end]
        event = b"%bnull%b" % (event[: at + 12], event[end + 1 :])
        self.note(said, event)
        return event

    def _begin(self, event: bytes) -> None:
        plain = read_event(event)
        if plain is not None:
            self.head = {k: plain[k] for k in ("id", "created", "model") if k in plain}

    def note(self, said: bytes, event: bytes) -> None:
        """Note what stood between the brackets of an event, which is given without it."""
        ids = read_ids(said)
        if ids is None:
            self.lose(UNREADABLE)
        else:
            self.add(ids, event)

    def add(self, ids: list[int], event: bytes) -> None:
        """Note the ids of one event, which is given without them."""
        self._settle()
        self.ids.extend(ids)
        self.noted = len(self.ids)
        self._look_for_obstacles(event)
        if self.why_not is not None or not has_text(event):
            return
        if len(ids) == 1:
            self.sure = len(self.ids)
            self.unsure.clear()
        else:
            self._keep_unsure([event])

    def _settle(self) -> None:
        """Take in what was appended from outside."""
        if len(self.ids) > self.noted:
            self.sure = self.noted = len(self.ids)
            self.unsure.clear()

    def _look_for_obstacles(self, data: bytes) -> None:
        if len(self.ids) > MAX_TOKENS:
            self.lose(f"an answer of more than {MAX_TOKENS} tokens")
            del self.ids[:]
            self.sure = self.noted = 0
        if b'"tool_calls":[{' in data:
            self.why_not = "tool calls, which the worker parses"
        elif b'"reasoning":"' in data or b'"reasoning_content":"' in data:
            self.why_not = "reasoning, which the worker parses"

    def _keep_unsure(self, events: list[bytes]) -> None:
        self.unsure += events
        if len(self.unsure) > MAX_UNSURE_EVENTS:
            self.why_not = "the worker bundles tokens in every event"
            self.unsure.clear()

    def lose(self, why: str) -> None:
        """Note that ids are missing: nothing can go on from here, and nobody knows how many."""
        self.why_not = why
        self._lost = True

    @property
    def counts(self) -> tuple[int, int] | None:
        """Tokens of the prompt and of the answer so far; None where that is not known."""
        if self._lost or not self._told:
            return None
        return self._told.count(b",") + 1, len(self.ids)

    def problem(self) -> str | None:
        """Return why the answer cannot go on from here, or None."""
        self._settle()
        if self.why_not is None and not self.prompt:
            return UNREADABLE if self._told else "the worker did not tell the ids of the prompt"
        return self.why_not

    def cut(self) -> str:
        """Forget the ids that are not sure; return the text that the client has beyond them."""
        self._settle()
        text = "".join([text_of(read_event(event)) for event in self.unsure])
        self.unsure.clear()
        del self.ids[self.sure :]
        self.noted = self.sure
        return text

    def usage(self) -> dict[str, int]:
        """Return what an engine would say of the whole answer."""
        prompt, output = len(self.prompt), len(self.ids)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + output,
            "completion_tokens": output,
        }


class Resumed:
    """Turns what the next worker says into the rest of the answer.

    Args:
        trail: The answer so far, cut; goes on growing.
        owed: The text that the client has beyond the cut.
    """

    __slots__ = ("_before", "_owed", "problem", "trail")

    def __init__(self, trail: Trail, owed: str) -> None:
        self.trail = trail
        self.problem: str | None = None
        self._owed = owed
        self._before = trail.sure

    @property
    def owes(self) -> bool:
        """Whether the next worker has yet to repeat text that the client has."""
        return bool(self._owed)

    def take(self, data: bytes) -> bytes:
        """Return whole events as the first worker would have sent them.

        ``problem`` says afterwards whether the answer went another way.
        """
        if not whole_events(data):
            self.problem = TOO_LONG
            return b""
        events = data.replace(b"\r\n", b"\n").split(b"\n\n")
        return b"".join([self._one(event) for event in events if event])

    def _one(self, event: bytes) -> bytes:
        plain = read_event(event)
        if plain is None or "error" in plain:
            return event + b"\n\n"
        plain.update(self.trail.head)
        if plain.pop("prompt_token_ids", None) is not None:
            plain["prompt_token_ids"] = None
        usage = plain.get("usage")
        if isinstance(usage, dict):
            self._correct(usage)
        choices = plain.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return _event(plain)
        if "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = None
        ids = choice.get("token_ids")
        delta = choice.get("delta")
        if isinstance(delta, dict) and delta.pop("role", None) is not None and not ids:
            return b""  # the client knows who speaks
        if "token_ids" in choice:
            choice["token_ids"] = None
        if isinstance(ids, list):
            self._note(ids, _event(plain))
        if self._owed:
            self._skip(choice)
            if self._owed:
                self.trail.sure = min(self.trail.sure, self._before)
        return _event(plain)

    def _note(self, ids: list[object], event: bytes) -> None:
        good = [i for i in ids if type(i) is int and 0 <= i < 10**MAX_ID_DIGITS]
        if len(good) == len(ids):
            self.trail.add(good, event)
        else:
            self.trail.lose(UNREADABLE)

    def _skip(self, choice: dict[str, object]) -> None:
        delta = choice.get("delta")
        where, key = (delta, "content") if isinstance(delta, dict) else (choice, "text")
        text = where.get(key)
        if not isinstance(text, str):
            text = ""
        size = min(len(text), len(self._owed))
        ended = choice.get("finish_reason") is not None and size < len(self._owed)
        if text[:size] != self._owed[:size] or ended:
            self.problem = "the next worker's answer went another way"
            return
        self._owed = self._owed[size:]
        if key in where:
            where[key] = text[size:]

    def _correct(self, usage: dict[str, object]) -> None:
        prompt, output = len(self.trail.prompt), usage.get("completion_tokens")
        if isinstance(output, int):
            usage["prompt_tokens"] = prompt
            usage["completion_tokens"] = output + self._before
            usage["total_tokens"] = prompt + output + self._before


def read_ids(said: bytes) -> list[int] | None:
    """Return the ids that stand between the brackets of a JSON list, or None where they do not."""
    if _LIST.fullmatch(said) is None:
        return None
    return [int(i) for i in said.split(b",")] if said.strip() else []


def unframed(chunk: bytes) -> bytes:
    """Return the content of one HTTP chunk."""
    return chunk[chunk.find(b"\r\n") + 2 : -2]


def whole_events(data: bytes) -> bool:
    """Return whether ``data`` ends with an event: what is very long comes in pieces."""
    return data.endswith((b"\n\n", b"\r\n\r\n"))


def has_text(event: bytes) -> bool:
    """Return whether an event carries text; inside a JSON text the quotes would be escaped."""
    return (b'"text":"' in event and b'"text":""' not in event) or (
        b'"content":"' in event and b'"content":""' not in event
    )


def read_event(event: bytes) -> dict[str, object] | None:
    """Return the JSON object of one event, or None where it holds none."""
    data = event.strip()
    if not data.startswith(b"data:"):
        return None
    try:
        plain = _decode(data[5:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return plain if isinstance(plain, dict) else None


def text_of(plain: dict[str, object] | None) -> str:
    """Return the text of an event's only choice."""
    choices = plain.get("choices") if plain is not None else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return ""
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def finishing(trail: Trail, reason: str, *, chat: bool) -> bytes:
    """Return the event that gives the finish reason of an answer whose text was sent."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    text: dict[str, object] = {"delta": {"content": ""}} if chat else {"text": ""}
    choice = {"index": 0, **text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
    return _event({**trail.head, "object": kind, "choices": [choice]})


def closing(trail: Trail, *, usage: bool, chat: bool) -> bytes:
    """Return what was still to be said after the finish reason."""
    done = b"data: [DONE]\n\n"
    if not usage:
        return done
    kind = "chat.completion.chunk" if chat else "text_completion"
    return _event({**trail.head, "object": kind, "choices": [], "usage": trail.usage()}) + done


def _event(plain: dict[str, object]) -> bytes:
    return b"data: %b\n\n" % _encode(plain)
