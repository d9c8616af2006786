"""One file an algorithm or idea: RTN, AWQ, GPTQ, learned scales."""
