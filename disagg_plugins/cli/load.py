"""A small closed-loop load generator for any OpenAI endpoint, and its statistics.

Closed loop: ``concurrency`` clients each send one streaming request after the other. The terms
are the field's (those of ``vllm bench serve``):

- TTFT: sending the request to the first chunk with output.
- ITL: one gap between two such chunks; a distribution over all requests (chunks may bundle tokens).
- TPOT: (end-to-end latency - TTFT) / (output tokens - 1), one number a request, undefined for one
  token. End-to-end latency ends with the last chunk that has output.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from disagg_plugins.errors import ConfigError, DisaggError

WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book"
).split()
"""Common words: about one token each in every large vocabulary."""

MAX_LINE_BYTES = 1 << 20
"""A longer line of an event stream is not an OpenAI answer."""


class LoadError(DisaggError):
    """The endpoint does not answer as an OpenAI endpoint does."""


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What to send.

    Attributes:
        url: ``http[s]://host:port``, perhaps with a path before ``/v1``.
        model: The model named in the requests.
        requests: How many in all.
        concurrency: How many at once.
        prompt_words: Words of each prompt, about as many tokens.
        output_tokens: ``max_tokens`` of each request; ``ignore_eos`` is asked for.
        chat: Use chat completions instead of completions.
        timeout_s: Longest silence of the endpoint.
        seed: Of the random prompts.
        api_key: Sent as a bearer token if not empty.
        token_ids: Ask for the ids of the tokens, where the engine tells them.
    """

    url: str
    model: str
    requests: int
    concurrency: int
    prompt_words: int
    output_tokens: int
    chat: bool = False
    timeout_s: float = 120.0
    seed: int = 0
    api_key: str = field(default="", repr=False)
    token_ids: bool = False


@dataclass(slots=True)
class Sample:
    """What one request did.

    Attributes:
        error: Why it failed, or an empty string.
        prompt_tokens: As the endpoint counts them; 0 if it does not say.
        output_tokens: As the endpoint counts them, else the number of chunks.
        ttft_s: None if no output came.
        latency_s: Sending to the last output.
        gaps_s: Gaps between chunks with output.
    """

    error: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None
    latency_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)

    @property
    def tpot_s(self) -> float | None:
        """Return the mean time of an output token after the first, if there are two."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1)


def connect(url: str, timeout_s: float) -> tuple[HTTPConnection, str]:
    """Return an unconnected connection to ``url`` and the path before ``/v1``."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is not of the form http://host:port")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    path = parts.path.rstrip("/").removesuffix("/v1")
    return kind(parts.hostname, parts.port, timeout=timeout_s), path


def first_model(url: str, timeout_s: float, api_key: str = "") -> str:
    """Return the first model that the endpoint lists.

    Raises:
        LoadError: It does not answer, or lists none.
    """
    connection, path = connect(url, timeout_s)
    try:
        connection.request("GET", f"{path}/v1/models", headers=_headers(api_key))
        answer = connection.getresponse()
        data = json.loads(answer.read(MAX_LINE_BYTES))
        return str(data["data"][0]["id"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as exc:
        raise LoadError(
            f"{url}/v1/models gives no model ({type(exc).__name__}: {exc}); "
            "is the endpoint up? --model NAME skips the question"
        ) from exc
    finally:
        connection.close()


def _headers(api_key: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return headers


def _prompts(settings: LoadSettings) -> Iterator[str]:
    # Not for secrets: the same prompts every time make runs comparable.
    source = random.Random(settings.seed)
    for _ in range(settings.requests):
        yield " ".join(source.choices(WORDS, k=settings.prompt_words))


def _body(settings: LoadSettings, prompt: str) -> bytes:
    body: dict[str, Any] = {
        "model": settings.model,
        "max_tokens": settings.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.token_ids:
        body["return_token_ids"] = True
    if settings.chat:
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    return json.dumps(body).encode()


def _has_output(choices: Any) -> bool:
    """Return whether a chunk carries output; a chat's first chunk only names the role.

    A token that ends inside a character comes as a chunk without text, and is output too.
    """
    if not choices:
        return False
    delta = choices[0].get("delta")
    return delta is None or not delta.get("role") or bool(delta.get("content"))


def _events(answer: HTTPResponse) -> Iterator[Any]:
    while line := answer.readline(MAX_LINE_BYTES):
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise LoadError("the stream ended without [DONE]")


def _ignore(event: Any) -> None:
    """Nobody listens."""


def measure(
    settings: LoadSettings,
    connection: HTTPConnection,
    path: str,
    prompt: str,
    listen: Callable[[Any], None] = _ignore,
) -> Sample:
    """Send one request and time its answer; ``listen`` is told every event of it."""
    sample = Sample()
    endpoint = "/v1/chat/completions" if settings.chat else "/v1/completions"
    started_s = last_s = time.perf_counter()
    chunks = 0
    try:
        headers = _headers(settings.api_key)
        connection.request("POST", path + endpoint, _body(settings, prompt), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise LoadError(f"status {answer.status}: {answer.read(300).decode(errors='replace')}")
        for event in _events(answer):
            now_s = time.perf_counter()
            listen(event)
            if "error" in event:
                raise LoadError(f"error in the stream: {event['error']}")
            if usage := event.get("usage"):
                sample.prompt_tokens = int(usage["prompt_tokens"])
                sample.output_tokens = int(usage["completion_tokens"])
            if _has_output(event.get("choices")):
                chunks += 1
                if sample.ttft_s is None:
                    sample.ttft_s = now_s - started_s
                else:
                    sample.gaps_s.append(now_s - last_s)
                last_s = now_s
        # What follows [DONE] is the end of the body; the connection can then be used again.
        answer.read()
    except (OSError, HTTPException, ValueError, LookupError, TypeError, LoadError) as exc:
        sample.error = f"{type(exc).__name__}: {exc}"
        connection.close()
    sample.latency_s = last_s - started_s
    sample.output_tokens = sample.output_tokens or chunks
    return sample


def run_load(
    settings: LoadSettings, on_done: Callable[[int], None] = lambda _: None
) -> tuple[list[Sample], float]:
    """Send all requests; return a sample of each and the wall-clock seconds of the whole.

    Args:
        settings: What to send.
        on_done: Told the number of requests that have ended, from the clients' threads.
    """
    prompts = _prompts(settings)
    samples: list[Sample] = []
    lock = threading.Lock()

    def client() -> None:
        connection, path = connect(settings.url, settings.timeout_s)
        try:
            while True:
                with lock:
                    prompt = next(prompts, None)
                if prompt is None:
                    return
                sample = measure(settings, connection, path, prompt)
                with lock:
                    samples.append(sample)
                    done = len(samples)
                on_done(done)
        finally:
            connection.close()

    count = min(settings.concurrency, settings.requests)
    threads = [threading.Thread(target=client, daemon=True) for _ in range(count)]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        # Bounded by timeout_s of each read; daemon threads, so that Ctrl-C ends it all.
        thread.join()
    return samples, time.perf_counter() - started_s


def spread(values_s: Sequence[float]) -> dict[str, float | None]:
    """Return mean, p50, p99 and (population) standard deviation; None where there is no value."""
    if not values_s:
        return dict.fromkeys(("mean_s", "p50_s", "p99_s", "std_s"))
    array = np.asarray(values_s, dtype=np.float64)
    p50, p99 = np.percentile(array, [50, 99])
    return {
        "mean_s": float(array.mean()),
        "p50_s": float(p50),
        "p99_s": float(p99),
        "std_s": float(array.std()),
    }


def summarise(samples: Sequence[Sample], wall_s: float) -> dict[str, Any]:
    """Return the statistics of a run as a JSON-able dictionary, times in seconds."""
    good = [s for s in samples if not s.error]
    output_tokens = sum(s.output_tokens for s in good)
    return {
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "errors": sorted({s.error for s in samples if s.error})[:5],
        "wall_s": wall_s,
        "requests_per_s": len(good) / wall_s if wall_s > 0 else None,
        "output_tokens_per_s": output_tokens / wall_s if wall_s > 0 else None,
        "prompt_tokens": sum(s.prompt_tokens for s in good),
        "output_tokens": output_tokens,
        "ttft": spread([s.ttft_s for s in good if s.ttft_s is not None]),
        "itl": spread([gap for s in good for gap in s.gaps_s]),
        "tpot": spread([s.tpot_s for s in good if s.tpot_s is not None]),
        "e2e": spread([s.latency_s for s in good]),
    }
