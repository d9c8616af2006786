"""What a quantized checkpoint has beside its decoder layers: tables, output head, vision tower."""

from __future__ import annotations

from copy import copy

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, FINAL_NORM, HEAD
from vila_deploy.checkpoint.rounded_tower import RoundedTower
from vila_deploy.formats.base import HEAD_LINEAR, QuantScheme, to_float16
from vila_deploy.formats.rtn import round_table
from vila_deploy.quantize.bit_choice import BitChoice
from vila_deploy.writers.folder import CheckpointWriter


def with_int8_tower(checkpoint: Checkpoint, choice: BitChoice | None) -> Checkpoint:
    """Return the checkpoint as it is to be written, with the tower's linears in their bits."""
    if choice is None or not choice.int8_tower_linears:
        return checkpoint
    written = copy(checkpoint)
    written.vision = RoundedTower(checkpoint.vision, choice.int8_tower_linears)
    return written


def write_unquantized(
    checkpoint: Checkpoint, outputs: CheckpointWriter, scheme: QuantScheme
) -> None:
    """Write what lies beside the layers; the head in int8 where `scheme` has bits for it."""
    names = [EMBEDDING, FINAL_NORM]
    if HEAD_LINEAR in scheme.linear_bits:
        head = round_table(checkpoint.llm.tensor(HEAD), scheme.of(HEAD_LINEAR), HEAD_LINEAR)
        outputs.add(HEAD_LINEAR, head)
    elif not checkpoint.config.llm.tie_word_embeddings:
        names.append(HEAD)
    for name in names:
        outputs.add(name, to_float16(checkpoint.llm.tensor(name), name))
