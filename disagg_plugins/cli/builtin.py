"""The built-in subcommands and checks, offered through the same hooks as everybody else's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.cli.checks import Check
    from disagg_plugins.cli.command import Command


@hookimpl
def disagg_register_commands() -> Sequence[Command]:
    """Offer the subcommands of this folder."""
    from disagg_plugins.cli.bench import BenchCommand
    from disagg_plugins.cli.canary import CanaryCommand
    from disagg_plugins.cli.demo import DemoCommand
    from disagg_plugins.cli.doctor import DoctorCommand
    from disagg_plugins.cli.explain import ExplainCommand
    from disagg_plugins.cli.fleet import FleetCommand
    from disagg_plugins.cli.plugins import PluginsCommand
    from disagg_plugins.cli.policy import PolicyCommand
    from disagg_plugins.cli.profile import ProfileCommand
    from disagg_plugins.cli.serve import ServeCommand
    from disagg_plugins.cli.top import TopCommand
    from disagg_plugins.cli.up import UpCommand
    from disagg_plugins.cli.version import VersionCommand

    return [
        BenchCommand(),
        CanaryCommand(),
        DemoCommand(),
        DoctorCommand(),
        FleetCommand(),
        ExplainCommand(),
        PluginsCommand(),
        PolicyCommand(),
        ProfileCommand(),
        ServeCommand(),
        TopCommand(),
        UpCommand(),
        VersionCommand(),
    ]


@hookimpl
def disagg_register_checks() -> Sequence[Check]:
    """Offer the checks of this machine and of the policy that no engine knows of."""
    from disagg_plugins.cli.environment import EnvironmentCheck, WorkersCheck

    return [EnvironmentCheck(), WorkersCheck()]
