"""Launch modes: how the kernels of a decoding step follow each other.

This module needs neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.utils.errors import VilaDeployError

PDL_CAPABILITY = ComputeCapability(9, 0)  # the first with programmatic dependent launch


@dataclass(frozen=True)
class LaunchMode:
    """How the kernels of a step follow each other; the default is one launch after another.

    Args:
        pdl: programmatic dependent launch: a kernel begins while the one before it still runs.
        merge_attention: the last program of a key head merges the splits: one launch less.
        fuse_layers: everything between two layers' attention in one launch of persistent programs.
        prefetch_next: a kernel asks for the weights of the next product while it ends, attention
            while it runs.
    """

    pdl: bool = False
    merge_attention: bool = False
    fuse_layers: bool = False
    prefetch_next: bool = False

    def check(self, capability: ComputeCapability) -> None:
        """Raise VilaDeployError where a GPU of this compute capability lacks what it takes."""
        if self.pdl and INTERPRETER != capability < PDL_CAPABILITY:
            raise VilaDeployError(
                f"programmatic dependent launch needs compute capability {PDL_CAPABILITY}, this is "
                f"{capability}",
                fix="choose a kernel launch mode without pdl",
            )
        if self.pdl and self.fuse_layers:
            raise VilaDeployError(
                "a fused kernel can't be launched dependently",
                fix="choose either pdl or fused layers",
            )


# Name in an engine and on the command line → mode.
LAUNCH_MODES = {
    "separate": LaunchMode(),
    "merged-attention": LaunchMode(merge_attention=True),
    "pdl": LaunchMode(pdl=True),
    "pdl-merged-attention": LaunchMode(pdl=True, merge_attention=True),
    "merged-attention-prefetch": LaunchMode(merge_attention=True, prefetch_next=True),
    "pdl-merged-attention-prefetch": LaunchMode(pdl=True, merge_attention=True, prefetch_next=True),
    "fused": LaunchMode(fuse_layers=True),
    "fused-merged-attention": LaunchMode(fuse_layers=True, merge_attention=True),
}
DEFAULT_LAUNCH_MODE = "separate"


def get_launch_mode(name: str, where: str | None = None) -> LaunchMode:
    """Return the mode called `name`.

    Args:
        where: file that names it, for the error.

    Raises:
        VilaDeployError: there is no such mode; the message lists those there are.
    """
    if name not in LAUNCH_MODES:
        raise VilaDeployError(
            f"unknown kernel launch mode {name!r}",
            where=where,
            fix=f"choose from {', '.join(LAUNCH_MODES)}",
        )
    return LAUNCH_MODES[name]
