"""Measure engines: decode speed, time to first token, memory bandwidth."""
