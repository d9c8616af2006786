"""The llama.cpp backend: our vision encoder in front of llama.cpp's decoder."""
