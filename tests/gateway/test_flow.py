"""Every order of events that a request can see, as scripts."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import pytest

from disagg_plugins.errors import LocalProtocolError
from disagg_plugins.gateway.dialect import Published
from disagg_plugins.gateway.flow import (
    NOT_BEGUN,
    Adopt,
    AllSaid,
    AnswerError,
    AnswerVerbatim,
    BreakAnswer,
    Cancel,
    ClientGone,
    Command,
    CompleteAnswer,
    ContinueAnswer,
    CutOff,
    DecodeEnded,
    DecodeFailed,
    DecodeRejected,
    DecodeStarted,
    Event,
    Finish,
    Flow,
    HedgeAnswers,
    Note,
    NotResumable,
    NoWorker,
    PrefillAnswered,
    PrefillFailed,
    PrefillRejected,
    Resume,
    SendDecode,
    SendLocal,
    SendPrefill,
    StartAnswer,
    Started,
    State,
)
from disagg_plugins.testing.script import Script

if TYPE_CHECKING:
    from disagg_plugins.types import Family

PARAMS = Published(9, ({},))
NOT_OURS = (404, 408, 429)


def script() -> Script[Event, Command]:
    return Script(Flow())


def relay() -> Script[Event, Command]:
    return script().on(Started("relay")).expect(SendPrefill())


def decoding() -> Script[Event, Command]:
    return relay().on(PrefillAnswered(PARAMS)).expect(SendDecode(PARAMS))


def local() -> Script[Event, Command]:
    return script().on(Started(None)).expect(SendLocal())


def rendezvous() -> Script[Event, Command]:
    return script().on(Started("rendezvous")).expect(SendPrefill(), SendDecode(None))


def streaming() -> Script[Event, Command]:
    return decoding().on(DecodeStarted()).expect(StartAnswer())


def test_relay_calls_prefill_then_decode_then_streams() -> None:
    streaming().on(DecodeEnded()).expect(CompleteAnswer(), Finish("ok"))


def test_what_prefill_has_ended_is_answered_and_nobody_decodes() -> None:
    answer: dict[str, object] = {"choices": []}
    ended = PrefillAnswered(Published(9, (), answer=answer))
    relay().on(ended).expect(AnswerVerbatim("prefill", answer), Finish("ok"))


def resuming(resumes: int = 1) -> Script[Event, Command]:
    begun = Script(Flow(resumes)).on(Started(None)).expect(SendLocal())
    return (
        begun.on(DecodeStarted()).expect(StartAnswer())
        .on(DecodeFailed("closed", "why"))
        .expect(Note("decode", "closed", "why"), Cancel("decode"), Resume())
    )  # fmt: skip


def test_stream_whose_worker_fails_goes_on_and_completes() -> None:
    resumed = resuming().on(DecodeStarted()).expect(ContinueAnswer())
    resumed.on(DecodeEnded()).expect(CompleteAnswer(), Finish("ok"))


def test_stream_that_was_all_said_is_completed() -> None:
    resuming().on(AllSaid()).expect(CompleteAnswer(), Finish("ok"))


def test_stream_that_cannot_go_on_breaks_off_and_says_why() -> None:
    message = "the answer broke off: why; it was not resumed: a stop"
    resuming().on(NotResumable("a stop")).expect(
        Cancel("decode"), BreakAnswer(message), Finish("broken")
    )


def test_next_worker_that_refuses_counts_as_a_resume() -> None:
    note = Note("decode", "http_500", "a decode worker answered 500")
    once, twice = resuming(1), resuming(2)
    once.on(DecodeRejected(500)).expect(
        note,
        Cancel("decode"),
        BreakAnswer("the answer broke off: a decode worker answered 500"),
        Finish("broken"),
    )
    twice.on(DecodeRejected(500)).expect(note, Cancel("decode"), Resume())


def test_client_gone_while_the_next_worker_is_asked_cancels_it() -> None:
    resuming().on(ClientGone()).expect(Cancel("decode"), Finish("client_gone"))


def test_local_makes_one_call() -> None:
    (
        local()
        .on(DecodeStarted()).expect(StartAnswer())
        .on(DecodeEnded()).expect(CompleteAnswer(), Finish("ok"))
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["refused", "timeout", "closed", "garbage", "no_handoff"])
def test_prefill_failure_lets_decode_compute_the_prompt(kind: str) -> None:
    failed = relay().on(PrefillFailed(kind, "why"))
    failed.expect(Note("prefill", kind, "why"), Cancel("prefill"), SendLocal())
    assert isinstance(failed.machine, Flow)
    assert failed.machine.fell_back == f"prefill {kind}"
    failed.on(DecodeStarted()).expect(StartAnswer())


@pytest.mark.parametrize("status", [*NOT_OURS, 500, 502, 503])
def test_prefill_status_that_is_not_the_clients_fault_falls_back(status: int) -> None:
    relay().on(PrefillRejected(status)).expect(
        Note("prefill", f"http_{status}", f"the prefill worker answered {status}"),
        Cancel("prefill"),
        SendLocal(),
    )


@pytest.mark.parametrize("status", [400, 401, 403, 413, 422])
def test_prefill_validation_error_is_the_clients(status: int) -> None:
    relay().on(PrefillRejected(status)).expect(AnswerVerbatim("prefill"), Finish("rejected"))


def test_decode_failure_with_handoff_retries_elsewhere_or_here_without_it() -> None:
    (
        decoding()
        .on(DecodeFailed("closed", "why"))
        .expect(
            Note("decode", "closed", "why"),
            Cancel("decode"),
            SendLocal(elsewhere=True, else_same=True),
        )
        .on(DecodeStarted()).expect(StartAnswer())
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "status"), [("refused", 503), ("timeout", 504), ("closed", 502)])
def test_second_decode_failure_is_a_clear_error(kind: str, status: int) -> None:
    (
        local()
        .on(DecodeFailed(kind, "one"))
        .expect(Note("decode", kind, "one"), Cancel("decode"), SendLocal(elsewhere=True))
        .on(DecodeFailed(kind, "two"))
        .expect(
            Note("decode", kind, "two"),
            Cancel("decode"),
            AnswerError(status, "no worker could answer: two", kind),
            Finish("error"),
        )
    )


def test_no_other_worker_ends_with_the_first_failure() -> None:
    (
        local()
        .on(DecodeFailed("refused", "nobody listens"))
        .expect(
            Note("decode", "refused", "nobody listens"),
            Cancel("decode"),
            SendLocal(elsewhere=True),
        )
        .on(NoWorker())
        .expect(
            AnswerError(503, "no worker could answer: nobody listens", "refused"), Finish("error")
        )
    )


def test_decode_4xx_after_an_accepted_prefill_is_retried_here_without_the_handoff() -> None:
    (
        decoding()
        .on(DecodeRejected(422))
        .expect(
            Note("decode", "http_422", "the decode worker answered 422"),
            Cancel("decode"),
            SendLocal(elsewhere=False, else_same=True),
        )
        .on(DecodeRejected(422)).expect(AnswerVerbatim("decode"), Finish("rejected"))
    )  # fmt: skip


def test_local_4xx_is_the_clients() -> None:
    local().on(DecodeRejected(400)).expect(AnswerVerbatim("decode"), Finish("rejected"))


def test_local_500_twice_is_502() -> None:
    (
        local()
        .on(DecodeRejected(500))
        .expect(
            Note("decode", "http_500", "the decode worker answered 500"),
            Cancel("decode"),
            SendLocal(elsewhere=True),
        )
        .on(DecodeRejected(500))
        .expect(
            Note("decode", "http_500", "the decode worker answered 500"),
            AnswerError(502, "no worker could answer: the decode worker answered 500", "http_500"),
            Finish("error"),
        )
    )


def test_overloaded_twice_passes_the_workers_own_words() -> None:
    (
        local()
        .on(DecodeRejected(429))
        .expect(
            Note("decode", "http_429", "the decode worker answered 429"),
            Cancel("decode"),
            SendLocal(elsewhere=True),
        )
        .on(DecodeRejected(429))
        .expect(
            Note("decode", "http_429", "the decode worker answered 429"),
            AnswerVerbatim("decode"),
            Finish("rejected"),
        )
    )


@pytest.mark.parametrize("kind", ["closed", "timeout", "truncated", "garbage"])
def test_failure_inside_the_stream_breaks_it_and_never_retries(kind: str) -> None:
    streaming().on(DecodeFailed(kind, "why")).expect(
        Note("decode", kind, "why"),
        Cancel("decode"),
        BreakAnswer("the answer broke off: why"),
        Finish("broken"),
    )


def test_client_gone_during_prefill_cancels_prefill() -> None:
    relay().on(ClientGone()).expect(Cancel("prefill"), Finish("client_gone"))


def test_client_gone_before_the_first_byte_cancels_decode() -> None:
    decoding().on(ClientGone()).expect(Cancel("decode"), Finish("client_gone"))


def test_client_gone_inside_the_stream_cancels_decode() -> None:
    streaming().on(ClientGone()).expect(Cancel("decode"), Finish("client_gone"))


def test_client_gone_during_rendezvous_cancels_both() -> None:
    rendezvous().on(ClientGone()).expect(Cancel("prefill"), Cancel("decode"), Finish("client_gone"))


def test_rendezvous_in_the_usual_order() -> None:
    (
        rendezvous()
        .on(PrefillAnswered(None)).expect()
        .on(DecodeStarted()).expect(StartAnswer())
        .on(DecodeEnded()).expect(CompleteAnswer(), Finish("ok"))
    )  # fmt: skip


def test_rendezvous_decode_may_overtake_prefill() -> None:
    (
        rendezvous()
        .on(DecodeStarted()).expect(StartAnswer())
        .on(PrefillAnswered(None)).expect()
        .on(DecodeEnded()).expect(CompleteAnswer(), Finish("ok"))
    )  # fmt: skip


def test_rendezvous_ends_prefill_that_is_still_open() -> None:
    (
        rendezvous()
        .on(DecodeStarted()).expect(StartAnswer())
        .on(DecodeEnded()).expect(Cancel("prefill"), CompleteAnswer(), Finish("ok"))
    )  # fmt: skip


def test_rendezvous_prefill_failure_cancels_the_waiting_decode() -> None:
    rendezvous().on(PrefillFailed("closed", "why")).expect(
        Note("prefill", "closed", "why"), Cancel("prefill"), Cancel("decode"), SendLocal()
    )


def test_rendezvous_prefill_validation_error_cancels_decode() -> None:
    rendezvous().on(PrefillRejected(400)).expect(
        Cancel("decode"), AnswerVerbatim("prefill"), Finish("rejected")
    )


def test_rendezvous_decode_failure_cancels_prefill() -> None:
    rendezvous().on(DecodeFailed("closed", "why")).expect(
        Note("decode", "closed", "why"),
        Cancel("decode"),
        Cancel("prefill"),
        SendLocal(elsewhere=True, else_same=True),
    )


def test_rendezvous_decode_4xx_that_nobody_else_can_try_is_the_clients() -> None:
    (
        rendezvous()
        .on(DecodeRejected(400))
        .expect(
            Note("decode", "http_400", "the decode worker answered 400"),
            Cancel("decode"),
            Cancel("prefill"),
            SendLocal(elsewhere=False, else_same=True),
        )
        .on(NoWorker())
        .expect(AnswerVerbatim("decode"), Finish("rejected"))
    )


def test_rendezvous_decode_429_that_nobody_else_can_try_is_an_error() -> None:
    (
        rendezvous()
        .on(DecodeRejected(429))
        .expect(
            Note("decode", "http_429", "the decode worker answered 429"),
            Cancel("decode"),
            Cancel("prefill"),
            SendLocal(elsewhere=True, else_same=True),
        )
        .on(NoWorker())
        .expect(
            AnswerError(502, "no worker could answer: the decode worker answered 429", "http_429"),
            Finish("error"),
        )
    )


def test_rendezvous_prefill_failure_after_decode_began_is_only_noted() -> None:
    (
        rendezvous()
        .on(DecodeStarted()).expect(StartAnswer())
        .on(PrefillFailed("closed", "why")).expect(Note("prefill", "closed", "why"))
        .on(DecodeEnded()).expect(CompleteAnswer(), Finish("ok"))
    )  # fmt: skip


@pytest.mark.parametrize("family", [None, "relay", "rendezvous"])
def test_deadline_before_the_answer_is_an_error_that_blames_nobody(family: Family | None) -> None:
    flow = Flow()
    flow.on(Started(family))
    *cancelled, error, finish = flow.on(CUT)
    assert all(isinstance(command, Cancel) for command in cancelled)
    assert isinstance(error, AnswerError)
    assert (error.status, error.code) == (504, "deadline_exceeded")
    assert error.message == "too late"
    assert finish == Finish("deadline")


def test_deadline_inside_the_answer_breaks_it_off_and_nobody_goes_on() -> None:
    flow = resuming().machine
    commands = flow.on(CUT)
    assert isinstance(commands[-2], BreakAnswer)
    assert (commands[-2].status, commands[-2].code) == (504, "deadline_exceeded")
    assert commands[-1] == Finish("deadline")


@pytest.mark.parametrize("family", [None, "relay", "rendezvous"])
def test_hedge_that_speaks_first_ends_all_other_calls(family: Family | None) -> None:
    flow = Flow()
    opened = flow.on(Started(family))
    *cancelled, adopted = flow.on(HedgeAnswers())
    assert len(cancelled) == len(opened)
    assert all(isinstance(command, Cancel) for command in cancelled)
    assert adopted == Adopt()
    assert flow.on(DecodeStarted()) == [StartAnswer()]
    assert flow.on(DecodeEnded()) == [CompleteAnswer(), Finish("ok")]


def test_hedge_that_fails_after_it_spoke_is_retried_like_any_other() -> None:
    flow = Flow()
    flow.on(Started(None))
    flow.on(HedgeAnswers())
    assert SendLocal(elsewhere=True) in flow.on(DecodeFailed("closed", ""))


def test_event_that_cannot_happen_is_our_bug() -> None:
    with pytest.raises(LocalProtocolError, match="DecodeEnded"):
        Flow().on(DecodeEnded())


def test_nothing_happens_after_the_end() -> None:
    ended = streaming().on(DecodeEnded()).expect(CompleteAnswer(), Finish("ok"))
    ended.on(ClientGone()).expect()
    ended.on(DecodeFailed("closed", "late")).expect()


CUT = CutOff("too late", 504, "deadline_exceeded", "deadline")

EVENTS: tuple[Event, ...] = (
    PrefillAnswered(PARAMS),
    PrefillRejected(400),
    PrefillRejected(500),
    PrefillFailed("closed", ""),
    DecodeStarted(),
    DecodeEnded(),
    DecodeRejected(400),
    DecodeRejected(500),
    DecodeFailed("timeout", ""),
    NotResumable("no other worker"),
    AllSaid(),
    ClientGone(),
    CUT,
    HedgeAnswers(),
)


class Executor:
    """Holds the calls that commands opened; says which events are possible."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.finished = 0
        self.started = self.closed = self.continued = 0
        self.hedged = False

    def run(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case SendPrefill():
                    self.open.add("prefill")
                case SendDecode() | SendLocal() | Resume():
                    assert "decode" not in self.open
                    self.open.add("decode")
                case Adopt():
                    assert "decode" not in self.open
                    self.open.add("decode")
                    self.hedged = True
                case Cancel(side):
                    self.open.discard(side)
                case StartAnswer():
                    self.started += 1
                case ContinueAnswer():
                    self.continued += 1
                case CompleteAnswer() | BreakAnswer():
                    self.closed += 1
                case AnswerVerbatim() | AnswerError():
                    self.started += 1
                    self.closed += 1
                case Finish():
                    self.finished += 1
                case _:
                    pass

    def possible(self, event: Event, state: State) -> bool:
        match event:
            case PrefillAnswered() | PrefillRejected() | PrefillFailed():
                return "prefill" in self.open
            case DecodeEnded():
                return "decode" in self.open and state is State.STREAM
            case DecodeStarted() | DecodeRejected():
                return "decode" in self.open and state is not State.STREAM
            case DecodeFailed():
                return "decode" in self.open
            case NotResumable():  # at once, or when the next worker contradicts the first
                return state is State.RESUME or (state is State.STREAM and self.continued > 0)
            case AllSaid():
                return state is State.RESUME
            case HedgeAnswers():
                return state in NOT_BEGUN and not self.hedged
        return True

    def over(self, event: Event) -> None:
        match event:
            case PrefillAnswered() | PrefillRejected() | PrefillFailed():
                self.open.discard("prefill")
            case DecodeEnded() | DecodeRejected() | DecodeFailed() | NotResumable() | AllSaid():
                self.open.discard("decode")
            case _:
                pass


@pytest.mark.parametrize("seed", range(20))
def test_every_order_ends_once_with_no_call_left_open(seed: int) -> None:
    rng = random.Random(seed)
    for family, _ in itertools.product((None, "relay", "rendezvous"), range(150)):
        resumes = rng.randrange(3)
        flow, executor = Flow(resumes), Executor()
        executor.run(flow.on(Started(family)))  # type: ignore[arg-type]
        for _ in range(50):
            if flow.state is State.DONE:
                break
            event = rng.choice([e for e in EVENTS if executor.possible(e, flow.state)])
            gone = isinstance(event, ClientGone)
            executor.over(event)
            executor.run(flow.on(event))
        assert flow.state is State.DONE
        assert executor.finished == 1
        assert not executor.open
        assert executor.started <= 1
        assert flow.retries <= 1
        assert flow.resumes == executor.continued <= resumes
        if not gone:
            assert executor.started == executor.closed == 1
