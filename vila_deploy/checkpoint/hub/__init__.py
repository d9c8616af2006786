"""Checkpoints on the Hugging Face Hub: looked at without their weights, then fetched."""

from __future__ import annotations

from vila_deploy.checkpoint.hub.fetch import Download, fetch_checkpoint, planned_checkpoint
from vila_deploy.checkpoint.hub.source import (
    HubSource,
    checkpoint_name,
    hub_source,
    original_source,
)

__all__ = [
    "Download",
    "HubSource",
    "checkpoint_name",
    "fetch_checkpoint",
    "hub_source",
    "original_source",
    "planned_checkpoint",
]
