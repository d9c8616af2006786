"""Launch modes: how the kernels of a decoding step follow each other.

This module needs neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Iterable
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
SEPARATE = "separate"
# Decided when an engine is opened: PREFERRED where its steps have the bytes of SEPARATE.
AUTOMATIC, PREFERRED = "auto", "pdl-merged-attention-prefetch"
KERNEL_LAUNCHES = (AUTOMATIC, *LAUNCH_MODES)  # what an engine may ask for


def get_launch_mode(name: str) -> LaunchMode:
    """Return the mode called `name`.

    Raises:
        VilaDeployError: there is no such mode; the message lists those there are.
    """
    if name not in LAUNCH_MODES:
        raise _unknown(name, LAUNCH_MODES)
    return LAUNCH_MODES[name]


def possible_modes(kernel_launch: str, capability: ComputeCapability) -> tuple[LaunchMode, ...]:
    """Return the modes that an engine which asks for `kernel_launch` may run in.

    The first needs no proof; the second, if there is one, is preferred where it gives equal bytes.
    """
    if kernel_launch != AUTOMATIC:
        return (get_launch_mode(kernel_launch),)
    separate, preferred = LAUNCH_MODES[SEPARATE], LAUNCH_MODES[PREFERRED]
    return (separate, preferred) if capability >= PDL_CAPABILITY else (separate,)


def check_kernel_launch(name: str, where: str | None = None) -> None:
    """Raise VilaDeployError unless `name` is in KERNEL_LAUNCHES.

    Args:
        where: file that names it, for the error.
    """
    if name not in KERNEL_LAUNCHES:
        raise _unknown(name, KERNEL_LAUNCHES, where)


def mode_name(mode: LaunchMode) -> str:
    """Return the name of a mode in LAUNCH_MODES."""
    return next(name for name, known in LAUNCH_MODES.items() if known == mode)


def _unknown(name: str, known: Iterable[str], where: str | None = None) -> VilaDeployError:
    return VilaDeployError(
        f"unknown kernel launch mode {name!r}", where=where, fix=f"choose from {', '.join(known)}"
    )
