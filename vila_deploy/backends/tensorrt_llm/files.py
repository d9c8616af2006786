"""Names in an engine folder; TensorRT-LLM's multimodal runner looks for vision/ and llm/."""

VISION, LLM, CHECKPOINT = "vision", "llm", "llm_checkpoint"
CONFIG = "config.json"
GRAPH, WEIGHTS = "visual_encoder.onnx", "weights.bin"
EMBEDDING = "embedding.npy"
INSTRUCTIONS = "BUILD.md"


def engine_file(rank: int) -> str:
    """As trtllm-build names what it writes."""
    return f"rank{rank}.engine"
