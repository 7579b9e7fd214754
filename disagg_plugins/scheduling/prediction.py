"""How long a worker takes to read a prompt, to write a token, to take over a handoff.

The form is DistServe's (OSDI 2024; ``simdistserve/estimators/time_estimator.py`` there): reading
takes ``a + b * tokens + c * tokens**2``, a step ``a + b * KV tokens + c * requests``. DistServe
fits two decode lines, for small and large batches; here one line follows the load. A gateway also
needs to know what the work queued before a prompt costs, and what reading prompts costs the
answers that are written on the same worker.

Every feature is what the gateway knew when it sent the call, because that is what it knows when it
predicts: what changes afterwards is in the fit, on the average. Nothing here knows a clock or does
I/O.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from disagg_plugins.scheduling.regression import FORGETTING, Regression
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker, WorkerLoad

Phase = Literal["prefill", "decode", "handoff"]

COEFFICIENTS: Mapping[Phase, tuple[str, ...]] = {
    "prefill": (
        "base_s",
        "per_token_s",
        "per_token_squared_s",
        "per_queued_token_s",
        "per_running_request_s",
    ),
    "decode": ("base_s", "per_request_s", "per_kv_token_s", "per_read_token_s"),
    "handoff": ("base_s", "per_token_s"),
}
"""Names of the coefficients, in the order of the features."""

SCALES: Mapping[Phase, tuple[float, ...]] = {
    "prefill": (1.0, 1e3, 1e6, 1e3, 10.0),
    "decode": (1.0, 10.0, 1e4, 10.0),
    "handoff": (1.0, 1e3),
}
"""Typical sizes of the features."""

SHARES: Mapping[Phase, tuple[float, ...]] = {
    "prefill": (0.2, 0.6, 0.0, 0.2, 0.0),  # reading is limited by arithmetic: by the tokens
    "decode": (0.8, 0.1, 0.1, 0.0),  # a step reads all weights whatever it computes
    "handoff": (0.5, 0.5),
}
"""How the first observation of all is shared out."""

OWN_AFTER = 24
"""Observations of a worker until its own model is asked, not that of its kind: about five for each
coefficient."""

PATIENT_AFTER = 256
"""Observations of a worker from which on a part of its requests is enough to follow it."""

ONE_IN = 4
"""Of the requests of such a worker one in so many is learnt from: the others cost nothing."""

MAX_WAITING = 128
"""Records kept until a prediction is asked for; older ones are forgotten. One may hold the gaps of
a long answer, some 10 KiB."""

MAX_WORKERS = 4096
"""Workers with models of their own, as many as a policy may have; the one heard of longest ago goes
first."""

MAX_KINDS = 256

UNBOUNDED_OUTPUT_TOKENS = 256
"""Expected of an answer without a bound: about the mean of chat traffic (Azure's conversation trace
of 2023: 211; ShareGPT: about 200)."""

MOST_OUTPUT_TOKENS = 4096
"""A bound may be any number, and most answers end far below a large one."""

Kind = tuple[str, str]
"""Engine, and the label ``hardware`` or an empty string: workers that start from one model."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One time that was measured.

    Attributes:
        phase: Which model it belongs to.
        worker: Where it was measured; for a handoff the decode worker.
        features: In the order of ``COEFFICIENTS``.
        seconds: The time.
    """

    phase: Phase
    worker: str
    features: tuple[float, ...]
    seconds: float


def kind_of(worker: Worker) -> Kind:
    """Return what a worker's times depend on before it has any of its own."""
    return worker.engine, worker.labels.get("hardware", "")


def expected_output(bound: int | None) -> int:
    """Return the output tokens to expect of a request with this bound, or with none."""
    if bound is None:
        return UNBOUNDED_OUTPUT_TOKENS
    return min(max(1, bound), MOST_OUTPUT_TOKENS)


def queue_share(queued_tokens: int, fleet: FleetView) -> int:
    """Return how many of the tokens that wait at the gateway come before each prefill worker's.

    They are spread evenly over the prefill workers.
    """
    if not queued_tokens:
        return 0
    return -(-queued_tokens // max(1, len(fleet.serving(Role.PREFILL))))


def unread_tokens(profile: RequestProfile, worker: Worker) -> int:
    """Return the prompt tokens that a worker is not believed to hold."""
    return max(0, profile.prompt_tokens - profile.cached_tokens.get(worker.name, 0))


def prefill_features(tokens: float, queued_tokens: float, running: float) -> tuple[float, ...]:
    """Return the features of reading a prompt.

    Args:
        tokens: Prompt tokens that the worker's cache lacks.
        queued_tokens: Prompt tokens that were to be read there before.
        running: Requests in flight there: their steps share the worker with the reading.
    """
    return 1.0, tokens, tokens * tokens, queued_tokens, running


def decode_features(
    requests: float, kv_tokens: float, read_tokens_per_step: float
) -> tuple[float, ...]:
    """Return the features of one decode step.

    Args:
        requests: Requests in the batch, this one included.
        kv_tokens: Tokens of KV that the step attends to, as ``WorkerLoad.kv_tokens`` counts them.
        read_tokens_per_step: Prompt tokens read there between two tokens of an answer.
    """
    return 1.0, requests, kv_tokens, read_tokens_per_step


def observations(record: Mapping[str, object]) -> Iterator[Observation]:
    """Yield the times that a per-request record tells; of a troubled request none.

    - A split request's ``prefill_s`` is the prefill worker's reading. What passes from its answer
      to the first token is the handoff: moving KV and the first decode step. Where the worker
      computed the prompt itself instead, that is what a split costs there.
    - A local request's TTFT, from when it was sent, is its decode worker's reading, among the
      answers that are written there.
    - TPOT is the decode worker's step, with the prompts that were read there meanwhile
      (``decode_read_tokens``) as a feature: its coefficient is what a mixed step costs the others,
      and without it the base would absorb the disturbance.
    - An answer that prefill ended tells of its reading only: there was no handoff.
    - An answer that was not streamed has no TTFT and no TPOT to tell.
    """
    if record.get("outcome") != "ok" or record.get("retries") or record.get("failures"):
        return
    if record.get("hedge") == "won":
        return
    number = _Numbers(record)
    decode = record.get("decode")
    if not isinstance(decode, str) or not record.get("stream"):
        return
    tokens = number("prompt_tokens") or number("prompt_tokens_estimate")
    fresh = max(0.0, tokens - number("prefill_cached_tokens"))
    queued = number("prefill_queued_tokens")
    prefill, prefill_s = record.get("prefill"), number("prefill_s")
    ttft_s = number("ttft_s") - number("sent_s")
    if record.get("route") == "local":
        if ttft_s > 0.0:
            features = prefill_features(fresh, queued, number("decode_requests"))
            yield Observation("prefill", decode, features, ttft_s)
    elif isinstance(prefill, str) and prefill_s > 0.0:
        features = prefill_features(fresh, queued, number("prefill_requests"))
        yield Observation("prefill", prefill, features, prefill_s)
        if ttft_s > 0.0 and not record.get("ended_by_prefill"):
            rest_s = max(0.0, ttft_s - prefill_s)
            yield Observation("handoff", decode, (1.0, _moved(record) or tokens), rest_s)
    tpot_s, written = number("tpot_s"), number("output_tokens")
    if tpot_s > 0.0 and not written:  # nobody told; see ``RequestRecord.tpot_by``
        written = 1.0 + (number("e2e_s") - number("ttft_s")) / tpot_s
    if tpot_s > 0.0 and written > 1.0:
        features = decode_features(
            number("decode_requests") + 1.0,
            number("decode_kv_tokens") + tokens + written / 2.0,
            number("decode_read_tokens") / (written - 1.0),
        )
        yield Observation("decode", decode, features, tpot_s)


def _moved(record: Mapping[str, object]) -> float:
    """Return the tokens whose KV crossed, as far as the decode worker told; else 0."""
    handoff = record.get("handoff")
    moved = handoff.get("tokens_loaded") if isinstance(handoff, Mapping) else None
    return float(moved) if isinstance(moved, (int, float)) else 0.0


class _Numbers:
    """Reads numbers of a record; what is absent or no number is 0."""

    def __init__(self, record: Mapping[str, object]) -> None:
        self._get = record.get

    def __call__(self, key: str) -> float:
        value = self._get(key)
        return float(value) if isinstance(value, (int, float)) else 0.0


class Model:
    """The three regressions of one worker, or of one kind of worker."""

    def __init__(self, *, forgetting: float = FORGETTING) -> None:
        self._of = {
            phase: Regression(SCALES[phase], SHARES[phase], forgetting=forgetting)
            for phase in COEFFICIENTS
        }
        self.reading = 0.0  # prompt tokens read there for each token of an answer, of late
        self.observations = 0

    def __getitem__(self, phase: Phase) -> Regression:
        return self._of[phase]

    def observe(self, seen: Observation) -> None:
        """Take one observation."""
        self.observations += 1
        self._of[seen.phase].observe(seen.features, seen.seconds)
        if seen.phase == "decode":
            self.reading += 0.05 * (seen.features[3] - self.reading)

    def start_from(self, other: Model) -> None:
        """Take the coefficients that ``other`` knows as a start."""
        self.reading = other.reading
        for phase, regression in other._of.items():
            if regression.known:
                self._of[phase].seed(regression.coefficients)


@dataclass(frozen=True, slots=True)
class Fits:
    """What the times of one worker are predicted from; None where nothing is known.

    Attributes:
        worker: As it was when these were looked for.
        prefill: Of reading.
        decode: Of a step.
        handoff: Of taking over.
        own: What was learnt of the worker itself.
    """

    worker: Worker
    prefill: Regression | None
    decode: Regression | None
    handoff: Regression | None
    own: Model | None


class Predictor:
    """Predicts times of workers from what was observed of them.

    A worker starts from the model of its kind (engine and label ``hardware``), to which every
    worker of the kind adds; its own model is asked from ``OWN_AFTER`` observations on, or at once
    where a profile names the worker.

    Attributes:
        lock: To be held around every use, where several threads share it.
    """

    def __init__(self, *, forgetting: float = FORGETTING) -> None:
        self.lock = threading.Lock()
        self._forgetting = forgetting
        self._profiled: set[tuple[str, Phase]] = set()
        self._waiting: deque[Mapping[str, object]] = deque(maxlen=MAX_WAITING)
        self._turn = 0
        self._kinds: dict[str, Kind] = {}
        self._of_kind: OrderedDict[Kind, Model] = OrderedDict()
        self._fits: dict[str, Fits] = {}  # answers of ``fits``, of workers in ``_kinds``
        self._of_worker: OrderedDict[str, Model] = OrderedDict()

    def know(self, worker: Worker) -> None:
        """Note what kind of worker a name stands for."""
        name, kind = worker.name, kind_of(worker)
        before = self._kinds.get(name)
        if before == kind:
            return
        if before is None and len(self._kinds) >= 2 * MAX_WORKERS:
            oldest = next(iter(self._kinds))
            del self._kinds[oldest]
            self._fits.pop(oldest, None)
        if before is not None:  # another worker under an old name
            self._of_worker.pop(name, None)
            self._fits.pop(name, None)
        self._kinds[name] = kind

    def seed_kind(self, kind: Kind, phase: Phase, coefficients: Sequence[float]) -> None:
        """Start a kind of worker from coefficients, unless it has observations of its own."""
        self._fits.clear()
        regression = self._kind_model(kind)[phase]
        if not regression.known:
            regression.seed(coefficients)

    def seed_worker(self, name: str, phase: Phase, coefficients: Sequence[float]) -> None:
        """Start one worker from coefficients, unless it has observations of its own."""
        self._fits.clear()
        regression = self._worker_model(name)[phase]
        if not regression.observations:
            regression.seed(coefficients)
            self._profiled.add((name, phase))

    def observe(self, record: Mapping[str, object]) -> None:
        """Keep how a request ended (see ``observations``), to learn from when somebody asks."""
        self._waiting.append(record)

    def catch_up(self) -> None:
        """Learn from what was observed; to be called before predictions are asked for."""
        waiting = self._waiting
        while waiting:
            record = waiting.popleft()
            self._turn += 1
            decode = self._of_worker.get(str(record.get("decode")))
            patient = decode is not None and decode.observations > PATIENT_AFTER
            if patient and self._turn % ONE_IN:
                continue
            for seen in observations(record):
                self.learn(seen)

    def learn(self, seen: Observation) -> None:
        """Take one observation, for its worker and for the worker's kind."""
        common = self._kind_model(self._kinds.get(seen.worker, ("", "")))
        if common[seen.phase].known:
            self._fits.pop(seen.worker, None)
        else:
            self._fits.clear()  # of this kind nothing could be predicted yet
        self._worker_model(seen.worker).observe(seen)
        common.observe(seen)

    def fits(self, worker: Worker) -> Fits:
        """Return the fits that predictions for a worker come from."""
        fits = self._fits.get(worker.name)
        if fits is None or fits.worker is not worker:
            self.know(worker)  # it may have joined while the gateway runs
            fits = self._fits[worker.name] = Fits(
                worker,
                self._fit(worker, "prefill"),
                self._fit(worker, "decode"),
                self._fit(worker, "handoff"),
                self._of_worker.get(worker.name),
            )
        return fits

    def _fit(self, worker: Worker, phase: Phase) -> Regression | None:
        own = self._of_worker.get(worker.name)
        common = self._of_kind.get(kind_of(worker))
        if own is not None:
            fit = own[phase]
            if fit.observations >= OWN_AFTER or (worker.name, phase) in self._profiled:
                return fit
        if common is not None and common[phase].known:
            return common[phase]
        return own[phase] if own is not None and own[phase].known else None

    def prefill_s(
        self, worker: Worker, load: WorkerLoad, tokens: float, ahead_tokens: int = 0
    ) -> float | None:
        """Return how long a prompt sent now would take to be read, queue included, in seconds.

        Args:
            worker: The worker.
            load: Its load, without this request.
            tokens: Prompt tokens that its cache lacks.
            ahead_tokens: That will be queued there before it, beside those of ``load``.
        """
        fit = self.fits(worker).prefill
        if fit is None:
            return None
        # as fit.predict(prefill_features(...)); a decision predicts a dozen times
        base_s, token_s, squared_s, queued_s, running_s = fit.coefficients
        read_s = base_s + token_s * tokens + squared_s * (tokens * tokens)
        return read_s + queued_s * (load.prompt_tokens + ahead_tokens) + running_s * load.requests

    def step_s(self, worker: Worker, load: WorkerLoad, tokens: float) -> float | None:
        """Return the TPOT of one more request with so many tokens of KV, in seconds.

        The prompts that were read there of late are expected to go on.
        """
        fits = self.fits(worker)
        if fits.decode is None:
            return None
        # as predict(decode_features(...))
        base_s, request_s, kv_s, read_s = fits.decode.coefficients
        reading = 0.0 if fits.own is None else fits.own.reading
        step_s = base_s + request_s * (load.requests + 1) + kv_s * (load.kv_tokens + tokens)
        return step_s + read_s * reading

    def times_s(
        self, profile: RequestProfile, role: Role, workers: Sequence[Worker], fleet: FleetView
    ) -> dict[str, float] | None:
        """Return how long each worker takes for its part of a request; None: one is not measured.

        For prefill that is the reading of what its cache lacks, behind what waits. For decode it
        is the writing, and the reading as well: it may have to do it.
        """
        times_s: dict[str, float] = {}
        reads = role is Role.PREFILL
        ahead = queue_share(profile.queued_tokens, fleet) if reads else 0
        written = expected_output(profile.max_output_tokens)
        held = profile.prompt_tokens + written / 2
        for worker in workers:
            load = fleet.load(worker)
            time_s = self.prefill_s(worker, load, unread_tokens(profile, worker), ahead)
            if not reads:
                step_s = self.step_s(worker, load, held)
                time_s = None if step_s is None else written * step_s + (time_s or 0.0)
            if time_s is None or time_s <= 0.0:
                return None
            times_s[worker.name] = time_s
        return times_s

    def handoff_s(self, decode: Worker, tokens: float) -> float | None:
        """Return the time from the end of reading to the first token elsewhere, in seconds."""
        fit = self.fits(decode).handoff
        if fit is None:
            return None
        base_s, token_s = fit.coefficients
        return base_s + token_s * tokens

    def delay_s(self, worker: Worker, tokens: float) -> float:
        """Return by how much reading a prompt delays each answer that is written there, in seconds.

        Measured where answers were disturbed; else the time of the reading itself: a step that
        also reads takes about as much longer.
        """
        fits = self.fits(worker)
        if fits.decode is not None and fits.decode.coefficients[3] > 0.0:
            return fits.decode.coefficients[3] * tokens
        if fits.prefill is None:
            return 0.0
        _, token_s, squared_s, _, _ = fits.prefill.coefficients
        return token_s * tokens + squared_s * (tokens * tokens)

    def _worker_model(self, name: str) -> Model:
        model = self._of_worker.get(name)
        if model is None:
            model = self._of_worker[name] = Model(forgetting=self._forgetting)
            common = self._of_kind.get(self._kinds.get(name, ("", "")))
            if common is not None:
                model.start_from(common)
            if len(self._of_worker) > MAX_WORKERS:
                gone, _ = self._of_worker.popitem(last=False)
                self._fits.pop(gone, None)
        else:
            self._of_worker.move_to_end(name)
        return model

    def _kind_model(self, kind: Kind) -> Model:
        model = self._of_kind.get(kind)
        if model is None:
            model = self._of_kind[kind] = Model(forgetting=self._forgetting)
            if len(self._of_kind) > MAX_KINDS:
                self._of_kind.popitem(last=False)
                self._fits.clear()
        return model
