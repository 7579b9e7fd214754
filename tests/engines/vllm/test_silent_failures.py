"""Splits that are configured and cannot happen: the answer is right, and the reason is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import parity
from tests.corpus import prompts
from tests.engines.testbed import Server, Testbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MODELS = Path(__file__).resolve().parents[3] / ".models"
FLAGS = ("--enforce-eager", "--max-model-len", "1024", "--dtype", "float32")
POLICY = {"scheduler": {"split": {"min_prompt_tokens": 64}}}


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """A prefill worker that serves another model than the decode worker under the same name."""
    servers = [
        Server("prefill", "prefill", (0,), model=MODELS / "tiny"),
        Server("decode", "decode", (1,)),
        Server("plain", "monolith", (0,), model=MODELS / "tiny"),
    ]
    folder, model = tmp_path_factory.mktemp("silent"), MODELS / "SmolLM2-135M-Instruct"
    with Testbed(folder, model, servers, flags=FLAGS, policy=POLICY) as testbed:
        yield testbed


def doctor(url: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "disagg_plugins.cli.main", "doctor", "--live", url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_two_models_in_one_fleet_never_mix(bed: Testbed) -> None:
    (text,) = prompts([300], seed=31)
    alone = parity.complete(bed.urls["decode"], text, max_tokens=12, model=parity.MODEL_NAME)
    # By hand: the gateway, which knows the fingerprints, does not even try.
    record, ticket = parity.prefill(bed, "Other. " + text)
    assert record["num_tokens"] > 0
    by_hand = parity.decode(bed, "Other. " + text, 12, ticket, record)
    alone_by_hand = parity.complete(
        bed.urls["decode"], "Other. " + text, max_tokens=12, model=parity.MODEL_NAME
    )
    assert parity.compare(by_hand, alone_by_hand) != "different"
    assert "cannot share KV" in bed.log("decode")
    split = parity.cold(bed, text, 12, "two-models")
    assert parity.compare(split, alone) != "different"
    assert parity.record_of(bed, "two-models")["split"] != "yes"
    code, said = doctor(bed.gateway_url)
    assert code == 1
    assert "fingerprint" in said or "model" in said


def test_a_prefill_worker_without_the_connector_is_found_and_named(bed: Testbed) -> None:
    bed.stop_gateway()
    wrong = bed.policy_path.read_text().replace(bed.urls["prefill"], bed.urls["plain"])
    bed.policy_path.write_text(wrong)
    bed.start_gateway()
    bed.wait_ready()
    (text,) = prompts([400], seed=32)
    alone = parity.complete(bed.urls["decode"], text, max_tokens=12, model=parity.MODEL_NAME)
    answer = parity.cold(bed, "Now. " + text, 12, "no-connector")
    assert answer.usage["completion_tokens"] == 12
    assert parity.compare(parity.cold(bed, text, 12), alone) != "different"
    record = parity.record_of(bed, "no-connector")
    assert record["split"] != "yes"
    code, said = doctor(bed.gateway_url)
    assert code == 1, said
    assert "kv-transfer-config" in said
