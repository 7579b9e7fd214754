"""The engine's OpenAI server: completions and chats, streamed or not (aiohttp)."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from aiohttp import web

from disagg_plugins.errors import NoCapacityError
from disagg_reference.answers import Answer, Plain
from disagg_reference.engine import Engine, EngineDead
from disagg_reference.openai import Asked, BadRequest, read_request
from disagg_reference.request import Output, Request
from disagg_reference.text import Pieces, Text

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 << 20
FIRST_ID = 1
MAX_NAME_CHARS = 64
HTTP_CLOSE_S = 5.0


class Server:
    """Serves one engine.

    Args:
        engine: Started.
        text: Its model's tokenizer.
        model: The name that clients give it.
    """

    def __init__(self, engine: Engine, text: Text, model: str) -> None:
        self._engine, self._text, self._model = engine, text, model
        self._ids = itertools.count(FIRST_ID)
        self.app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_plain_errors])
        self.app.add_routes(
            [
                web.post("/v1/completions", self._completion),
                web.post("/v1/chat/completions", self._chat),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
            ]
        )

    async def _completion(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, chat=False)

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, chat=True)

    async def _answer(self, http: web.Request, *, chat: bool) -> web.StreamResponse:
        asked = read_request(await _json(http), chat=chat)
        if asked.model is not None and asked.model != self._model:
            raise web.HTTPNotFound(text=f"the model {asked.model!r:.80} is not served here")
        outputs: asyncio.Queue[Output] = asyncio.Queue()  # of one answer, which is bounded
        loop = asyncio.get_running_loop()

        def tell(output: Output) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, output)

        request = self._request(asked, tell)
        try:
            self._engine.submit(request)
        except ValueError as exc:
            raise BadRequest(str(exc)) from exc
        name = http.headers.get("x-request-id", "")[:MAX_NAME_CHARS] or secrets.token_hex(16)
        answer = Answer(
            asked, request, self._text, name=name, model=self._model, created_s=int(time.time())
        )
        try:
            pieces = self._pieces(asked, request, outputs)
            if asked.stream:
                return await self._stream(http, asked, answer, pieces)
            return await self._whole(answer, pieces)
        finally:
            self._engine.cancel(request.request_id)  # it is over, or its client went

    def _request(self, asked: Asked, tell: Callable[[Output], None]) -> Request:
        try:
            if asked.chat:
                prompt = tuple(self._text.chat(asked.messages))
            elif isinstance(asked.prompt, str):
                prompt = tuple(self._text.encode(asked.prompt))
            else:
                prompt = asked.prompt
        except ValueError as exc:
            raise BadRequest(str(exc)) from exc
        room = self._engine.config.max_tokens - len(prompt)
        return Request(
            next(self._ids) if asked.request_id is None else asked.request_id,
            prompt,
            max(1, room) if asked.max_tokens is None else asked.max_tokens,
            sampling=asked.sampling,
            eos=frozenset() if asked.ignore_eos else self._engine.config.eos,
            min_tokens=asked.min_tokens,
            params=asked.params,
            tell=tell,
        )

    async def _pieces(
        self, asked: Asked, request: Request, outputs: asyncio.Queue[Output]
    ) -> AsyncIterator[tuple[str, list[Output], str | None]]:
        """Yield text, what it was made of, and at last why it is over."""
        pieces = Pieces(self._text, asked.stop)
        held: list[Output] = []
        while True:
            # bounded by the engine: it ends every request, or dies and tells each one
            output = await outputs.get()
            if output.finish_reason in ("abort", "error"):
                raise EngineDead(output.problem or "the request was given up")
            held.append(output)
            text, finish = "", output.finish_reason
            ends = finish == "stop"  # with a token that has no text
            if output.token is not None and not ends:
                text = pieces.add(output.token)
            if finish is not None:
                text += pieces.rest()
            if pieces.stopped:
                finish = "stop"
            if text or finish is not None or asked.ids:
                yield text, held, finish
                held = []
            if finish is not None:
                return

    async def _whole(
        self, answer: Answer, pieces: AsyncIterator[tuple[str, list[Output], str | None]]
    ) -> web.Response:
        text, tokens, finish = "", [], "stop"
        async for piece, outputs, ended in pieces:
            text += piece
            tokens += outputs
            finish = ended or finish
        return web.json_response(answer.whole(text, tokens, finish))

    async def _stream(
        self,
        http: web.Request,
        asked: Asked,
        answer: Answer,
        pieces: AsyncIterator[tuple[str, list[Output], str | None]],
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"content-type": "text/event-stream", "cache-control": "no-cache"}
        )
        # the head goes with the first token: what fails before is answered with a status
        begun = False
        try:
            async for text, outputs, finish in pieces:
                if not begun:
                    begun = True
                    await response.prepare(http)
                await response.write(_event(answer.piece(text, outputs, finish)))
        except EngineDead as exc:
            if not begun:
                raise
            await response.write(_event(_error(str(exc), 500)))
        else:
            if asked.usage:
                await response.write(_event(answer.usage_event()))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _models(self, http: web.Request) -> web.Response:
        card = {
            "id": self._model,
            "object": "model",
            "owned_by": "disagg-plugins",
            "max_model_len": self._engine.config.max_tokens,
        }
        return web.json_response({"object": "list", "data": [card]})

    async def _health(self, http: web.Request) -> web.Response:
        problem = self._engine.problem
        if problem:
            return web.json_response(_error(problem, 503), status=503)
        return web.Response()

    async def _metrics(self, http: web.Request) -> web.Response:
        lines = []
        for name, value in self._engine.stats().items():
            lines += [f"# TYPE disagg_reference_{name} gauge", f"disagg_reference_{name} {value:g}"]
        return web.Response(text="\n".join([*lines, ""]))


async def _json(http: web.Request) -> object:
    try:
        return await http.json()
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"the body is no JSON: {exc}") from exc


@web.middleware
async def _plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer what is raised as the OpenAI API does."""
    headers = {}
    try:
        return await handler(request)
    except BadRequest as exc:
        status, said = 400, str(exc)
    except NoCapacityError as exc:
        status, said = 503, str(exc)
        headers["retry-after"] = f"{max(1, round(exc.retry_after_s))}"
    except EngineDead as exc:
        status, said = 500, str(exc)
    except web.HTTPException as exc:
        status, said = exc.status, exc.text or exc.reason
    except Exception:
        log.exception("a request could not be answered")
        status, said = 500, "the engine's server failed; its log says why"
    return web.json_response(_error(said, status), status=status, headers=headers)


def _error(message: str, status: int) -> Plain:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def _event(value: Plain) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


async def run_server(server: Server, host: str, port: int, stop: asyncio.Event) -> None:
    """Serve until ``stop`` is set.

    Raises:
        OSError: Nothing can listen there.
    """
    runner = web.AppRunner(
        server.app, handler_cancellation=True, access_log=None, shutdown_timeout=HTTP_CLOSE_S
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        log.info("disagg: the reference engine listens at http://%s:%d", host, port)
        await stop.wait()
    finally:
        await runner.cleanup()
