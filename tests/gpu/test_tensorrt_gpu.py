"""The real TensorRT on a real GPU; what every other computer can show is in tests/unit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import make_checkpoint
from vila_deploy.backends.tensorrt import cuda, files
from vila_deploy.backends.tensorrt.compilers import COMPILERS, host_platform
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.target import Target, load_targets
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.errors import VilaDeployError

# Of the logits' spread; on onnxruntime the same graphs stay below 5e-3.
TOLERANCE = 2e-2


def target_here() -> Target:
    """The first target that is this computer's GPU; skips with the reason where there is none."""
    try:
        found = cuda.compute_capability()
    except VilaDeployError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    for target in load_targets().values():
        if target.compute_capability == found and target.tensorrt is not None:
            compiler = COMPILERS[target.tensorrt.package]
            if not compiler.present:
                pytest.skip(f"needs the package {compiler.package}: {compiler.install}")
            if not compiler.ahead_of_time and host_platform() != target.host:
                pytest.skip(f"{target.title} is compiled for on {target.host}")
            return target
    pytest.skip(f"no target has compute capability {found} and backend tensorrt")


@pytest.mark.parametrize("quantized", [False, True])
def test_engine_gives_the_references_tokens(tmp_path: Path, quantized: bool) -> None:
    target = target_here()
    root = make_checkpoint(tmp_path / "c", quantized=quantized, kv_heads=2)
    build_engine(root, tmp_path / "engine", BuildOptions(target.name, backend="tensorrt"))
    reference = ReferenceSession(open_checkpoint(root))
    with open_engine(tmp_path / "engine") as engine:
        embeds = engine.session.embed_tokens(np.random.default_rng(0).integers(0, 60, 100))
        found, expected = engine.session.sequence.prefill(embeds), reference.prefill(embeds)
        for _ in range(32):
            assert np.abs(found - expected).max() < TOLERANCE * expected.std()
            token = int(expected.argmax())
            found, expected = engine.session.sequence.decode(token), reference.decode(token)


def test_images_and_chunks(tmp_path: Path) -> None:
    target = target_here()
    root = make_checkpoint(tmp_path / "c", quantized=True)
    build_engine(root, tmp_path / "engine", BuildOptions(target.name, backend="tensorrt"))
    checkpoint = open_checkpoint(root)
    size = checkpoint.config.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((2, 3, size, size), np.float32)
    with open_engine(tmp_path / "engine") as engine:
        expected = ReferenceSession(checkpoint).encode_images(pixels)
        found = engine.session.encode_images(pixels)
        assert np.abs(found - expected).max() < TOLERANCE * expected.std()
        embeds = engine.session.embed_tokens(np.random.default_rng(0).integers(0, 60, 100))
        at_once = engine.session.sequence.prefill(embeds)
        engine.session.sequence.truncate(0)
        for part in np.array_split(embeds, [1, 8, 72]):
            in_parts = engine.session.sequence.prefill(part)
        assert np.abs(in_parts - at_once).max() < TOLERANCE * at_once.std()
        made_for_this_gpu = "tensorrt-rtx" in engine.manifest.versions
    if made_for_this_gpu:
        assert (tmp_path / "engine" / files.LLM / files.RUNTIME_CACHE).exists()
