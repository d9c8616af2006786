"""README.md of a quantized checkpoint: front matter, figures, the original's licence."""

import shutil

import pytest

from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize import pipeline
from vila_deploy.quantize.model_card import model_card
from vila_deploy.quantize.options import QuantizeOptions


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def report(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("q") / "out"
    report = pipeline.quantize(root, out, QuantizeOptions(QuantScheme(64), "rtn"))
    assert (out / "README.md").read_text("utf-8") == model_card(open_checkpoint(root), report)
    return report


def front_matter(text):
    first, *lines = text.split("\n")
    assert first == "---"
    return lines[: lines.index("---")]


def card(root, report, readme=None):
    if readme is not None:
        (root / "README.md").write_bytes(readme)
    return model_card(open_checkpoint(root), report)


def test_says_what_it_is_and_how_to_run_it(root, report):
    text = card(root, report)
    assert front_matter(text) == [
        "pipeline_tag: image-text-to-text", "tags:",
        "- vila", "- vila-deploy", "- rtn", "- 4-bit", "- int4",
    ]  # fmt: skip
    for part in ("vila-build-engine FOLDER", "vila-chat ENGINE", "RTN, 4 bits, groups of 64",
                 report["checkpoint_fingerprint"][:16], "Not evaluated."):  # fmt: skip
        assert part in text
    assert "seconds" not in text, "the card is the same for every run"


def test_takes_the_licence_of_the_original(root, report, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    readme = b'---\nlicense: "cc-by-nc-4.0"\nlicense_link: LICENSE\ntags:\n- x\n---\nlicense: no\n'
    lines = front_matter(card(copy, report, readme))
    assert lines[:2] == ["license: cc-by-nc-4.0", "license_link: LICENSE"]


@pytest.mark.parametrize(
    "readme",
    [
        b"",
        b"# Model\nlicense: mit\n",
        b"---\nlicense: mit\n",
        b"---\nlicense: [mit, other]\n---\n",
        b"---\nlicense: &a {x: 1}\n---\n",
        b"---\nlicense: mit\x1b[2J\n---\n",
        b"\xff\xfe---\x00" * 50,
        b"---\n" + b"license: mit\n" * 100_000 + b"---\n",
    ],
)
def test_hostile_cards_give_no_licence(root, report, tmp_path, readme):
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    assert not [line for line in front_matter(card(copy, report, readme)) if "license" in line]


def test_names_the_base_where_the_hub_keeps_it(root, report, tmp_path):
    folder = tmp_path / "models--Some-Lab--VILA1.5-3b" / "snapshots" / ("0123abcd" * 5)
    shutil.copytree(root, folder)
    lines = front_matter(card(folder, report))
    assert lines[:2] == ["base_model: Some-Lab/VILA1.5-3b", "base_model_relation: quantized"]
