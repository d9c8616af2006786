"""What a backend is asked to build, and what it says of the files that it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.engine.precision import ModulePrecision as ModulePrecision
from vila_deploy.engine.target import Target


@dataclass(frozen=True)
class BuildRequest:
    """Args:
    target: the device that it is for.
    limits: batch and lengths that the engine must take.
    tp: GPUs that share each layer.
    pp: stages, on `tp` GPUs each, that the layers are cut into.
    jetpack: release of JetPack on a Jetson; None means the target's usual one.
    module_precision: what vision tower, output head and key/value cache are kept in.
    kernel_launch: a name in LAUNCH_MODES, how the native backend's kernels follow each other; None
        means the default.
    """

    target: Target
    limits: Limits
    tp: int = 1
    pp: int = 1
    jetpack: str | None = None
    module_precision: ModulePrecision = ALL_FP16
    kernel_launch: str | None = None

    @property
    def gpus(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True)
class Built:
    """What the manifest says about the files that were written.

    Args:
        weight_bytes_per_token: bytes of weights that one decoding step reads.
        versions: of the tools that made them.
        needs: steps that are left for the device; empty when the engine is complete.
    """

    weight_bytes_per_token: int
    versions: Mapping[str, str]
    needs: tuple[str, ...] = ()
