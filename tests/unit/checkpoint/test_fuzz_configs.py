"""Random damage never gives anything but a checkpoint that opens, or one line that says why not."""

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.support.mutate import mutate
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.utils.errors import VilaDeployError

COUNT = 300
SMALL = {"hidden": 64, "intermediate": 64, "vision_hidden": 32, "vision_intermediate": 32}
BASES = {
    "sharded": {**SMALL, "shards": 3},
    "single": SMALL,
    "4-bit": {**SMALL, "quantized": True, "group_size": 32},
    "checksums": {**SMALL, "shards": 2, "checksums": True},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_checkpoint(folder / name, **sizes) for name, sizes in BASES.items()}


def read_everything(root: Path) -> None:
    checkpoint = open_checkpoint(root)
    for reader in (checkpoint.llm, checkpoint.vision, checkpoint.projector):
        for name in reader.names():
            reader.tensor(name)
    for index in range(checkpoint.config.llm.num_layers):
        checkpoint.llm.linear(f"model.layers.{index}.mlp.down_proj")
    checkpoint.fingerprint()


@pytest.mark.parametrize("base", BASES)
def test_undamaged_reads(base: str, bases: dict[str, Path]) -> None:
    read_everything(bases[base])


def outcome(root: Path, damage: str) -> VilaDeployError | None:
    try:
        read_everything(root)
    except VilaDeployError as error:
        return error
    except Exception as error:
        pytest.fail(f"{damage}: {type(error).__name__}: {error}")
    return None


def test_mutations_give_one_line_or_a_checkpoint(bases: dict[str, Path], tmp_path: Path) -> None:
    refused, slowest_s = 0, 0.0
    for seed in range(COUNT):
        rng = random.Random(seed)
        root = tmp_path / str(seed)
        shutil.copytree(bases[rng.choice(sorted(BASES))], root)
        damage = f"seed {seed}: {mutate(root, rng)}"
        start_s = time.thread_time()
        error = outcome(root, damage)
        slowest_s = max(slowest_s, time.thread_time() - start_s)
        shutil.rmtree(root)
        if error is not None:
            refused += 1
            assert str(error).isprintable(), damage
            assert len(str(error)) < 1000, damage
            assert str(root) in str(error), damage
            assert error.fix, damage
    # Damage to an unused key or a weight's last bits goes unseen; most must not.
    assert refused > COUNT // 2
    # Of this thread on a processor: other load does not count. The usual is a hundredth of it.
    assert slowest_s < 10
