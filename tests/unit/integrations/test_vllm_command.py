"""The command for vLLM: divisions that can't be, words, variables, memory of each process."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import invoke
from tests.support.hub import serve_hub, use_hub
from tests.support.paths import REPOSITORY
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint.config import VilaConfig, load_config
from vila_deploy.checkpoint.presets import preset
from vila_deploy.cli.serve_vllm import VllmOptions, without_server
from vila_deploy.integrations.vllm.command import Installed, vllm_command
from vila_deploy.integrations.vllm.memory import rank_memory
from vila_deploy.integrations.vllm.parallel import Parallel, check_divides
from vila_deploy.utils.errors import VilaDeployError

GPU, CPU = Installed("0.32.0", False, True), Installed("0.32.0", True, False)
MASTER = ("10.0.0.1", 29501)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VilaConfig:
    """A model with 4-bit weights in groups of 64."""
    root = tmp_path_factory.mktemp("vllm") / "c"
    return load_config(make_checkpoint(root, quantized=True, group_size=64, layers=3))


@pytest.mark.parametrize(
    ("changes", "parallel", "message"),
    [
        ({}, Parallel(3), "does not divide the model's 4 heads"),
        ({}, Parallel(pipeline=4), "the model has 3 layers"),
        # o_proj has 128 inputs: 32 in each of four ranks, half a group.
        ({}, Parallel(4), r"32 inputs of self_attn.o_proj, no multiple of the group size 64"),
        ({"num_kv_heads": 3, "num_heads": 12}, Parallel(4), "the model's 3 key heads"),
        ({"intermediate_size": 129}, Parallel(2), "129 inner channels"),
    ],
)
def test_divisions_that_cannot_be(
    config: VilaConfig, changes: dict[str, Any], parallel: Parallel, message: str
) -> None:
    with pytest.raises(VilaDeployError, match=message):
        check_divides(replace(config.llm, **changes), parallel, on_cpu=False)


def test_divisions_that_can(config: VilaConfig) -> None:
    for parallel in (Parallel(), Parallel(2), Parallel(2, 3), Parallel(1, 2)):
        check_divides(config.llm, parallel, on_cpu=True)
    plain = replace(config.llm, quantization=None)
    check_divides(plain, Parallel(4), on_cpu=True)
    # Key heads are copied where there are fewer than ranks.
    check_divides(replace(plain, num_kv_heads=2), Parallel(4), on_cpu=True)


def test_the_group_size_that_is_advised_works(config: VilaConfig) -> None:
    with pytest.raises(VilaDeployError) as caught:
        check_divides(config.llm, Parallel(4), on_cpu=True)
    advised = re.search(r"--group-size (\d+)", str(caught.value))
    assert advised is not None
    quantization = replace(config.llm.quantization, group_size=int(advised[1]))
    check_divides(replace(config.llm, quantization=quantization), Parallel(4), on_cpu=True)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (Parallel(1, 1, 2, 0, MASTER), "--nnodes 2 does not divide"),
        (Parallel(2, 1, 2, 2, MASTER), "--node-rank 2 is not one of 2"),
        (Parallel(2, 1, 2), "need --master"),
    ],
)
def test_numbers_that_contradict_each_other(parallel: Parallel, message: str) -> None:
    with pytest.raises(VilaDeployError, match=message):
        parallel.check()


def words(parallel: Parallel, installed: Installed = GPU, **options: Any) -> list[str]:
    command = vllm_command(Path("/c"), Path("/c/llm"), parallel, installed, **options)
    return list(command.words)


def after(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def test_words() -> None:
    line = words(Parallel(2, 3), names=("a", "b"), max_places=5, slots=7, port=81, extra=("--x",))
    assert line[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "/c"]
    assert (after(line, "--tokenizer"), after(line, "--config-format")) == ("/c/llm", "vila")
    assert after(line, "--tensor-parallel-size") == "2"
    assert after(line, "--pipeline-parallel-size") == "3"
    assert (after(line, "--host"), after(line, "--port")) == ("127.0.0.1", "81")
    assert after(line, "--limit-mm-per-prompt") == '{"image": 5}'
    assert after(line, "--max-num-seqs") == "7"
    # The user's own words come last, so they win.
    assert line[-1] == "--x"
    assert "--headless" not in line


def test_words_of_nodes() -> None:
    first, second = (words(Parallel(2, 1, 2, rank, MASTER)) for rank in (0, 1))
    for line, rank in ((first, "0"), (second, "1")):
        assert (after(line, "--nnodes"), after(line, "--node-rank")) == ("2", rank)
        assert (after(line, "--master-addr"), after(line, "--master-port")) == MASTER_WORDS
    assert "--headless" in second
    assert "--port" not in second
    with pytest.raises(VilaDeployError, match="metadata"):
        words(Parallel(2, 1, 2, 1, MASTER), CPU)


MASTER_WORDS = (MASTER[0], str(MASTER[1]))


def test_on_a_cpu_each_rank_gets_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5})
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)

    def bound(parallel: Parallel, installed: Installed) -> str | None:
        found = vllm_command(Path("/c"), Path("/c"), parallel, installed).environment
        return found.get("VLLM_CPU_OMP_THREADS_BIND")

    assert bound(Parallel(2), CPU) == "0,1|2,5"
    assert bound(Parallel(1, 4), CPU) == "0|1|2|5"
    assert bound(Parallel(), CPU) is None
    assert bound(Parallel(2), GPU) is None
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "3|4")
    assert bound(Parallel(2), CPU) is None


def test_memory_of_the_ranks_adds_up(config: VilaConfig) -> None:
    (whole,) = rank_memory(config, Parallel())
    stages = rank_memory(config, Parallel(2, 2))
    assert [stage.layers for stage in stages] == [2, 1]
    assert sum(2 * stage.llm_bytes for stage in stages) == pytest.approx(whole.llm_bytes, rel=0.01)
    assert [stage.vision_bytes for stage in stages] == [whole.vision_bytes, 0]
    per_token = sum(2 * stage.cache_bytes_per_token for stage in stages)
    assert per_token == whole.cache_bytes_per_token
    # Two key heads in four ranks: copies.
    few = replace(config, llm=replace(config.llm, num_kv_heads=2))
    (rank,) = rank_memory(few, Parallel(4))
    assert rank.cache_bytes_per_token * 2 == rank_memory(few, Parallel())[0].cache_bytes_per_token


def test_the_40b_model_has_its_tower_in_each_rank() -> None:
    config = preset("VILA1.5-40b", "fp16")
    ranks = rank_memory(config, Parallel(4))
    # InternViT-6B without its last layers, in fp16.
    assert 10e9 < ranks[0].vision_bytes < 12.5e9


def test_plan_needs_no_vllm_and_no_weights(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True)
    for file in root.glob("*/*.safetensors"):
        file.unlink()
    done = invoke("vila-serve", root, "--backend", "vllm", "--plan", "--tp", 2)
    assert done.returncode == 0, done.stderr
    assert "--tensor-parallel-size 2" in done.stdout
    assert "each of 2 processes: 2 layers" in done.stdout
    sizes = r"LLM \d+\.\d MB, vision \d+\.\d MB \(whole in each\), weights"
    assert re.search(sizes, done.stdout)
    alone = invoke("vila-serve", root, "--backend", "vllm", "--plan").stdout
    assert "\none process: 2 layers, LLM " in alone
    assert "whole in each" not in alone
    assert "0.00" not in alone


def test_plan_of_a_repository_fetches_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    large = make_checkpoint(tmp_path / "large", vocab=8192, hidden=512)
    size = sum(file.stat().st_size for file in large.glob("*/*.safetensors"))
    with serve_hub() as hub, use_hub(hub, tmp_path / "cache"):
        hub.repositories["Lab/Large"] = large
        assert without_server(Path("Lab/Large"), VllmOptions(Parallel(2), True, ()))
        assert hub.sent_weights() < size / 10
    assert "serve Lab/Large --tokenizer Lab/Large/llm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tp", "2"), "--tp goes with --backend vllm"),
        (("--", "--max-num-seqs"), "unexpected argument"),
        (("--backend", "vllm", "--master", "x"), "no HOST:PORT"),
        (("--backend", "vllm", "--master", "x:²"), "no HOST:PORT"),
        (("--backend", "vllm", "--master", "x:" + "9" * 5000), "no HOST:PORT"),
        (("--backend", "vllm", "--image-cache-mb", "9"), "--image-cache-mb does nothing with"),
        (("--backend", "vllm", "--tp", "3", "--plan"), "4 heads"),
    ],
)
def test_wrong_usage(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = invoke("vila-serve", make_checkpoint(tmp_path / "c"), *flags)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_vllm_finds_the_plugin() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    value = project["entry-points"]["vllm.general_plugins"]["vila_deploy"]
    module, _, name = value.partition(":")
    file = REPOSITORY / Path(*module.split(".")).with_suffix(".py")
    assert f"def {name}(" in file.read_text("utf-8")
