"""What lies in an engine folder of this backend."""

VISION, LLM, PROJECTOR = "vision", "llm", "projector"
PLAN = "model.plan"
# Only until they are compiled.
GRAPH, WEIGHTS = "model.onnx", "model.data"
EMBEDDING = "embed_tokens.npy"
# Beside the engine folder's own files, written while it runs: kernels made for this very GPU.
RUNTIME_CACHE = "runtime.cache"
TIMING_CACHE = "timing.cache"
# Package, dialect and profiles: what compiling a graph needs to know besides it.
DESCRIPTION = "tensorrt.json"
# Under this key of the manifest's versions: the compute capability that engines are for.
CAPABILITY = "compute-capability"
