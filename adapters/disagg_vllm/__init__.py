"""The vLLM adapter: the same policy inside a vLLM worker, loaded by vLLM's own plugin door."""
