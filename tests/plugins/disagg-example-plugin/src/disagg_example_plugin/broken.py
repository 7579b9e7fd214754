"""Cannot be imported, like a plugin whose dependency is missing."""

import disagg_example_plugin.not_there  # noqa: F401
