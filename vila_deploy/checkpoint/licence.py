"""Read the licence of a checkpoint from the front matter of its model card."""

from __future__ import annotations

import re
from pathlib import Path

CARD, MAX_CARD_BYTES = "README.md", 1 << 20
LICENSE_KEYS = ("license", "license_name", "license_link")
PLAIN_VALUE = re.compile(r"[\w./:+-]+( [\w./:+-]+)*", re.ASCII)


def original_licence(root: Path) -> dict[str, str]:
    """Return those of LICENSE_KEYS that README.md in `root` has as plain words."""
    card = root / CARD
    try:
        if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
            return {}
        text = card.read_text("utf-8", "replace")
    except OSError:
        return {}
    first, *lines = text.split("\n")
    if first.strip() != "---" or "---" not in map(str.strip, lines):
        return {}
    licence = {}
    for line in lines[: [line.strip() for line in lines].index("---")]:
        key, _, value = line.partition(":")
        value = value.strip().strip("\"'")
        if key in LICENSE_KEYS and PLAIN_VALUE.fullmatch(value):
            licence[key] = value
    return licence
