"""Folders of the repository that tests read."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "golden"
# The trained checkpoint, and the folder of the example around it.
TINY_VILA_EXAMPLE = REPOSITORY / "examples" / "tiny-vila"
TINY_VILA = TINY_VILA_EXAMPLE / "checkpoint"
