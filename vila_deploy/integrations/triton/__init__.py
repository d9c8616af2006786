"""Our engines as models of Triton Inference Server, through its Python backend."""
