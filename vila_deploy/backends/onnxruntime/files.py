"""Name the files in an engine folder of this backend."""

VISION, LLM = "vision", "llm"
GRAPH, WEIGHTS = "model.onnx", "model.data"
# The projector alone, for models with S2 features.
PROJECTOR_GRAPH, PROJECTOR_WEIGHTS = "projector.onnx", "projector.data"
# Takes many tokens at a time; only where GRAPH takes a single one.
PREFILL_GRAPH = "prefill.onnx"
# Scales of an int8 key/value cache, beside WEIGHTS of the LLM.
CACHE_SCALES = "cache.data"
# Exists only while the scales are being found.
SCRATCH_GRAPH = "scratch.onnx"
EMBEDDING = "embed_tokens.npy"
