"""The adapter for TensorRT-LLM: its KV connector pair, and what the gateway speaks to it.

Written against the published interface, exercised on a host that follows it, not run on
TensorRT-LLM here.
"""
