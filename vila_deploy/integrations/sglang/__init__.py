"""VILA as a model of SGLang, where SGLang has no class for it."""
