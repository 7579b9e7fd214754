"""``disagg fleet``: lists, adds, drains and removes workers of a running gateway, and moves roles.

Each command names the policy, for the gateway's address and the secret that signs.
"""

from __future__ import annotations

import argparse
import json
import time
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from disagg_plugins.cli.common import (
    ARMS,
    add_arm,
    add_policy,
    no_such_arm,
    of_arm,
    positive_int,
    read_policy,
    say,
)
from disagg_plugins.errors import ConfigError, TransportError
from disagg_plugins.types import Role

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = "/internal/workers"
ANSWER_S = 10.0
MAX_ANSWER_BYTES = 64 << 20
"""A fleet of 16,384 workers is told in about 16 MiB."""

POLL_S = 0.2
"""Between two looks whether a worker has left."""

NOT_LASTING = (
    "a worker that is added so is gone when the gateway restarts: one that is to last stands in "
    "the policy, or in the file that fleet.watch names"
)
"""Told to whoever adds a worker."""


class Admin:
    """Speaks with one gateway.

    Args:
        url: Its address, ``http://host:port``.
        secret: The fleet's secret.
        arm: Of a canary, whose fleet.
    """

    def __init__(self, url: str, secret: bytes, arm: str = ARMS[0]) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise ConfigError(f"{url!r} is not of the form http://host:port", key="--gateway")
        self._url, self._host, self._port = url, parts.hostname, parts.port
        self._secret, self._arm = secret, arm

    def ask(self, method: str, name: str = "", body: object = None) -> tuple[int, Any]:
        """Return status and answer of a signed request about one worker, or all.

        Raises:
            TransportError: See ``ask_at``.
        """
        path = f"{PATH}/{quote(name, safe='')}" if name else PATH
        return self.ask_at(method, of_arm(path, self._arm), body)

    def check_arm(self) -> None:
        """Make sure that the arm is there: a gateway without one would answer for its only fleet.

        Raises:
            ConfigError: It is not.
            TransportError: See ``ask_at``.
        """
        if self._arm == ARMS[0]:
            return
        status, answer = self.ask_at("GET", of_arm("/internal/status", self._arm))
        if status != 200 or not isinstance(answer, dict):
            raise ConfigError(f"the gateway answered {status} to the question for its {self._arm}")
        if (problem := no_such_arm(answer, self._arm)) is not None:
            raise ConfigError(problem, key="--arm")

    def ask_at(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Return status and answer of a signed request.

        Raises:
            TransportError: Nobody answers, or not with JSON.
        """
        from disagg_plugins.gateway.admin import signed_headers
        from disagg_plugins.telemetry.reports import SIGNATURE_HEADER, report_key, sign

        raw = b"" if body is None else json.dumps(body).encode()
        now_s = time.time()
        if method == "GET":
            headers = {SIGNATURE_HEADER: sign(report_key(self._secret), raw, now_s)}
        else:
            headers = signed_headers(self._secret, method, path, raw, now_s)
        connection = HTTPConnection(self._host, self._port, timeout=ANSWER_S)
        try:
            connection.request(method, path, raw, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read(MAX_ANSWER_BYTES))
        except (OSError, HTTPException, ValueError) as exc:
            raise TransportError("gateway", f"{self._url} does not answer: {exc}") from exc
        finally:
            connection.close()

    def must(self, method: str, name: str = "", body: object = None) -> Any:
        """Return the answer of a request that has to succeed.

        Raises:
            ConfigError: The gateway refused it; tells why.
            TransportError: See ``ask``.
        """
        status, answer = self.ask(method, name, body)
        if status >= 400:
            error = answer.get("error") if isinstance(answer, dict) else None
            why = error.get("message") if isinstance(error, dict) else answer
            raise ConfigError(f"the gateway answered {status}: {why}")
        return answer


class FleetCommand:
    """Changes the fleet of a running gateway."""

    name = "fleet"
    help = "list, add, drain and remove workers of a running gateway, and move their roles"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the actions."""
        actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
        self._action(actions, "list", "list the workers", _list)
        add = self._action(actions, "add", "add a worker until the gateway ends", _add, worker=True)
        add.epilog = NOT_LASTING
        add.add_argument("--url", required=True, help="http://host:port of its server")
        add.add_argument("--role", required=True, choices=[str(role) for role in Role])
        add.add_argument("--engine", default=None, help="default: vllm")
        add.add_argument("--capacity", type=positive_int, default=None, help="requests at once")
        add.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", type=_label)
        add.add_argument("--role-switch", action="store_true", help="its server can switch roles")
        drain = self._action(actions, "drain", "give a worker nothing new", _drain, worker=True)
        drain.add_argument("--undo", action="store_true", help="let it take requests again")
        remove = self._action(
            actions, "remove", "drain a worker and let it go", _remove, worker=True
        )
        remove.add_argument("--wait", action="store_true", help="return when it has left")
        role = self._action(actions, "role", "use a worker for another role", _role, worker=True)
        role.add_argument("role", choices=[str(role) for role in Role])

    def _action(
        self,
        actions: Any,
        name: str,
        text: str,
        do: Callable[[Admin, argparse.Namespace], int],
        *,
        worker: bool = False,
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = actions.add_parser(name, help=text)
        add_policy(parser)
        if worker:
            parser.add_argument("worker", metavar="WORKER", help="the worker's name")
        parser.add_argument("--gateway", metavar="URL", help="default: where the policy says")
        add_arm(parser)
        parser.set_defaults(do=do)
        return parser

    def run(self, args: argparse.Namespace) -> int:
        """Do one action."""
        loaded = read_policy(args.policy)
        gateway = loaded.policy.gateway
        url = args.gateway or f"http://{gateway.advertise_host or gateway.host}:{gateway.port}"
        args.drain_s = gateway.drain_s
        admin = Admin(url, loaded.secret(), args.arm)
        admin.check_arm()
        code: int = args.do(admin, args)
        return code


def _list(admin: Admin, args: argparse.Namespace) -> int:
    for worker in admin.must("GET")["workers"]:
        print(_line(worker))
    return 0


def _line(worker: dict[str, Any]) -> str:
    flags = [word for word in ("leaving", "draining", "trial", "kept") if worker.get(word)]
    health = "healthy" if worker["healthy"] else f"ill ({worker['reason']})"
    return (
        f"{worker['name']} {worker['url']} {worker['engine']} {worker['role']} "
        f"{worker['requests']}/{worker['capacity']} {' '.join([health, *flags])}"
    )


def _add(admin: Admin, args: argparse.Namespace) -> int:
    given = {
        "name": args.worker,
        "url": args.url,
        "role": args.role,
        "engine": args.engine,
        "capacity": args.capacity,
        "labels": dict(args.label) or None,
        "role_switch": args.role_switch or None,
    }
    admin.must("POST", body={key: value for key, value in given.items() if value is not None})
    say(f"worker {args.worker} joined; it takes requests once it answers a health probe")
    say(NOT_LASTING)
    return 0


def _drain(admin: Admin, args: argparse.Namespace) -> int:
    worker = admin.must("POST", args.worker, {"drain": not args.undo})
    say(_line(worker))
    return 0


def _remove(admin: Admin, args: argparse.Namespace) -> int:
    worker = admin.must("DELETE", args.worker)
    say(f"worker {args.worker} drains: {worker['requests']} requests in flight")
    if not args.wait:
        return 0
    end_s = time.monotonic() + args.drain_s + ANSWER_S
    while time.monotonic() < end_s:
        if admin.ask("GET", args.worker)[0] == 404:
            say(f"worker {args.worker} has left")
            return 0
        time.sleep(POLL_S)
    say(f"worker {args.worker} has not left within {args.drain_s + ANSWER_S:g} s")
    return 1


def _role(admin: Admin, args: argparse.Namespace) -> int:
    worker = admin.must("POST", args.worker, {"role": args.role})
    done = worker["role"] == args.role
    say(f"worker {args.worker} {'is' if done else 'drains and becomes'} {args.role}")
    return 0


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text} is not of the form KEY=VALUE")
    return key, value
