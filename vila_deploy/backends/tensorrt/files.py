"""Name the files in an engine folder of this backend."""

VISION, LLM, PROJECTOR = "vision", "llm", "projector"
PLAN = "model.plan"
# Removed once they are compiled.
GRAPH, WEIGHTS = "model.onnx", "model.data"
EMBEDDING = "embed_tokens.npy"
# Not in the manifest, since written while an engine runs or is compiled: kernels compiled for this
# GPU, and times of kernels.
RUNTIME_CACHE = "runtime.cache"
TIMING_CACHE = "timing.cache"
# Package, dialect and profiles, which compiling the graphs needs.
DESCRIPTION = "tensorrt.json"
# Commands for NVIDIA's trtexec, for engines that are compiled on the device.
TRTEXEC = "trtexec.sh"
# Key of the manifest's versions: the compute capability that engines are compiled for.
CAPABILITY = "compute-capability"
