"""One disaggregation policy for vLLM, SGLang and TensorRT-LLM.

Importing this package imports no engine and no torch. Plugin authors need three names::

    from disagg_plugins import hookimpl
    from disagg_plugins.types import RequestProfile, SplitDecision
"""

from pluggy import HookimplMarker

__all__ = ["__version__", "hookimpl"]

__version__ = "0.1.0"

hookimpl = HookimplMarker("disagg_plugins")
"""Marks a function as an implementation of one of the hooks in ``hookspecs.py``."""
