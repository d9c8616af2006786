"""Open what is scored: a built engine, or a checkpoint in the reference implementation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.config import config_of
from vila_deploy.checkpoint.folder_layout import find_layout
from vila_deploy.checkpoint.hub import fetch_checkpoint
from vila_deploy.engine.manifest import MANIFEST
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.session import OneSlot, Session, check_room
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.own_template import follow_tokenizer
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.runtime.open_engine import open_engine, slots_that_fit
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.files import sha256_file


@dataclass(frozen=True)
class Subject:
    """A running model; `with` closes it.

    Args:
        kind: a built engine, or a checkpoint run by PyTorch in float32 on the CPU.
        fingerprint: SHA-256 that changes with whatever changes answers.
        max_input_len: most tokens of a prompt.
    """

    name: str
    kind: Literal["engine", "checkpoint"]
    fingerprint: str
    session: Session
    tokenizer: Tokenizer
    model: ModelInfo
    max_input_len: int

    def __enter__(self) -> Subject:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.session.close()


class _ReferenceSlot(OneSlot):
    """The reference gives the logits of all tokens in one pass."""

    sequence: ReferenceSession

    def prefill(
        self, slot: int, embeds: Floats, all_logits: bool = False, more: bool = False
    ) -> Floats:
        if not all_logits:
            return super().prefill(slot, embeds, more=more)
        check_room(self.length(slot), len(embeds), self.max_seq_len)
        return self.sequence.prefill_all(embeds)


def open_subject(
    path: Path, slots: int | None = None, prompt_template: str | None = None
) -> Subject:
    """Open an engine folder, or a checkpoint: a folder or OWNER/NAME on the hub.

    Args:
        slots: questions answered at once by an engine; None: as many as memory holds.
        prompt_template: of a checkpoint whose configs name none.

    Raises:
        VilaDeployError: neither of the two, or one that can't be opened.
    """
    if is_engine(path):
        return _engine(path, slots)
    root = fetch_checkpoint(path)
    layout = find_layout(root)
    folder = layout.folder("llm")
    config = follow_tokenizer(config_of(layout, prompt_template), folder)
    checkpoint, tokenizer = open_checkpoint(root, config), load_tokenizer(folder)
    session = _ReferenceSlot(ReferenceSession(checkpoint))
    return Subject(
        name=str(path),
        kind="checkpoint",
        fingerprint=checkpoint.fingerprint(),
        session=session,
        tokenizer=tokenizer,
        model=ModelInfo.from_config(checkpoint.config, tokenizer),
        max_input_len=session.max_seq_len,
    )


def is_engine(path: Path) -> bool:
    """Return whether a folder is an engine, or what is left of one."""
    return (path / MANIFEST).is_file()


def _engine(path: Path, slots: int | None) -> Subject:
    opened = open_engine(path, slots_that_fit(path) if slots is None else slots)
    return Subject(
        name=str(path),
        kind="engine",
        fingerprint=sha256_file(path / MANIFEST),
        session=opened.session,
        tokenizer=opened.require_tokenizer(),
        model=opened.model,
        max_input_len=min(opened.max_input_len, opened.session.max_seq_len),
    )
