"""vila-quantize --lora: the same bytes as of the merged checkpoint, said in report and card."""

import json
import shutil

import pytest

from tests.support.commands import assert_one_line, invoke
from tests.support.lora_cases import make_adapter
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.lora import open_adapter
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize import pipeline, quantize_checkpoint
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers.folder import save_tensors

pytest.importorskip("peft", reason="peft is not installed")
OPTIONS = {"algorithm": "rtn", "group_size": 32}
SMALL = {"hidden": 64, "intermediate": 64, "vision_hidden": 32, "vision_intermediate": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a checkpoint, an adapter of every part of it, and the two merged."""
    top = tmp_path_factory.mktemp("lora")
    root = make_checkpoint(top / "base", layers=2, **SMALL)
    checkpoint = open_checkpoint(root)
    targets = ["q_proj", "down_proj", "fc1"]
    make_adapter(checkpoint, top / "ad|ap", target_modules=targets, trained_in_full="mm_projector")
    open_adapter(top / "ad|ap", checkpoint.config).merge_into(checkpoint)
    merged = top / "merged"
    shutil.copytree(root, merged)
    parts = {"llm": checkpoint.llm, "vision_tower": checkpoint.vision}
    for part, reader in {**parts, "mm_projector": checkpoint.projector}.items():
        values = {name: reader.tensor(name).contiguous() for name in reader.names()}
        save_tensors(values, merged / part / "model.safetensors", {"format": "pt"})
    return root, top / "ad|ap", merged


def weights(folder):
    return {
        file.relative_to(folder): file.read_bytes()
        for file in sorted(folder.rglob("*.safetensors"))
    }


def test_same_bytes_as_of_the_merged_checkpoint(folders, tmp_path):
    root, adapter, merged = folders
    report = quantize_checkpoint(root, tmp_path / "a", lora=adapter, **OPTIONS)
    quantize_checkpoint(merged, tmp_path / "b", **OPTIONS)
    quantize_checkpoint(root, tmp_path / "c", **OPTIONS)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert all(v != weights(tmp_path / "c")[k] for k, v in weights(tmp_path / "a").items())
    open_checkpoint(tmp_path / "a")
    # 2 layers, and those linears of the tower that are used; weight and bias of 3 linears.
    assert report["lora"]["merged"] == 2 * 2 + 4
    assert (report["lora"]["name"], report["lora"]["replaced"]) == ("ad|ap", 6)
    assert r"| LoRA adapter | `ad\|ap`, rank 8" in (tmp_path / "a" / "README.md").read_text()
    for file in ("README.md", "report.md"):
        assert report["lora"]["sha256"][:16] in (tmp_path / "a" / file).read_text()
        assert "LoRA" not in (tmp_path / "c" / file).read_text()


def test_plan_checks_the_adapter_without_the_base_s_weights(folders, tmp_path):
    root, adapter, _ = folders
    shutil.copytree(root, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(adapter, tmp_path / "adapter")
    plan = (
        "vila-quantize",
        tmp_path / "configs",
        "--plan",
        "--group-size",
        32,
        "--algorithm",
        "rtn",
    )
    assert invoke(*plan, "--lora", tmp_path / "adapter").returncode == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    refused = invoke(*plan, "--lora", tmp_path / "adapter")
    assert "adapter_config.json says rank 5" in assert_one_line(refused)


def test_finished_layers_of_another_adapter_are_refused(folders, tmp_path, monkeypatch):
    root, adapter, _ = folders
    options = QuantizeOptions(QuantScheme(32), "rtn", lora=adapter)

    def fail(*args):
        raise VilaDeployError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "build_report", fail)
        with pytest.raises(VilaDeployError, match="stopped"):
            pipeline.quantize(root, tmp_path / "out", options, resume=True)
    without = QuantizeOptions(QuantScheme(32), "rtn")
    with pytest.raises(VilaDeployError, match="the adapter of --lora has changed"):
        pipeline.quantize(root, tmp_path / "out", without, resume=True)
    pipeline.quantize(root, tmp_path / "out", options, resume=True)


def test_a_quantized_base_is_refused_as_such(folders, tmp_path):
    root, adapter, _ = folders
    quantize_checkpoint(root, tmp_path / "q", **OPTIONS)
    with pytest.raises(VilaDeployError, match="is quantized already"):
        quantize_checkpoint(tmp_path / "q", tmp_path / "again", lora=adapter, **OPTIONS)
