"""The handoff of one request's KV cache from prefill to decode.

``interfaces.py`` says how the parts meet, ``state.py`` holds the rules of one handoff,
``frames.py``, ``messages.py`` and ``protocol.py`` the bytes on the wire (without I/O).
"""
