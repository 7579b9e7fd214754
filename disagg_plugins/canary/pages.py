"""The canary over HTTP: the page and its files, the document behind it, and people's commands.

The files hold no data. The document is for this host, for holders of the fleet's secret, and for
browsers with a token. Commands always want a token or a signature, on this host too: any page that
an operator has open could send one from there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from disagg_plugins.canary.document import document
from disagg_plugins.canary.lookout import DOS, MEMORY_ERRORS
from disagg_plugins.canary.page_files import static
from disagg_plugins.canary.page_token import Tokens
from disagg_plugins.errors import AuthenticationError, RolloutRefused
from disagg_plugins.gateway.endpoints import encode, may_see, query_value
from disagg_plugins.gateway.wire import header_value

if TYPE_CHECKING:
    from disagg_plugins.canary.front import Front
    from disagg_plugins.canary.lookout import Do
    from disagg_plugins.canary.page_token import Right
    from disagg_plugins.gateway.client_connection import ClientConnection, Request
    from disagg_plugins.gateway.reply import Reply

__all__ = ["Tokens", "asks_candidate", "handle"]

log = logging.getLogger(__name__)

PATH = b"/internal/canary"
PAGE = b"/canary"
MAX_COMMAND_BYTES = 64 * 1024
MAX_WORDS = 1_000
"""Characters of a reason or a name."""

ANSWER_S = 30.0
"""Longest wait for the memory and the numbers; the store's own time-outs are shorter."""

FILE_LINES = (
    b"content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; "
    b"connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    b"frame-ancestors 'none'\r\n"
    b"x-content-type-options: nosniff\r\n"
    b"referrer-policy: no-referrer\r\n"
    b"cache-control: no-cache\r\n"
)
JSON_LINES = b"content-type: application/json\r\ncache-control: no-store\r\n"


class Later:
    """Waits for an answer that a thread makes; the client may go meanwhile."""

    __slots__ = ()

    def client_gone(self) -> None:
        """The client closed its connection: what was begun is finished, and told to nobody."""

    def client_slow(self, slow: bool) -> None:
        """Answers are short."""


def asks_candidate(path: bytes) -> bool:
    """Return whether a request for one gateway is for the candidate's."""
    return b"arm=candidate" in path and query_value(path, "arm") == "candidate"


def handle(front: Front, request: Request, client: ClientConnection, path: bytes) -> bool:
    """Answer what is the canary's; False: it is not."""
    if path == PAGE or path.startswith(PAGE + b"/"):
        _file(front, request, client, path)
        return True
    if path != PATH:
        return False
    if request.method == b"POST":
        _command(front, request, client)
    elif request.method in (b"GET", b"HEAD"):
        right = _right(front, request)
        if right is not None or may_see(front.baseline, request, client):
            _answer_later(front, client, None, "", "", may_act=right == "act")
    else:
        front.baseline.refuse(client, 405, "the methods for this path are GET and POST")
    return True


def _file(front: Front, request: Request, client: ClientConnection, path: bytes) -> None:
    name = path.removeprefix(PAGE).removeprefix(b"/").decode("ascii", "replace") or "index.html"
    found = static(name)
    if found is None or request.method not in (b"GET", b"HEAD"):
        front.baseline.refuse(client, 404, f"there is no {name[:100]} here", code="not_found")
        return
    kind, body = found
    client.answer(200, body, b"content-type: %b\r\n%b" % (kind, FILE_LINES))


def _right(front: Front, request: Request) -> Right | None:
    """Return what the token of a request allows; None: it has none that is good."""
    given = header_value(request.headers, b"authorization") or b""
    if not given.lower().startswith(b"bearer "):
        return None
    try:
        return front.tokens.read(given[7:].strip().decode("latin-1"), time.time())
    except AuthenticationError:
        return None


def _command(front: Front, request: Request, client: ClientConnection) -> None:
    gateway = front.baseline
    if len(request.body) > MAX_COMMAND_BYTES:
        gateway.refuse(client, 413, f"the body exceeds {MAX_COMMAND_BYTES} bytes")
        return
    if _right(front, request) != "act":
        try:
            gateway.signatures.check(request, time.time())
        except AuthenticationError as exc:
            message = f"{exc}; `disagg canary page` prints a link that may"
            gateway.refuse(client, 403, message, code="signature")
            return
    try:
        asked = msgspec.json.decode(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        gateway.refuse(client, 400, f"the body is not JSON: {exc}", code="malformed")
        return
    found = asked if isinstance(asked, dict) else {}
    do = next((do for do in DOS if do == found.get("do")), None)
    words = [found.get(key, "") for key in ("by", "why")]
    if do is None or not all(isinstance(w, str) and len(w) <= MAX_WORDS for w in words):
        message = (
            f"the body is {{'do': one of {', '.join(DOS)}, 'by': a name, 'why': a reason}}, of at "
            f"most {MAX_WORDS} characters each"
        )
        gateway.refuse(client, 400, message, code="malformed")
        return
    by, why = (str(w) for w in words)
    _answer_later(front, client, do, by or "somebody", why, may_act=True)


def _answer_later(
    front: Front,
    client: ClientConnection,
    do: Do | None,
    by: str,
    why: str,
    *,
    may_act: bool,
) -> None:
    reply = client.answering(Later())
    front.spawn(_answer(front, reply, do, by, why, may_act=may_act))


async def _answer(
    front: Front, reply: Reply, do: Do | None, by: str, why: str, *, may_act: bool
) -> None:
    try:
        async with asyncio.timeout(ANSWER_S):
            if do is not None:
                front.check_command(do)
                await front.lookout.act(do, by, why)
            report = await front.lookout.report()
        body = encode(document(front, report, may_act=may_act))
        reply.answer(200, body, JSON_LINES)
    except RolloutRefused as exc:
        _fail(front, reply, 409, str(exc), "refused")
    except MEMORY_ERRORS as exc:
        _fail(front, reply, 503, str(exc), "store")
    except TimeoutError:
        message = f"the canary's memory did not answer within {ANSWER_S:g} s"
        if do is not None:
            message += f"; look at the status, {do!r} may have been carried out"
        _fail(front, reply, 503, message, "store")
    except Exception:
        log.exception("the canary's document could not be made")
        _fail(front, reply, 500, "the gateway failed; its log says why", "internal")


def _fail(front: Front, reply: Reply, status: int, message: str, code: str) -> None:
    front.metrics.count("disagg_client_errors", (str(status),))
    body = encode({"error": {"message": message, "type": "canary", "code": code}})
    reply.answer(status, body, JSON_LINES)
