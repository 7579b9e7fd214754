"""One fleet for the whole SGLang suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.engines.sglang_bed import make_bed

if TYPE_CHECKING:
    from tests.engines.testbed import Testbed


@pytest.fixture(scope="session")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    with make_bed(tmp_path_factory.mktemp("sglang")) as testbed:
        yield testbed
