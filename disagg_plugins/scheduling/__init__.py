"""The built-in scheduler: one rule a file, each a plugin; ``decision`` asks them in order."""
