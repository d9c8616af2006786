"""How each runtime wants the building blocks of the language model's graph."""
