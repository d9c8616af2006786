"""Calibration and evaluation data: read it, tokenize it, embed it."""
