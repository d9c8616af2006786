"""Checkpoints of every generation: found, checked in full, then read lazily."""

from __future__ import annotations

from vila_deploy.checkpoint.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
