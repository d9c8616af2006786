"""`--bits-per-weight` for the output head and the vision tower: measured, given, written, read."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.damage import refused, set_key
from tests.support.tiny import make_checkpoint
from vila_deploy.builder.resolve import BuildOptions, resolve_build
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.tensor_schema import tower_linears
from vila_deploy.data.embed import IMAGE_TOKEN_ID, MultimodalEmbedder, SampleTokenizer
from vila_deploy.data.examples import load_examples
from vila_deploy.formats.base import HEAD_LINEAR, QuantizedLinear, QuantScheme
from vila_deploy.formats.int8_linear import int8_scale, round_int8
from vila_deploy.formats.rtn import round_to_nearest
from vila_deploy.model.llm import LanguageModel
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.quantize import pipeline
from vila_deploy.quantize.bit_choice import BitChoice, choose_bits
from vila_deploy.quantize.calibrate import calibrate
from vila_deploy.quantize.options import LM_HEAD, VISION, QuantizeOptions, quantize_options
from vila_deploy.quantize.sensitivity import measure_sensitivities
from vila_deploy.utils.device import CPU
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers.convert import convert

SCHEME = QuantScheme(32)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about four images."""
    folder = tmp_path_factory.mktemp("data")
    generator, rows = torch.Generator().manual_seed(0), []
    for number in range(4):
        noise = torch.randint(0, 256, (42, 42, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
        answer = "the red house on the hill by the sea"
        rows.append({"text": "what is this?", "answer": answer, "image": f"{number}.png"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "root")


def options_of(questions: Path, **changes: Any) -> QuantizeOptions:
    values = {
        "scheme": SCHEME, "algorithm": "rtn", "calib": questions / "questions.jsonl",
        "calib_images": questions, "evaluate": False, "bits_per_weight": 4.5, "formats": ("gguf",),
        **changes,
    }  # fmt: skip
    return QuantizeOptions(**values)


class _Noisy:
    """A tower's weights with noise in its linears, uniform over so many int8 steps."""

    def __init__(self, checkpoint: Checkpoint, steps: float):
        self._base, self._steps = checkpoint.vision, steps
        self._linears = tower_linears(checkpoint.config)
        self._generator = torch.Generator().manual_seed(0)

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self._base.tensor(name).float()
        if name.removesuffix(".weight") not in self._linears:
            return tensor
        noise = torch.rand(tensor.shape, generator=self._generator) - 0.5
        return tensor + noise * int8_scale(tensor).float()[:, None] * self._steps


def test_predicted_kl_of_a_tower_is_what_noise_costs(
    root: Path, questions: Path, tmp_path: Path
) -> None:
    """Noise of 32 int8 steps, whose KL is 1024 times that of rounding; all linears at once."""
    checkpoint = open_checkpoint(root)
    examples = load_examples(questions / "questions.jsonl", questions)
    data = calibrate(checkpoint, examples, 0)
    found = measure_sensitivities(
        checkpoint, data, SCHEME, (4, 8), algorithm="rtn", seed=0, device=CPU, scratch=tmp_path,
        modules=(VISION,),
    )  # fmt: skip
    linears = tower_linears(checkpoint.config)
    assert linears.keys() <= found.keys()
    assert HEAD_LINEAR not in found
    tokenizer = SampleTokenizer(checkpoint)
    sequences = [tokenizer.conversation(example) for example in examples]
    model = LanguageModel(checkpoint.config.llm, checkpoint.llm)

    def predictions(vision: Any) -> list[torch.Tensor]:
        other = copy.copy(checkpoint)
        other.vision = vision
        embedder = MultimodalEmbedder(other, sequences, CPU)
        embeds = [embedder.embeds(sequence, other) for sequence in sequences]
        texts = [embedder.ids(sequence) != IMAGE_TOKEN_ID for sequence in sequences]
        return [
            model(rows)[text].double().log_softmax(1)
            for rows, text in zip(embeds, texts, strict=True)
        ]

    exact, changed = (
        torch.cat(predictions(v)) for v in (checkpoint.vision, _Noisy(checkpoint, 32))
    )
    measured = float((exact.exp() * (exact - changed)).sum(1).mean()) / 32**2
    predicted = sum(found[name][8] for name in linears)
    assert 0.4 < predicted / measured < 2.5
    assert all(found[name][16] == 0 for name in linears)


def test_predicted_kl_of_the_head_is_what_rounding_costs(
    root: Path, questions: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(root)
    llm = checkpoint.config.llm
    data = calibrate(checkpoint, load_examples(questions / "questions.jsonl", questions), 0)
    found = measure_sensitivities(
        checkpoint, data, SCHEME, (4, 8), algorithm="rtn", seed=0, device=CPU, scratch=tmp_path,
        modules=(LM_HEAD,),
    )  # fmt: skip
    head = checkpoint.llm.tensor("lm_head.weight").double()
    # Of 4 bits, 17² times as large a step as of 8, and so large enough for second differences.
    coarse = round_to_nearest(head.float(), QuantScheme(32, symmetric=True)).dequantize().double()
    model, kl = LanguageModel(llm, checkpoint.llm), []
    model.lm_head = torch.eye(llm.hidden_size)
    starts = torch.tensor([0, *map(len, data.embeds)]).cumsum(0).tolist()
    for embeds, start in zip(data.embeds, starts, strict=False):
        states = model(embeds)[~data.is_image[start : start + len(embeds)]].double()
        exact, changed = ((states @ weight.T).log_softmax(1) for weight in (head, coarse))
        kl.append((exact.exp() * (exact - changed)).sum(1))
    measured = float(torch.cat(kl).mean())
    assert 0.6 < found[HEAD_LINEAR][8] * (127 / 7) ** 2 / measured < 1.6


def test_both_are_written_and_read_back(root: Path, questions: Path, tmp_path: Path) -> None:
    formats = ("gguf", "compressed-tensors")
    report = pipeline.quantize(root, tmp_path / "out", options_of(questions, formats=formats))
    choice = report["bit_choice"]
    original = open_checkpoint(root)
    linears = tower_linears(original.config)
    given = {name: row["bits"] for name, row in choice["head_and_tower"].items()}
    int8 = [name for name in linears if given[name] == 8]
    assert given.keys() == {HEAD_LINEAR, *linears}
    assert {given[HEAD_LINEAR], *given.values()} <= {8, 16}
    assert len(int8) > len(linears) / 2
    assert choice["float16"] == {}
    assert 4.3 < choice["mean_bits"] <= 4.5
    rows = {item["name"]: item for item in report["components"]}
    assert rows["llm head"]["bits"] == 8.5
    assert 8 < rows["vision tower"]["bits"] < 16
    reasons = {part["name"]: part["reason"] for part in report["not_quantized"]}
    assert "llm head" not in reasons
    assert reasons["vision tower"].startswith("embeddings, norms, biases")
    assert reasons["vision tower"].endswith("; the rest is in int8")
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "- output head in 8 bits" in text
    assert f"- linears of the vision tower: {len(int8)} in 8 bits" in text
    files = (folder / "vision_tower/model.safetensors" for folder in (root, tmp_path / "out/gguf"))
    before, after = (file.stat().st_size for file in files)
    # A byte less a weight, but for scales and their headers.
    assert before - after > 0.8 * sum(math.prod(linears[name]) for name in int8)
    convert(tmp_path / "out" / "gguf", tmp_path / "again", ["compressed-tensors"])
    folders = [*(tmp_path / "out" / name for name in formats), tmp_path / "again"]
    assert set(open_checkpoint(folders[0]).config.vision.int8_linears) == {*int8}
    head = original.llm.tensor("lm_head.weight").float()
    expected_head = round_to_nearest(head, QuantScheme(32, symmetric=True, bits=8))
    for folder in folders:
        checkpoint = open_checkpoint(folder)
        stored = checkpoint.llm.linear(HEAD_LINEAR)
        assert isinstance(stored, QuantizedLinear)
        assert torch.equal(stored.q, expected_head.q)
        found = checkpoint.llm.tensor("lm_head.weight")
        assert torch.equal(found, expected_head.dequantize())
        for name in original.vision.names():
            expected = original.vision.tensor(name)
            if name.removesuffix(".weight") in int8:
                expected = round_int8(expected, name).dequantize()
            assert torch.equal(checkpoint.vision.tensor(name), expected), name
    with pytest.raises(VilaDeployError, match="awq holds no vision tower in int8"):
        convert(folders[0], tmp_path / "awq", ["awq"])


def test_the_evaluation_sees_the_int8_tower(root: Path, questions: Path, tmp_path: Path) -> None:
    """With layers in 8 bits answers about images change more where the tower is in int8 too."""
    kl = {}
    for kept in ((VISION, LM_HEAD), (LM_HEAD,)):
        options = options_of(
            questions, bits_per_weight=8, keep_fp16=kept, evaluate=True,
            eval=questions / "questions.jsonl",
        )  # fmt: skip
        report = pipeline.quantize(root, tmp_path / "-".join(kept), options)
        kl[kept] = report["evaluation"]["quality"]["image"]["kl_mean"]
        asked = {"lm-head": "asked for by --keep-fp16", "vision": "asked for by --keep-fp16"}
        assert report["bit_choice"]["float16"] == {name: asked[name] for name in kept}
    assert kl[LM_HEAD,] != kl[VISION, LM_HEAD]


def test_what_can_not_be_in_the_search_is_said(questions: Path, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "root", tied=True)
    report = pipeline.quantize(root, tmp_path / "out", options_of(questions, text_only=True))
    assert report["bit_choice"]["head_and_tower"] == {}
    assert report["bit_choice"]["float16"] == {
        "lm-head": "it is the embedding table, which is looked up in float16",
        "vision": "there are no images among the calibration data to measure it on",
    }
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "- lm-head in float16: it is the embedding table" in text
    assert not open_checkpoint(tmp_path / "out").config.vision.int8_linears


def test_more_than_8_bits_is_paid_from_the_budget() -> None:
    layers = {name: {4: 1.0, 8: 0.01} for name in ("a", "b", "c", "d")}
    modules = {HEAD_LINEAR: {8: 1e-6, 16: 0.0}, "tower": {8: 10.0, 16: 0.0}}
    sizes = {**dict.fromkeys(layers, 64), HEAD_LINEAR: 64, "tower": 64}
    choice = choose_bits(layers, sizes, 7, modules)
    assert choice.module_bits == {HEAD_LINEAR: 8, "tower": 16}
    # 3 · 4 · 64 bits are to be given: 8 · 64 to the tower, 4 · 64 to one linear.
    assert sorted(choice.bits.values()) == [4, 4, 4, 8]
    assert choice.int8_tower_linears == ()
    assert choice.scheme(QuantScheme(64)).linear_bits.keys() >= {HEAD_LINEAR}
    assert BitChoice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


def test_engines_take_them(root: Path, questions: Path, tmp_path: Path) -> None:
    """GPU backends too, as the layers are all in 4 bits; modules that they have are int8."""
    out = tmp_path / "out"
    options = options_of(questions, bits_per_weight=4, scheme=QuantScheme(64))
    pipeline.quantize(root, out, options)
    for target, backend in (("rtx4090", "native"), ("rtx4090", "tensorrt"), ("orin", "tensorrt")):
        build = resolve_build(out, BuildOptions(target, backend))
        modules = build.request.module_precision
        assert modules.vision == ("fp16" if target == "orin" else "int8")
        assert modules.lm_head == "int8"
    session = ReferenceSession(open_checkpoint(out))
    image = session.encode_images(torch.zeros(1, 3, 42, 42).numpy())[0]
    assert torch.isfinite(torch.from_numpy(image)).all()


def test_int8_is_kept_where_it_is_rounded_again() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 96, generator=generator).half() * torch.logspace(-4, 3, 64)[:, None]
    once = round_int8(weight, "w")
    again = round_int8(once.dequantize(), "w")
    assert torch.equal(once.q, again.q)
    assert torch.equal(once.scale, again.scale)


def test_keep_fp16_needs_the_search(questions: Path) -> None:
    with pytest.raises(VilaDeployError, match="--keep-fp16 is for --bits-per-weight"):
        quantize_options(
            algorithm="rtn", group_size=64, symmetric=False, calib=None, calib_images=None,
            text_only=False, eval=None, no_eval=False, formats=("gguf",), device="cpu",
            prompt_template=None, seed=0, lora=None, keep_fp16=(VISION,),
        )  # fmt: skip


@pytest.fixture(scope="module")
def int8_tower(root: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "out"
    pipeline.quantize(root, out, options_of(questions, keep_fp16=(LM_HEAD,)))
    return out


CONFIG = "vision_tower/config.json"
NAME = "vision_model.encoder.layers.0.mlp.fc1"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "awq"}, "unknown quantization method"),
    "another format": ({"config_groups": {}, "format": "x"}, "unknown format of a vision tower"),
    "no groups": ({"config_groups": {}}, "must be one, found 0"),
    "no object": ({"config_groups": 3}, "must be an object"),
    "4 bits": ({"weights": {"num_bits": 4}}, "must be an integer in 8..8"),
    "zero points": ({"weights": {"symmetric": False}}, "must be true"),
    "groups": ({"weights": {"strategy": "group"}}, "unknown strategy"),
    "activations": ({"input_activations": {"num_bits": 8}}, "only weights may be quantized"),
    "no names": ({"targets": []}, "must be names of linears"),
    "a class": ({"targets": ["Linear"]}, "a linear that this tower lacks"),
    "twice": ({"targets": [NAME, NAME]}, "names a linear twice"),
    "long": ({"targets": ["x" * 10**5]}, "must be names of linears"),
    "a number": ({"targets": [3]}, "must be names of linears"),
    "one too few": ({"targets": [NAME]}, "is I8, must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_is_one_line(case: str, int8_tower: Path, tmp_path: Path) -> None:
    shutil.copytree(int8_tower, tmp_path / "c")
    values = json.loads((tmp_path / "c" / CONFIG).read_text("utf-8"))["quantization_config"]
    changes, message = WRONG[case]
    group = values["config_groups"]["group_0"]
    for key, value in changes.items():
        if key == "weights":
            group["weights"].update(value)
        else:
            (group if key in ("targets", "input_activations") else values)[key] = value
    set_key(CONFIG, "quantization_config", values)(tmp_path / "c")
    assert message in refused(tmp_path / "c")


def test_it_is_not_quantized_again(int8_tower: Path, questions: Path, tmp_path: Path) -> None:
    options = replace(options_of(questions), formats=("gguf",))
    with pytest.raises(VilaDeployError, match="quantized already"):
        pipeline.quantize(int8_tower, tmp_path / "out", options)
