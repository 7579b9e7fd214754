"""Prompt tokens, counted with the model's own tokenizer.

A short prompt is counted at once. A longer one is counted on a thread (the tokenizer lets go of the
interpreter's lock meanwhile), so that no other request waits for it; see ``counting``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from disagg_plugins.errors import ConfigError
from disagg_plugins.gateway.chat_template import chat_fields, load_chat_template
from disagg_plugins.gateway.openai import CHAT
from disagg_plugins.gateway.refusals import RequestError

if TYPE_CHECKING:
    from disagg_plugins.gateway.chat_template import Rendering
    from disagg_plugins.gateway.openai import ParsedRequest

log = logging.getLogger(__name__)

MAX_INLINE_CHARS = 2048
"""Encoded in 0.4 ms (SmolLM2's tokenizer, one Xeon core): what a switch to a thread costs too."""

MAX_CHARS = 1 << 20
"""Encoded in half a second; what is longer is estimated."""

MAX_MESSAGES = 4096
"""Of a chat; with more it is estimated. Far beyond any conversation, prepared within 10 ms."""

OBJECT_CHARS = 64
"""Counted for each message, part and tool call beside its text: what a template writes around an
empty one takes time too."""

THREADS = 2
"""Counting must not take the cores that forward tokens."""

MAX_WAITING = 64
"""Prompts that wait for a thread; more are estimated."""

Ids = Sequence[int]


class Encoding(Protocol):
    """An encoded text, as ``tokenizers`` returns it."""

    @property
    def ids(self) -> list[int]:
        """The ids of its tokens."""
        ...


class Encodes(Protocol):
    """What is used of ``tokenizers.Tokenizer``; ``encode`` would keep the interpreter's lock."""

    def encode_batch_fast(
        self, input: list[str], *, add_special_tokens: bool
    ) -> Sequence[Encoding]:
        """Return the encodings of some texts."""
        ...


class TokenCounter:
    """Counts prompts with one tokenizer.

    Args:
        tokenizer: The model's.
        render: What renders its chats; None: chats are estimated.
        spell: Returns the text of one token; None where the texts of tokens, each by itself, do not
            make up the text of all.

    Attributes:
        spell: See there.
    """

    def __init__(
        self,
        tokenizer: Encodes,
        render: Rendering | None,
        spell: Callable[[int], str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._render = render
        self.spell = spell
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenizer")
        self._waiting = 0
        self._told = False

    def close(self) -> None:
        """Begin no more work; what is being counted ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def prepare(self, parsed: ParsedRequest) -> Counting | None:
        """Return how to count a prompt, or None when it has to be estimated."""
        if parsed.exact or parsed.batch or parsed.opaque is not None or not parsed.prompt_tokens:
            return None
        body = parsed.body
        try:
            if body.get("truncate_prompt_tokens") is not None:
                return None
            special = body.get("add_special_tokens")
            if parsed.endpoint == CHAT:
                if self._render is None:
                    return None
                if len(body["messages"]) > MAX_MESSAGES:
                    return None
                fields, render = chat_fields(body), self._render
                chars = _chars(fields["messages"]) + body.raw_bytes("tools")
                chars += body.raw_bytes("chat_template_kwargs")
                text = lambda: render(fields)  # noqa: E731
                add = bool(special)  # the template writes them: vLLM and SGLang add none
            else:
                prompt = body.get("prompt")
                if isinstance(prompt, list):  # a batch of one
                    prompt = prompt[0] if prompt else None
                if not isinstance(prompt, str):
                    return None
                chars, text = len(prompt), lambda: prompt
                add = special is None or bool(special)
        except (ValueError, RecursionError, RequestError):  # a tool call's arguments, deep in text
            return None
        return Counting(self, text, chars, add) if chars <= MAX_CHARS else None

    def encode(self, text: str, add_special_tokens: bool) -> Ids | None:
        """Return the ids of a text, or None when it turns out too long."""
        if len(text) > 2 * MAX_CHARS:
            return None
        found = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return found[0].ids

    def failed(self, exc: BaseException) -> None:
        """Tell once that prompts could not be counted; they are estimated."""
        level = logging.DEBUG if self._told else logging.WARNING
        self._told = True
        log.log(level, "a prompt could not be counted, so it is estimated: %r", exc)

    def submit(self, count: Callable[[], Ids | None]) -> Future[Ids | None] | None:
        """Count on a thread; None when too many prompts wait already. Called on the loop only."""
        if self._waiting >= MAX_WAITING:
            return None
        self._waiting += 1
        return self._threads.submit(count)

    def left(self) -> None:
        """A submitted prompt is counted or given up. Called on the loop only."""
        self._waiting -= 1


class Counting:
    """One prompt, ready to be counted on any thread.

    Attributes:
        short: Whether counting takes so little time that it can be done at once.
    """

    __slots__ = ("_add", "_counter", "_text", "short")

    def __init__(
        self, counter: TokenCounter, text: Callable[[], str], chars: int, add: bool
    ) -> None:
        self._counter = counter
        self._text = text
        self._add = add
        self.short = chars <= MAX_INLINE_CHARS

    def ids(self) -> Ids | None:
        """Return the prompt's token ids, or None when it has to be estimated."""
        try:
            return self._counter.encode(self._text(), self._add)
        except Exception as exc:  # a template may raise anything, at a client's message too
            self._counter.failed(exc)
            return None


def load_token_counter(path: Path) -> TokenCounter | None:
    """Return a counter for the model in a folder, or for a ``tokenizer.json``.

    What cannot be loaded is told in the log, with what to do; None is returned then, and prompts
    are estimated.
    """
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        from tokenizers import Tokenizer
    except ImportError:
        log.warning(
            "prompts are estimated: scheduler.tokenizer needs the library tokenizers "
            "(pip install 'disagg-plugins[tokenizer]')"
        )
        return None
    try:
        if not file.is_file():
            raise ConfigError(f"there is no {file}")
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        spell = (lambda token: str(tokenizer.decode([token]))) if joins(file) else None
    except Exception as exc:  # the library raises Exception itself
        log.warning("prompts are estimated: scheduler.tokenizer cannot be loaded: %s", exc)
        return None
    render = None
    try:
        render = load_chat_template(folder)
        if render is None:
            log.warning("chats are estimated: %s has no chat template", folder)
    except ImportError:
        log.warning(
            "chats are estimated: chat templates need the library jinja2 "
            "(pip install 'disagg-plugins[tokenizer]')"
        )
    except ConfigError as exc:
        log.warning("chats are estimated: %s", exc)
    return TokenCounter(tokenizer, render, spell)


def joins(file: Path) -> bool:
    """Return whether texts of a ``tokenizer.json``'s tokens make up the text of all of them.

    Tokens of bytes are; others (SentencePiece) drop the blank before the first one.
    """
    decoder = msgspec.json.decode(file.read_bytes(), type=_File).decoder
    return decoder is not None and decoder.type == "ByteLevel"


class _Decoder(msgspec.Struct):
    type: str = ""


class _File(msgspec.Struct):
    decoder: _Decoder | None = None


def _chars(messages: object) -> int:
    """Return the length of everything that clients wrote into messages."""
    total, rest = 0, [messages]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            total += OBJECT_CHARS
            rest.extend(value)
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)
        else:
            total += 8  # numbers and truth values
    return total
