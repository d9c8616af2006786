"""TensorRT-Edge-LLM, NVIDIA's engine for Jetson: its checkpoint here, the rest by its own tools."""
