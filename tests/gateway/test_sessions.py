"""Which requests belong together."""

from __future__ import annotations

import json

from disagg_plugins.gateway.body import read_body
from disagg_plugins.gateway.sessions import MAX_SESSION_CHARS, session_of


def session(header=None, **body):
    headers = [(b"x-disagg-session", header)] if header is not None else []
    return session_of(headers, read_body(json.dumps(body).encode()))


def test_the_header_comes_before_the_cache_key_and_that_before_the_user():
    assert session(b"h", prompt_cache_key="k", user="u") == "h"
    assert session(prompt_cache_key="k", user="u") == "k"
    assert session(user="u") == "u"
    assert session(b"", prompt_cache_key="", user=3) is None


def test_a_long_name_is_cut():
    assert len(session(b"a" * 10_000)) == MAX_SESSION_CHARS
    assert len(session(user="a" * 10_000)) == MAX_SESSION_CHARS
