"""Name what is in an engine folder; TensorRT-LLM's multimodal runner expects vision/ and llm/."""

VISION, LLM, CHECKPOINT = "vision", "llm", "llm_checkpoint"
CONFIG = "config.json"
GRAPH, WEIGHTS = "visual_encoder.onnx", "weights.bin"
EMBEDDING = "embedding.npy"
INSTRUCTIONS = "BUILD.md"
# Input of the vision encoder, and the largest number of images in a pass.
VISION_INPUT, MAX_IMAGES = "input", 4


def engine_file(rank: int) -> str:
    """Return the name that trtllm-build gives a rank's engine."""
    return f"rank{rank}.engine"
