"""TensorRT-LLM's checkpoint of the LLM: float16 or W4A16_AWQ, Llama or Qwen2, any GPUs."""
