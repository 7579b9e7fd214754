"""``disagg explain REQUEST_ID``: which plugins said what, and why the request went that way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from disagg_plugins.cli.common import add_gateway, gateway_url, say
from disagg_plugins.cli.environment import get_json

if TYPE_CHECKING:
    import argparse

Step = Mapping[str, Any]


class ExplainCommand:
    """Asks a running gateway about one of its last requests."""

    name = "explain"
    help = "tell why a request went where it went"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the request's id and where the gateway is."""
        parser.add_argument(
            "request_id", metavar="REQUEST_ID", help="X-Request-Id of its answer or its record"
        )
        add_gateway(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print what the gateway knows; 1 when it knows nothing."""
        gateway = gateway_url(args)
        path = f"/internal/explain?id={quote(args.request_id, safe='')}"
        try:
            status, answer = get_json(gateway, path)
        except (OSError, HTTPException, ValueError) as problem:
            say(f"{gateway} does not answer: {problem}; start it, or give --policy or --gateway")
            return 1
        if status != 200 or not isinstance(answer, dict) or "steps" not in answer:
            error = answer.get("error") if isinstance(answer, dict) else None
            why = error.get("message") if isinstance(error, dict) else None
            say(str(why or f"{gateway} answered {status}, not as a gateway does"))
            return 1
        print("\n".join(lines(answer)))
        return 0


def lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the gateway answered in words."""
    profile = answer["profile"]
    yield f"request {answer['request_id']}"
    bound = profile.get("max_output_tokens")
    yield (
        f"  {profile['endpoint']}, {profile['prompt_tokens']} prompt tokens "
        f"({profile['tokens_by']}), output bound {bound if bound is not None else 'none'}"
        + (f", SLO class {profile['slo_class']}" if profile.get("slo_class") else "")
        + (f", cannot be split: {profile['unsplittable']}" if profile.get("unsplittable") else "")
    )
    role = None
    steps: Sequence[Step] = answer["steps"]
    for step in steps:
        if step.get("role") != role:
            role = step.get("role")
            if role is not None:
                yield f"worker for {role}"
        yield from _SAYS.get(step["step"], _plain)(step)
    route = answer["route"]
    if "refused" in route:
        yield f"refused: {route['refused']}"
    elif "prefill" in route:
        yield f"route: prefill on {route['prefill']}, decode on {route['decode']}: {route['why']}"
    else:
        yield f"route: all on {route['decode']}: {route['why']}"
    if isinstance(answer.get("record"), dict):
        yield from _ended(answer["record"])


def _ended(record: Mapping[str, Any]) -> Iterator[str]:
    if not record.get("outcome"):
        yield "it is still running"
        return
    times = [
        f"{word} {record[key]:.3f} s"
        for word, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("in all", "e2e_s"))
        if record.get(key) is not None
    ]
    yield f"ended: {record['outcome']} ({record['status']}){''.join(f', {t}' for t in times)}"
    if record.get("handoff"):
        yield _handoff(record["handoff"], record)
    for failure in record.get("failures") or ():
        yield "failed: {worker}, {side}, {kind}: {detail}".format(**failure)


def _handoff(handoff: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    if record.get("ended_by_prefill"):
        return "handoff: none was needed, prefill ended the answer"
    if handoff["outcome"] == "unobserved":
        return (
            "handoff: carried by the engine's own transport, which nobody here observes; decode "
            "answered to the parameters of prefill"
        )
    return (
        f"handoff: {handoff['outcome']}, {handoff['tokens_loaded']} tokens loaded by "
        f"{handoff.get('transport') or 'nothing'}; split happened: {record['split']}"
    )


def _admission(step: Step) -> Iterator[str]:
    for plugin, said in step["said"].items():
        yield f"  {plugin} refuses: {said['refused']} (retry after {said['retry_after_s']:g} s)"


def _split(step: Step) -> Iterator[str]:
    for plugin, said in step["said"].items():
        yield f"{plugin} says {'split' if said['split'] else 'do not split'}: {said['reason']}"


def _named(words: str) -> Any:
    def say_it(step: Step) -> Iterator[str]:
        for plugin, said in step["said"].items():
            yield f"  {plugin} {words} {', '.join(map(str, said)) or 'nobody'}"

    return say_it


def _scores(step: Step) -> Iterator[str]:
    for plugin, said in step["said"].items():
        marks = "  ".join(f"{name} {score:.3f}" for name, score in said.items())
        yield f"  {plugin if step['step'] == 'score' else 'combined':20} {marks}"


def _chosen(step: Step) -> Iterator[str]:
    for plugin, said in step["said"].items():
        yield f"  {plugin} takes {said}" if step["step"] == "select" else f"  chosen: {said}"


def _plain(step: Step) -> Iterator[str]:
    yield f"  {step['step']}: {step['said']}"


_SAYS = {
    "admission": _admission,
    "split": _split,
    "nominate": _named("nominates"),
    "filter": _named("leaves"),
    "score": _scores,
    "combined": _scores,
    "select": _chosen,
    "chosen": _chosen,
}
