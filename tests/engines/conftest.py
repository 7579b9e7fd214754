"""Notes which pairs of workers hand KV over while the engine tests run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from urllib.error import URLError

import pytest

from tests.engines import compatibility
from tests.engines.probes import status
from tests.engines.testbed import Testbed

rows: set[tuple[str, ...]] = set()


@pytest.fixture(autouse=True)
def noted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Note what the test's fleet handed over."""
    bed = request.getfixturevalue("bed") if "bed" in request.fixturenames else None
    if not isinstance(bed, Testbed):
        yield
        return
    before, hellos = len(bed.records()), {}
    yield
    with suppress(URLError, OSError):  # the test has ended the gateway
        hellos = {w["name"]: w["hello"] for w in status(bed)["workers"]}
    name = request.node.nodeid.partition("[")[0].rpartition("/")[2]
    rows.update(compatibility.note(bed, hellos, bed.records()[before:], name))


def pytest_sessionfinish() -> None:
    """Write the notes."""
    if rows:
        compatibility.merge(rows)
