"""Compare a quantized model with its original."""
