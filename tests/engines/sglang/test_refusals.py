"""What the adapter refuses when SGLang starts; by SGLang's own interpreter, without a server."""

from __future__ import annotations

import importlib.util
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs the interpreter that has SGLang", allow_module_level=True)

# Importing the engine warns about itself; what our tests do afterwards must not.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

    from disagg_sglang import compat

from disagg_plugins.errors import UnsupportedEngineError


def make_pool(**changes: Any) -> SimpleNamespace:
    buffers = [torch.zeros(8, 2, 4, dtype=torch.bfloat16) for _ in range(3)]
    pool = {
        "k_buffer": buffers,
        "v_buffer": [b.clone() for b in buffers],
        "head_num": 2,
        "head_dim": 4,
        "page_size": 1,
        "dtype": torch.bfloat16,
        "store_dtype": torch.bfloat16,
    }
    return SimpleNamespace(**{**pool, **changes})


def make_scheduler(kv_shard_widening: int = 1) -> SimpleNamespace:
    model = SimpleNamespace(dtype=torch.bfloat16)
    return SimpleNamespace(model_config=model, kv_shard_widening=kv_shard_widening)


@pytest.fixture(autouse=True)
def parallel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What SGLang knows of its ranks; a server publishes it when it starts."""
    ranks = SimpleNamespace(attn_cp_size=1)
    monkeypatch.setattr(compat, "get_parallel", lambda: ranks)
    return ranks


def check(
    *, args: dict[str, Any] | None = None, mla: bool = False, states: Any = (), **queue: Any
) -> None:
    server_args = {
        "speculative_algorithm": None,
        "pp_size": 1,
        "dp_size": 1,
        "disaggregation_enable_kv_checksum": False,
        "disaggregation_decode_allocation_policy": "early",
        "disaggregation_decode_host_receive_threshold": 1.0,
    }
    known = {
        "draft_token_to_kv_pool": None,
        "token_to_kv_pool": make_pool(),
        "metadata_buffers": SimpleNamespace(output_ids=torch.zeros(2, 16, dtype=torch.int32)),
        "scheduler": make_scheduler(),
    }
    compat.check_supported(
        SimpleNamespace(state_types=list(states)),
        SimpleNamespace(**{**server_args, **(args or {})}),
        SimpleNamespace(**{**known, **queue}),
        is_mla=mla,
    )


def test_a_plain_server_is_taken() -> None:
    check()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mla": True}, "latent attention"),
        ({"states": ["mamba"]}, "state beside KV"),
        ({"draft_token_to_kv_pool": object()}, "speculative decoding"),
        ({"args": {"speculative_algorithm": "EAGLE"}}, "speculative decoding"),
        ({"args": {"pp_size": 2}}, "--pp-size"),
        ({"args": {"dp_size": 2}}, "--dp-size"),
        ({"scheduler": make_scheduler(kv_shard_widening=2)}, "context parallelism"),
        ({"args": {"disaggregation_enable_kv_checksum": True}}, "--disaggregation-enable-kv"),
        (
            {"args": {"disaggregation_decode_allocation_policy": "prefill_complete"}},
            "must be early",
        ),
        ({"args": {"disaggregation_decode_host_receive_threshold": 0.5}}, "host-receive"),
        ({"token_to_kv_pool": SimpleNamespace()}, "no K and V buffers"),
        ({"token_to_kv_pool": make_pool(head_num=1)}, "use the NHD layout"),
        ({"token_to_kv_pool": make_pool(dtype=torch.float8_e4m3fn)}, "quantised KV"),
        ({"token_to_kv_pool": make_pool(store_dtype=torch.uint8)}, "quantised KV"),
    ],
)
def test_what_cannot_be_handed_over_is_refused_by_name(changes: Any, words: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=words):
        check(**changes)


def test_context_parallel_ranks_are_refused(parallel: SimpleNamespace) -> None:
    parallel.attn_cp_size = 2
    with pytest.raises(UnsupportedEngineError, match="context parallelism"):
        check()
