"""Has a hook that does not exist."""

from disagg_plugins import hookimpl


class Plugin:
    @hookimpl
    def disagg_select_spilt(self, profile):
        return None
