"""``disagg profile RECORDS``: how fast the workers are, from the records of a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.cli.common import positive_int, read_policy, say
from disagg_plugins.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

MAX_LINE_BYTES = 1 << 20
"""A record is about 1 KiB; of a longer line nothing is kept."""

DEFAULT_RECORDS = 100_000
"""Records read unless told otherwise: about 100 MiB of memory."""


class ProfileCommand:
    """Fits a profile to records and prints it as YAML, for ``scheduler.profile`` of a policy."""

    name = "profile"
    help = "fit a profile of the workers to a gateway's records and print it as YAML"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the records and what to make of them."""
        parser.add_argument(
            "records", type=Path, help="JSON lines (telemetry.records of the policy)"
        )
        parser.add_argument(
            "--policy",
            type=Path,
            metavar="POLICY",
            help="fit its workers by engine and label `hardware`, not each for itself",
        )
        parser.add_argument(
            "--limit",
            type=positive_int,
            default=DEFAULT_RECORDS,
            metavar="N",
            help="read the first N only (default: %(default)s)",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Print the profile; exit with 1 when the records tell too little."""
        from disagg_plugins.scheduling.prediction import kind_of
        from disagg_plugins.scheduling.profile_file import profile_text
        from disagg_plugins.scheduling.profile_fit import ProfileFit

        kinds = {}
        if args.policy is not None:
            workers = [w.worker() for w in read_policy(args.policy).policy.fleet.workers]
            kinds = {w.name: kind_of(w) for w in workers}
        fit = ProfileFit(kinds)
        total = told = 0
        for record in records_of(args.records.expanduser(), args.limit):
            total += 1
            told += fit.take(record) > 0
        profile, remarks = fit.profile()
        say(f"{total} records, {told} of them tell times (streamed, and without trouble)")
        for remark in remarks:
            say(remark)
        if profile is None:
            say("too little for a profile: stream more requests of different lengths")
            return 1
        print(profile_text(profile), end="")
        return 0


def records_of(path: Path, bound: int) -> Iterator[dict[str, object]]:
    """Yield at most ``bound`` records of a file; what is no record is counted and told.

    Raises:
        ConfigError: The file cannot be read.
    """
    import msgspec

    decoder = msgspec.json.Decoder(dict[str, object])
    bad = read = 0
    try:
        with path.open("rb") as file:
            while read < bound and (line := file.readline(MAX_LINE_BYTES)):
                if not line.strip():
                    continue
                try:
                    record = decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    bad += 1
                    continue
                read += 1
                yield record
    except OSError as exc:
        raise ConfigError(f"cannot read the records: {exc.strerror}", file=str(path)) from exc
    if bad:
        say(f"{bad} lines are no records; left out")
