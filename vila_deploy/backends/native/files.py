"""What lies in an engine folder of this backend."""

LLM, VISION = "llm.safetensors", "vision.safetensors"
# Sizes of the model, and the units of its norms.
MODEL = "model.json"
# What the compiler said about each kernel for the target.
KERNELS = "kernels.json"
