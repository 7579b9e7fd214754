"""What every engine's adapter needs inside the engine: its settings, and a rank's part in handoffs.

Imports no engine.
"""
