"""A third-party plugin for disagg-plugins."""
