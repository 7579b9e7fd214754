"""Prefers workers with fast memory, where their labels tell of it."""

from disagg_plugins import hookimpl


@hookimpl
def disagg_score_workers(role, workers):
    if role != "decode":
        return None
    return {w.name: 1.0 if w.labels.get("memory") == "hbm3" else 0.0 for w in workers}
