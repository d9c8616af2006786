"""Emit the building blocks of the language model's graph as each runtime reads them."""
