"""What can be asked of a TensorRT-LLM that is installed; without one nothing here runs."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip(
    "tensorrt_llm",
    reason="TensorRT-LLM is not installed: nothing of the adapter was run on it here",
)

from disagg_trtllm import compat
from disagg_trtllm.checks import SCHEDULER, WORKER
from disagg_trtllm.connector import DisaggKvConnectorScheduler, DisaggKvConnectorWorker


def test_the_base_classes_are_where_one_of_the_known_eras_has_them() -> None:
    scheduler, worker = compat.base_classes()
    assert all(callable(getattr(scheduler, name)) for name in SCHEDULER)
    assert all(callable(getattr(worker, name)) for name in WORKER)


@pytest.mark.parametrize("kind", [DisaggKvConnectorScheduler, DisaggKvConnectorWorker])
def test_no_abstract_method_is_left(kind: type) -> None:
    assert not inspect.isabstract(kind)


@pytest.mark.parametrize("kind", [DisaggKvConnectorScheduler, DisaggKvConnectorWorker])
def test_overridden_methods_take_what_the_base_classes_take(kind: type) -> None:
    base = kind.__mro__[1]
    for name, method in vars(kind).items():
        theirs = getattr(base, name, None)
        if callable(method) and theirs is not None and not name.startswith("__"):
            ours = list(inspect.signature(method).parameters)
            assert ours == list(inspect.signature(theirs).parameters), name
