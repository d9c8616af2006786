"""Run a built engine: open it, generate tokens, keep a conversation."""
