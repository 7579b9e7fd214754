"""Metrics, the per-request record, and the workers' reports."""
