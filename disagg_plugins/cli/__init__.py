"""The ``disagg`` command, one file a subcommand."""
