"""Serve an engine over HTTP: OpenAI's API, metrics, and a page to talk to."""
