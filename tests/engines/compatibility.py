"""Which pairs of workers hand KV over: noted by the engine tests as they run, printed as a table.

A fixture notes every handoff that was consumed while a test ran. At the end of the session the
notes are merged into ``.run/compatibility.json``, from which ``make compatibility`` makes the page
``migration_guides/compatibility.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.engines.testbed import Testbed

NOTES = Path(__file__).resolve().parents[2] / ".run" / "compatibility.json"
COLUMNS = ("prefill", "decode", "dtype", "layouts", "tensor parallel", "path", "tried by")

HEAD = """# Compatibility

Pairs of workers between which the engine tests handed KV over, on CPUs. This page is generated, not
written: `make compatibility` makes it from what the tests of `make test-engine` did. A pair that is
absent was not tried. `direct` moves rows as they lie in the engine's memory, `canonical` by the
form that all engines share. `benchmarks/engines.py` is `make bench NAME=engines`.

"""


def note(bed: Testbed, hellos: dict[str, Any], records: Iterable[dict[str, Any]], test: str) -> set:
    """Return the rows that these requests prove."""
    engines = {server.name: server.engine for server in bed.servers}
    rows = set()
    for record in records:
        handoff = record["handoff"]
        prefill, decode = hellos.get(record["prefill"]), hellos.get(record["decode"])
        if not handoff or handoff["outcome"] != "consumed" or not prefill or not decode:
            continue
        rows.add(
            (
                engines[record["prefill"]],
                engines[record["decode"]],
                prefill["layout"].split()[-1],
                layouts(prefill["layout"], decode["layout"]),
                f"{prefill['tp_size']} to {decode['tp_size']}",
                {"native": "direct"}.get(handoff["form"], handoff["form"]),
                test,
            )
        )
    return rows


def layouts(prefill: str, decode: str) -> str:
    """Return both layouts in words: order of axes, packing, block size."""

    def short(layout: str) -> str:
        order, packing, _, block, _ = layout.split()
        packing = "-".join(p for p in packing.split("-") if len(p) != 12)
        return f"{order}{'' if packing == 'plain' else ' ' + packing} block {block}"

    ours, theirs = short(prefill), short(decode)
    return ours if ours == theirs else f"{ours} to {theirs}"


def merge(rows: Iterable[tuple[str, ...]], path: Path = NOTES) -> None:
    """Add rows to the notes; the first test by name stays for each pair."""
    known = {
        tuple(row[:-1]): row for row in (json.loads(path.read_text()) if path.exists() else ())
    }
    for row in rows:
        before = known.get(row[:-1])
        known[row[:-1]] = list(row) if before is None else min(list(row), before)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sorted(known.values()), indent=1) + "\n")


def table(rows: Iterable[Iterable[str]]) -> str:
    """Return the page."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return HEAD + "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(table(json.loads(Path(sys.argv[1]).read_text())))
