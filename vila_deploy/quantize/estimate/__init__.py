"""Predict memory and time of a quantization from the configs."""
