"""The front door: one OpenAI-compatible address before all workers."""
