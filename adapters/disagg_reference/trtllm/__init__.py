"""Hosts connectors that are written for TensorRT-LLM's KV connector interface.

The interface and its rules are written down here from what is published of them, for both known
eras. No code of TensorRT-LLM is in this package, and nothing that passes here has run on it.
"""
