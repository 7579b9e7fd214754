"""Evidence of a canary: metrics of requests, confidence at any time, guardrails (pure)."""
