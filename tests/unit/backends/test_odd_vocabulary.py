"""An odd number of tokens, as one added token makes it: graphs and checkpoints of every head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native import build as native_build
from vila_deploy.backends.registry import get_backend
from vila_deploy.backends.tensorrt.compilers import COMPILERS
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.engine.manifest import load_manifest
from vila_deploy.engine.precision import CHOICES, ModulePrecision
from vila_deploy.engine.target import get_target, load_targets

ODD = 401
TITLES = {
    (target.name, backend): get_backend(backend).title(target)
    for target in load_targets().values()
    for backend in target.backends
}


def cases() -> Iterator[tuple[str, str, str | None, str]]:
    """One target of each package, on a board each JetPack, with each head that it has."""
    seen = set()
    for (name, backend), title in TITLES.items():
        target = get_target(name)
        jetpacks = (target.tensorrt.jetpacks if target.tensorrt else None) or {None: ""}
        for jetpack in jetpacks if backend == "tensorrt" else (None,):
            for head in CHOICES["lm_head"]:
                able = get_backend(backend).supports(target, "lm_head", head)
                if able and (title, jetpack, head) not in seen:
                    seen.add((title, jetpack, head))
                    yield name, backend, jetpack, head


@pytest.mark.parametrize(("target", "backend", "jetpack", "head"), [*cases()])
def test_every_backend_builds_it(
    tmp_path: Path,
    target: str,
    backend: str,
    jetpack: str | None,
    head: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "native":
        # Compiling takes minutes; its kernels' own tests have odd widths.
        pytest.importorskip("triton")
        monkeypatch.setattr(native_build, "compile_engine", lambda *arguments: [])
    if TITLES[target, backend] == "tensorrt-rtx" and not COMPILERS["tensorrt-rtx"].present:
        pytest.skip("needs the package tensorrt-rtx")
    # TensorRT-LLM and Edge-LLM have no zero points.
    quantized = backend not in ("tensorrt-llm", "edge-llm")
    root = make_checkpoint(tmp_path / "c", vocab=ODD, layers=1, quantized=quantized)
    options = BuildOptions(
        target, backend, max_seq_len=64, jetpack=jetpack,
        module_precision=ModulePrecision(lm_head=head),
    )  # fmt: skip
    manifest = build_engine(root, tmp_path / "e", options)
    assert manifest.model.vocab_size == ODD
    assert load_manifest(tmp_path / "e").module_precision.lm_head == head
