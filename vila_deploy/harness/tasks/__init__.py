"""Tasks: a folder of questions of one's own, and benchmarks in their published file formats."""
