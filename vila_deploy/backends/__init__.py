"""Backends: each builds engines for its targets and runs them; registry.py is the table."""
