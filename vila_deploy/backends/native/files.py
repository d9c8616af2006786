"""What lies in an engine folder of this backend."""

# A folder with a safetensors file for each layer and one for the rest.
LLM = "llm"
VISION = "vision.safetensors"
# Sizes of the model, and the units of its norms.
MODEL = "model.json"
# What the compiler said about each kernel for the target.
KERNELS = "kernels.json"


def part(name: str) -> str:
    """File of a part of the decoder, within LLM."""
    return f"{name}.safetensors"
