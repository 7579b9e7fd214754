"""The vLLM suite needs an environment that has vLLM; elsewhere none of its files is read."""

from __future__ import annotations

import importlib.util
import warnings

collect_ignore_glob: list[str] = []

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob.append("test_*.py")
else:
    # Importing the engine warns about itself; what our tests do afterwards must not.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm._custom_ops  # noqa: F401

        import disagg_vllm.connector  # noqa: F401
