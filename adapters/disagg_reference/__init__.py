"""The embedded reference engine: small, readable, paged KV, Llama architecture, in torch."""
