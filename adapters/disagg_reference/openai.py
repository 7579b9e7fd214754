"""What a client of the OpenAI API asks for, read and checked (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from disagg_reference.request import Sampling

DEFAULT_COMPLETION_TOKENS = 16
"""Of a completion that names no bound (OpenAI's own default, and vLLM's)."""

MOST_LOGPROBS = 20
MOST_STOPS = 16
MAX_STOP_CHARS = 256

LEAST_ID = 1 << 40
"""Of a request that others number (TensorRT-LLM's ``MIN_GLOBAL_ID``); our own are below."""

UNSUPPORTED = (
    "audio",
    "best_of",
    "echo",
    "frequency_penalty",
    "function_call",
    "functions",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "logit_bias",
    "presence_penalty",
    "prompt_embeds",
    "response_format",
    "structured_outputs",
    "suffix",
    "tools",
    "use_beam_search",
)
"""Fields that would change the answer, and that this engine does not know."""

NEUTRAL = {"response_format": {"type": "text"}, "best_of": 1}


class BadRequest(Exception):
    """The client's mistake: answered with 400."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Attributes:
        chat: Whether it is a chat.
        prompt: Text, or token ids; of a chat nothing.
        messages: Of a chat, as they were sent.
        max_tokens: Bound on the answer; None: what the context leaves.
        stop: Texts that end the answer, and are not part of it.
        stream: Whether pieces are sent as they come.
        usage: Whether a stream ends with the usage.
        ids: Whether token ids are told.
        params: Of a handoff.
        request_id: That the client demands of the engine; None: any.
        model: As it was named, or None.
    """

    chat: bool
    prompt: str | tuple[int, ...] = ""
    messages: Sequence[Mapping[str, object]] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    ids: bool = False
    params: Mapping[str, object] = field(default_factory=dict)
    request_id: int | None = None
    model: str | None = None


def read_request(body: object, *, chat: bool) -> Asked:
    """Return what a body asks for.

    Raises:
        BadRequest: It is none, or asks for what this engine does not do.
    """
    if not isinstance(body, Mapping):
        raise BadRequest("the body must be a JSON object")
    for key in UNSUPPORTED:
        if body.get(key) and body[key] != NEUTRAL.get(key):
            raise BadRequest(f"{key} is not supported by the reference engine")
    fields = _Fields(body)
    if fields.int("n", 1, least=1) != 1:
        raise BadRequest("n must be 1: the reference engine writes one answer a request")
    bound = fields.optional_int("max_tokens", least=1)
    if chat:
        bound = fields.optional_int("max_completion_tokens", least=1) or bound
    elif bound is None:
        bound = DEFAULT_COMPLETION_TOKENS
    params, request_id = _handoff(body)
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise BadRequest("stream_options must be an object")
    model = body.get("model")
    return Asked(
        chat=chat,
        prompt="" if chat else _prompt(body.get("prompt")),
        messages=_messages(body.get("messages")) if chat else (),
        max_tokens=bound,
        min_tokens=fields.int("min_tokens", 0),
        sampling=_sampling(fields, body, chat),
        ignore_eos=fields.bool("ignore_eos"),
        stop=_stop(body.get("stop")),
        stream=fields.bool("stream"),
        usage=bool(options.get("include_usage")),
        ids=fields.bool("return_token_ids"),
        params=params,
        request_id=request_id,
        model=model if isinstance(model, str) else None,
    )


def _sampling(fields: _Fields, body: Mapping[str, object], chat: bool) -> Sampling:
    temperature = fields.number("temperature", 1.0, 0.0, 2.0)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    if top_p <= 0.0:
        raise BadRequest("top_p must be above 0")
    logprobs: int | None = None
    if chat:
        if fields.bool("logprobs"):
            logprobs = fields.int("top_logprobs", 0)
    else:
        logprobs = fields.optional_int("logprobs")
    if logprobs is not None and logprobs > MOST_LOGPROBS:
        raise BadRequest(f"at most {MOST_LOGPROBS} logprobs are told, not {logprobs}")
    top_k = body.get("top_k")
    if top_k == -1:  # vLLM's "any"
        top_k = 0
    if top_k is None:
        top_k = 0
    if type(top_k) is not int or top_k < 0:
        raise BadRequest(f"top_k must be a whole number, not {top_k!r:.40}")
    seed = body.get("seed")
    if seed is not None and type(seed) is not int:
        raise BadRequest(f"seed must be a whole number, not {seed!r:.40}")
    return Sampling(temperature, top_p, top_k, seed, logprobs)


def _handoff(body: Mapping[str, object]) -> tuple[Mapping[str, object], int | None]:
    """Return what travels to whoever moves KV, and the id that the request must have."""
    native = body.get("kv_transfer_params")
    if native is not None:
        if not isinstance(native, Mapping):
            raise BadRequest("kv_transfer_params must be an object")
        return native, None
    params = body.get("disaggregated_params")
    if params is None:
        return {}, None
    if not isinstance(params, Mapping):
        raise BadRequest("disaggregated_params must be an object")
    if params.get("request_type") != "context_and_generation":
        raise BadRequest(
            f"request_type {params.get('request_type')!r:.40} is not supported here: this engine "
            "has TensorRT-LLM's KV connector interface, not its cache transceiver"
        )
    request_id = params.get("disagg_request_id")
    if type(request_id) is not int or not LEAST_ID <= request_id < 1 << 63:
        raise BadRequest(f"disagg_request_id is {request_id!r:.40}, no number of 41 to 63 bits")
    return params, request_id


def _prompt(given: object) -> str | tuple[int, ...]:
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given and all(type(token) is int for token in given):
        return tuple(given)
    raise BadRequest("prompt must be a text or a list of token ids")


def _messages(given: object) -> Sequence[Mapping[str, object]]:
    if not isinstance(given, list) or not given:
        raise BadRequest("messages must be a list of at least one")
    found = []
    for message in given:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRequest("each message must be an object with a role")
        found.append({**message, "content": _content(message.get("content"))})
    return found


def _content(given: object) -> str:
    if given is None:
        return ""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise BadRequest("content must be a text or a list of parts")
    texts = []
    for part in given:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise BadRequest("only text parts are supported by the reference engine")
        texts.append(text)
    return "\n".join(texts)


def _stop(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise BadRequest(f"stop must be a text or a list of at most {MOST_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise BadRequest(f"a stop must be a text of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


class _Fields:
    """Reads fields of one kind each."""

    def __init__(self, body: Mapping[str, object]) -> None:
        self._body = body

    def optional_int(self, key: str, *, least: int = 0) -> int | None:
        value = self._body.get(key)
        if value is None:
            return None
        if type(value) is not int or value < least:
            raise BadRequest(f"{key} must be a whole number of at least {least}, not {value!r:.40}")
        return value

    def int(self, key: str, default: int, *, least: int = 0) -> int:
        value = self.optional_int(key, least=least)
        return default if value is None else value

    def number(self, key: str, default: float, least: float, most: float) -> float:
        value = self._body.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadRequest(f"{key} must be a number, not {value!r:.40}")
        if not least <= value <= most:
            raise BadRequest(f"{key} must lie between {least:g} and {most:g}, not at {value!r:.40}")
        return float(value)

    def bool(self, key: str) -> bool:
        value = self._body.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise BadRequest(f"{key} must be true or false, not {value!r:.40}")
        return value
