"""Keeps one tenant's requests whole, however long their prompts are."""

from disagg_plugins import hookimpl
from disagg_plugins.types import SplitDecision


@hookimpl
def disagg_select_split(profile):
    if profile.tenant == "batch":
        return SplitDecision(False, "example: batch tenants stay local")
    return None


@hookimpl
def disagg_filter_workers(workers, role):
    return [worker for worker in workers if worker.labels.get("banned") != role]
