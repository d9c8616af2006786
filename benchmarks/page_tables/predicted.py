"""Tokens/s that the model of a decoding step predicts for a GPU."""

from __future__ import annotations

from benchmarks.page_tables.sources import markdown
from vila_deploy.bench.predict import step_model
from vila_deploy.checkpoint.presets import preset
from vila_deploy.kernels.launch_mode import LAUNCH_MODES

MODELS = {
    "3B": "VILA1.5-3b", "8B": "Llama-3-VILA1.5-8B", "13B": "VILA1.5-13b", "40B": "VILA1.5-40b",
}  # fmt: skip
TARGET, CONTEXT, SEQUENCES = "h200", 544, (1, 2, 4, 8)
# Of several sequences: what every GPU has, and what is predicted to be the fastest.
COMPARED = ("separate", "pdl-merged-attention-prefetch")


def predicted_modes() -> str:
    """Return tokens/s of one sequence in each launch mode; fused layers are not modelled."""
    rows = [
        [f"`{name}`", *_tokens_per_s(name, 1)]
        for name, mode in LAUNCH_MODES.items()
        if not mode.fuse_layers
    ]
    return markdown(["launch mode", *MODELS], rows)


def predicted_sequences() -> str:
    """Return tokens/s of sequences that decode together, all of their tokens counted."""
    rows = [
        [f"`{name}`", str(sequences), *_tokens_per_s(name, sequences)]
        for name in COMPARED
        for sequences in SEQUENCES
    ]
    return markdown(["launch mode", "sequences", *MODELS], rows)


def _tokens_per_s(launch_mode: str, sequences: int) -> list[str]:
    found = []
    for model in MODELS.values():
        step = step_model(preset(model, "int4").llm, TARGET, launch_mode)
        found.append(f"{sequences / step.seconds(CONTEXT, sequences):.0f}")
    return found
