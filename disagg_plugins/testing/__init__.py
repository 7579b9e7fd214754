"""What a plugin author tests with: a fake engine, scripts of events, contract suites."""
