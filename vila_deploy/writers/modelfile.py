"""Write the Modelfile with which Ollama takes the GGUF beside it."""

from __future__ import annotations

from vila_deploy.processing.chat_template import PromptTemplate
from vila_deploy.processing.jinja_template import ollama_template

MODELFILE = "Modelfile"
BOS_TEXTS = ("<|begin_of_text|>",)
# Ollama's default of 4096 stands for longer models: a larger one costs memory that few ask for.
MAX_CONTEXT = 4096


def modelfile(gguf: str, template: PromptTemplate, max_length: int) -> str:
    """Return the Modelfile of the GGUF file called `gguf`, for text alone.

    Args:
        max_length: tokens that the model was trained for.
    """
    bos = next((text for text in BOS_TEXTS if template.system.startswith(text)), "")
    stops = "".join(f'PARAMETER stop "{stop}"\n' for stop in template.stops)
    return (
        "# ollama create NAME -f Modelfile, in this folder.\n"
        "# Text only: Ollama's vision encoders can't be VILA's. Questions about images need\n"
        "# vila-build-engine and vila-chat, which read this checkpoint too.\n"
        f"FROM ./{gguf}\n"
        f'TEMPLATE """{ollama_template(template, bos)}"""\n'
        f'SYSTEM """{template.system_message}"""\n'
        f"{stops}"
        f"PARAMETER num_ctx {min(max_length, MAX_CONTEXT)}\n"
    )
