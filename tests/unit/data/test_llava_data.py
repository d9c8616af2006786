"""Calibration on the .json that LLaVA and VILA are fine-tuned on."""

import json

import pytest
import torch
from PIL import Image

from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.data.data_size import data_size
from vila_deploy.data.embed import SampleTokenizer
from vila_deploy.data.examples import Example, load_examples, load_held_out
from vila_deploy.quantize import quantize_checkpoint
from vila_deploy.quantize.calibrate import calibrate
from vila_deploy.quantize.data_warnings import data_warnings
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.utils.errors import VilaDeployError

COLOURS = ("red", "green", "blue")


def message(speaker, text):
    return {"from": speaker, "value": text}


def row(*texts, **more):
    speakers = ("human", "gpt") * len(texts)
    return {"id": "x", "conversations": list(map(message, speakers, texts)), **more}


def write(path, rows):
    """Write rows as a list (.json) or a line each (.jsonl)."""
    lines = "\n".join(map(json.dumps, rows))
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows, indent=1), "utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("made") / "tiny", layers=1))


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (40, 30), colour).save(tmp_path / "photos" / f"{colour}.png")
    return tmp_path


def same_data(folder):
    """Write the same data in both forms, with images and without; return .json and .jsonl."""
    pairs = [(f"Name colour number {i}, please.", f"It is the {i}th.") for i in range(30)]
    about_images = [
        (f"<image>\nWhich colour, {c}?", f"It is {c}.", f"photos/{c}.png") for c in COLOURS
    ]
    about_images.append(("Without a marker?", "In front.", "photos/red.png"))
    llava = [row(*pair) for pair in pairs]
    llava += [row(question, answer, image=image) for question, answer, image in about_images]
    ours = [{"text": question, "answer": answer} for question, answer in pairs]
    ours += [{"text": q, "answer": a, "image": image} for q, a, image in about_images]
    return write(folder / "train.json", llava), write(folder / "ours.jsonl", ours)


def test_same_bytes_as_the_same_data_in_our_own_form(checkpoint, photos, tmp_path):
    outputs = []
    for number, file in enumerate(same_data(photos)):
        out = tmp_path / f"out-{number}"
        quantize_checkpoint(checkpoint.root, out, calib=file, no_eval=True, group_size=64)
        weights = sorted(out.rglob("*.safetensors"))
        outputs.append([weight.read_bytes() for weight in weights])
    assert outputs[0] == outputs[1]
    assert outputs[0]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "TRAIN.JSON"])
def test_rows_are_a_list_or_a_line_each(checkpoint, photos, name):
    llava, ours = same_data(photos)
    file = write(photos / name.lower(), json.loads(llava.read_text("utf-8"))).rename(photos / name)
    examples, expected = load_examples(file, None), load_examples(ours, None)
    result, reference = (calibrate(checkpoint, data, seed=0) for data in (examples, expected))
    assert result.sha256 == reference.sha256
    assert all(map(torch.equal, result.embeds, reference.embeds))
    assert result.images == len(COLOURS)


def test_several_turns_are_one_conversation(checkpoint, photos):
    texts = ("<image>\nWhat?", "Red.", "And <image>?", "Blue.", "Sure?", "Yes.")
    images = ["photos/red.png", "photos/blue.png"]
    (example,) = load_held_out(write(photos / "t.json", [row(*texts, image=images)]))
    assert example.turns == (("<image>\nWhat?", "Red."), ("And <image>?", "Blue."))
    assert (example.text, example.answer) == ("Sure?", "Yes.")
    tokenizer = SampleTokenizer(checkpoint)
    sequence = tokenizer.conversation(example)
    decode = tokenizer.tokenizer.decode
    first, second, third = map(decode, sequence.text_chunks)
    assert first.endswith("USER: ")
    assert second.strip() == "What? ASSISTANT: Red. USER: And"
    assert third.strip() == "? ASSISTANT: Blue. USER: Sure? ASSISTANT: Yes."
    assert decode(sequence.text_chunks[-1][-sequence.answer_tokens :]).strip() == "Yes."
    assert calibrate(checkpoint, [example], seed=0).images == 2


def test_images_without_markers_come_before_the_first_question(checkpoint, photos):
    unmarked = row("What?", "Red.", "Sure?", "Yes.", image="photos/red.png")
    marked = row("<image>\nWhat?", "Red.", "Sure?", "Yes.", image="photos/red.png")
    digests = [
        calibrate(checkpoint, load_held_out(write(photos / "t.json", [data])), seed=0).sha256
        for data in (unmarked, marked)
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("own_form", [False, True])
def test_every_placeholder_of_an_image_is_a_marker(checkpoint, photos, own_form):
    def digest(*placeholders):
        question = "".join(f"{p}\nWhat?" for p in placeholders)
        images = [f"photos/{colour}.png" for colour in COLOURS[: len(placeholders)]]
        data = row(question, "Red.", image=images)
        if own_form:
            data = {"text": question, "answer": "Red.", "image": images}
        examples = load_held_out(write(photos / "t.json", [data]))
        return calibrate(checkpoint, examples, seed=0).sha256

    assert digest("<image-placeholder>") == digest("<image>")
    assert digest("<image-placeholder>", "<image>") == digest("<image>", "<image>")


def test_turns_count_for_the_plan_and_as_seen(checkpoint, capsys):
    short, long = Example("q", "a"), Example("q", "a", turns=(("x" * 400, "y" * 400),))
    sizes = [data_size(checkpoint.config, [example], 8).tokens for example in (short, long)]
    assert sizes[1] >= sizes[0] + 200
    options = QuantizeOptions(text_only=True)
    assert len(data_warnings(options, [long], [short])) == 1
    assert "1 of 1 evaluation examples" in data_warnings(options, [long], [long])[1]
    capsys.readouterr()


def test_what_the_originals_leave_out_or_allow(photos):
    data = [
        {"conversations": [message("system", "Be short."), message("human", "a"),
                           message("gpt", "b")]},
        {"conversations": [message("gpt", "Hello."), message("user", "a"),
                           message("assistant", "b")]},
        row("a", "b", image=None, model="m", width=3),
        row("a", "b", image=[], video=""),
    ]  # fmt: skip
    examples = load_held_out(write(photos / "t.json", data))
    assert examples == [Example("a", "b")] * 4
    (unanswered,) = load_held_out(write(photos / "u.json", [row("a", "b", "c")]))
    assert (unanswered.text, unanswered.answer, unanswered.turns) == ("c", None, (("a", "b"),))
    assert not unanswered.is_plain


def test_image_paths_are_relative_to_the_file_or_the_image_folder(photos, tmp_path):
    elsewhere = tmp_path / "annotations"
    elsewhere.mkdir()
    by_name = [row("<image>\nWhat?", "Red.", image="red.png")]
    file = write(elsewhere / "train.json", by_name)
    with pytest.raises(VilaDeployError, match=r"red.png: no such image; looked in .*--calib-image"):
        load_examples(file, None)
    examples = load_examples(file, photos / "photos")
    # The folder is where the paths lead to, no set of images to ask the built-in questions about.
    assert [e.text for e in examples if e.images] == ["<image>\nWhat?"]
    (held_out,) = load_held_out(file, photos / "photos")
    assert held_out.images[0].name == str(photos / "photos" / "red.png")
    absolute = [row("<image>\nWhat?", "Red.", image=str(photos / "photos" / "red.png"))]
    examples = load_examples(write(elsewhere / "absolute.json", absolute), None)
    assert examples[0].images[0].load().size == (40, 30)
    # As before: images that the texts don't name are examples of their own.
    beside = write(photos / "photos" / "own.jsonl", [{"text": "What?", "image": "red.png"}])
    examples = load_examples(beside, photos / "photos")
    assert sum(bool(e.images) for e in examples) == 1 + len(COLOURS)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"conversations": []}, r"must hold a list of rows, found \{'conversations'"),
        ([[]], r"row 1: must be an object with a string `text`, found \[\]"),
        ([{"id": 1}], "row 1: must be an object with a string `text`"),
        ([row("a", "b"), {"conversations": {}}], "row 2: conversations must be a list"),
        ([{"conversations": []}], "conversations must be a list"),
        ([{"conversations": [message("gpt", "b")]}], "conversations holds no question"),
        ([{"conversations": [{"role": "user", "content": "a"}]}], "strings `from` and `value`"),
        ([{"conversations": [message("human", 3)]}], "strings `from` and `value`"),
        ([{"conversations": ["a"]}], "strings `from` and `value`, found 'a'"),
        ([{"conversations": [message("human", "a"), message("human", "b")]}], "as message 2"),
        ([{"conversations": [message("human", "a"), message("bot", "b")]}], "found 'bot'"),
        ([row("<image>\na", "b")], "1 <image> markers for 0 images"),
        ([row("<image>\na", "b", image=["a.png", "b.png"])], "1 <image> markers for 2 images"),
        ([row("a", "<image>", image="a.png")], "some in answers"),
        ([row("a", "b", image=3)], "image must be a path"),
        ([row("<video>\na", "b", video="a.mp4")], "has a video: only texts and images"),
        ([row("<video>\na", "b", image="a.png")], "has a <video>: only texts and images"),
        ([{"text": "a <vila/video>"}], "row 1: has a <vila/video>: only texts and images"),
        ([row("a", "b", "c", "<video>")], "has a <video>: only texts and images"),
        ([row("<image-placeholder>\na", "b")], "1 <image> markers for 0 images"),
        ([row("a", "<image-placeholder>", image="a.png")], "some in answers"),
    ],
)
def test_refuses_what_is_no_row(tmp_path, data, expected):
    file = write(tmp_path / "train.json", data)
    with pytest.raises(VilaDeployError, match=expected) as error:
        load_examples(file, None)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", '{"text": "a"}\n{"text": "b"}', "[" * 100_000])
def test_refuses_what_is_no_json(tmp_path, content):
    (tmp_path / "train.json").write_text(content, "utf-8")
    with pytest.raises(VilaDeployError, match=r"train\.json: is not valid JSON"):
        load_examples(tmp_path / "train.json", None)


@pytest.mark.parametrize("name", ["data.csv", "data.parquet", "data.yaml", "data.pdf", "data"])
def test_other_suffixes_are_never_taken_for_prose(tmp_path, name):
    (tmp_path / name).write_text("id,text\n1,hello\n", "utf-8")
    expected = r"is no kind of text file that is read; give a UTF-8 file: \.txt, \.jsonl, \.json"
    for load in (load_held_out, lambda path: load_examples(path, None)):
        with pytest.raises(VilaDeployError, match=expected):
            load(tmp_path / name)
