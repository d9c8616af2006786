"""Python files that are copied beside a checkpoint for SGLang, which runs them; see writers.sglang.

They import nothing of this package, since it need not be installed where SGLang is.
"""
