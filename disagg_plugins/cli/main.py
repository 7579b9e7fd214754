"""The entry point of ``disagg``: finds the subcommands, runs one, turns errors into one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING, TextIO

from disagg_plugins import __version__
from disagg_plugins.cli import logs
from disagg_plugins.errors import ConfigError, DisaggError
from disagg_plugins.plugins import PluginHost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from disagg_plugins.cli.command import Command

EXIT_FAILED = 1
EXIT_CONFIG = 2
"""Also argparse's own code for a wrong command line."""

EXIT_INTERNAL = 70
"""EX_SOFTWARE of sysexits.h: a bug here or in a plugin."""

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def build_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser with one subparser a command."""
    parser = argparse.ArgumentParser(
        prog="disagg",
        description="One disaggregation policy for many engines: prefill here, decode there.",
    )
    parser.add_argument("--version", action="version", version=f"disagg-plugins {__version__}")
    _add_common(parser, default=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in sorted(commands.items()):
        sub = subparsers.add_parser(name, help=command.help, description=command.help)
        # Taken after the subcommand too; SUPPRESS keeps what stood before it.
        _add_common(sub, default=argparse.SUPPRESS)
        command.configure(sub)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, default: object) -> None:
    parser.add_argument(
        "--debug",
        action="store_true",
        default=default,
        help="show tracebacks, and log everything",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    logs.set_up()
    host = PluginHost.load()
    try:
        commands = host.commands()
        args = build_parser(commands).parse_args(argv)
        if args.debug:
            logging.getLogger().setLevel(logging.DEBUG)
        return _run(commands[args.command], args, sys.stderr)
    finally:
        host.close()


def _run(command: Command, args: argparse.Namespace, errors: TextIO) -> int:
    try:
        return command.run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`disagg ... | head`): no more output, no traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as raised:
        if args.debug:
            traceback.print_exc(file=errors)
        problem = _innermost(raised)
        if isinstance(problem, DisaggError):
            print(f"disagg: error: {problem}", file=errors)
            return EXIT_CONFIG if isinstance(problem, ConfigError) else EXIT_FAILED
        hint = "" if args.debug else " (--debug shows where)"
        print(f"disagg: internal error: {type(problem).__name__}: {problem}{hint}", file=errors)
        return EXIT_INTERNAL


def _innermost(problem: Exception) -> Exception:
    """Return the one error inside groups of one, which task groups wrap around it."""
    while isinstance(problem, ExceptionGroup) and len(problem.exceptions) == 1:
        problem = problem.exceptions[0]
    return problem


if __name__ == "__main__":
    raise SystemExit(main())
