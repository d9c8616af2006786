"""What lies in an engine folder of this backend."""

VISION, LLM = "vision", "llm"
GRAPH, WEIGHTS = "model.onnx", "model.data"
# The projector alone, where features of several scales are joined before it.
PROJECTOR_GRAPH, PROJECTOR_WEIGHTS = "projector.onnx", "projector.data"
# Fills the cache many tokens at a time; only where the main graph takes one token.
PREFILL_GRAPH = "prefill.onnx"
EMBEDDING = "embed_tokens.npy"
