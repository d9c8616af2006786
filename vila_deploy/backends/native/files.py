"""Files of a native engine folder."""

# A folder with a safetensors file for each layer and one for the rest.
LLM = "llm"
VISION = "vision.safetensors"
# The model's config, the prescales of its norms, and how its kernels are launched.
MODEL = "model.json"
# What the compiler said about each kernel for the target.
KERNELS = "kernels.json"


def shard_file(name: str) -> str:
    """Return the file of a shard of the decoder, within LLM."""
    return f"{name}.safetensors"
