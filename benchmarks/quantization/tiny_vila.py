"""Calibration with images beside calibration with text alone, on the trained tiny-vila.

$ python benchmarks/quantization/tiny_vila.py          # default algorithm, and rtn to compare
$ python benchmarks/quantization/tiny_vila.py --algorithm awq --symmetric
$ python benchmarks/quantization/tiny_vila.py --group-size 64 --bits-per-weight 4.5

Calibrates on tiny-vila's calibration questions, once with their images and once without. Prints
a JSON line for fp32 and for each quantization: exact answers to 500 held-out questions by kind, and
perplexity, KL and top-1 agreement on their answers, as in report.json. The lines go into
benchmarks/results/tiny-vila-quantization.jsonl too. With --bits-per-weight it compares 4 bits with
mixed precision instead, calibrated on the built-in data, for quantization-mixed-bits.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vila_deploy.bench.conditions import commit, device_name
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.data.examples import Example, LazyImage
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import OneSlot
from vila_deploy.eval.data import EvaluationData
from vila_deploy.eval.fidelity import evaluate
from vila_deploy.formats.base import QuantScheme
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.chat_template import IMAGE_MARKER
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.quantize.options import ALGORITHMS, MODULES, QuantizeOptions
from vila_deploy.quantize.pipeline import quantize
from vila_deploy.quantize.report import versions
from vila_deploy.runtime.conversation import Conversation
from vila_deploy.utils.progress import progress

ROOT = Path(__file__).resolve().parents[2]
TINY_VILA, RESULTS = ROOT / "examples" / "tiny-vila", ROOT / "benchmarks" / "results"
OUTPUT = RESULTS / "tiny-vila-quantization.jsonl"
MIXED_BITS = RESULTS / "quantization-mixed-bits.jsonl"
CALIBRATION_QUESTIONS = 256
# Formats whose widths are chosen from, and what stays float16 beside the layers.
MIXES = {
    "4 bits": ("awq", MODULES),
    "4 and 8 bits": ("compressed-tensors", MODULES),
    "4, 5 and 8 bits": ("gguf", MODULES),
    "4, 5 and 8 bits, head and tower too": ("gguf", ()),
}
sys.path.insert(0, str(TINY_VILA))

from tiny_vila.questions import Question, calibration, held_out  # noqa: E402
from tiny_vila.scoring import score  # noqa: E402


def write_calibration(folder: Path, with_images: bool) -> Path:
    """The calibration questions as JSON lines, their images beside them or left out."""
    folder.mkdir()
    lines = []
    for number, question in enumerate(calibration(CALIBRATION_QUESTIONS)):
        line: dict[str, Any] = {"text": question.prompt, "answer": question.answer}
        if with_images:
            line["image"] = [f"{number}-{i}.png" for i in range(len(question.scenes))]
            for name, image in zip(line["image"], question.images, strict=True):
                image.save(folder / name)
        else:
            line["text"] = line["text"].replace(f"{IMAGE_MARKER}\n", "")
        lines.append(json.dumps(line) + "\n")
    file = folder / "questions.jsonl"
    file.write_text("".join(lines), "utf-8")
    return file


def examples(questions: Sequence[Question]) -> list[Example]:
    """Held-out questions with their right answers, to compare two models on."""
    found = []
    for number, question in enumerate(questions):
        images = question.images
        images = [
            LazyImage(f"{number}-{i}", lambda image=image: image) for i, image in enumerate(images)
        ]
        found.append(Example(question.prompt, question.answer, tuple(images)))
    return found


def exact_answers(root: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """The share of right greedy answers, in all and by kind, in PyTorch and float32."""
    checkpoint, tokenizer = open_checkpoint(root), load_tokenizer(root / "llm")
    session = OneSlot(ReferenceSession(checkpoint))
    model = ModelInfo.from_config(checkpoint.config, tokenizer)

    def answer(images: Sequence[Image.Image], prompt: str) -> str:
        conversation = Conversation(session, tokenizer, model, session.max_seq_len)
        return conversation.ask(prompt, list(images), SamplingParams(max_new_tokens=96)).text

    with progress(len(questions), "asking") as advance:
        result = score(answer, questions, on_answer=advance)
    by_kind = {kind: result.right[kind] / asked for kind, asked in result.asked.items()}
    return {"questions": len(questions), "exact_match": result.accuracy, "by_kind": by_kind}


def rows(
    algorithm: str, symmetric: bool, group_size: int, questions: Sequence[Question]
) -> Iterator[dict[str, Any]]:
    """One for fp32, one for each way to quantize."""
    checkpoint = TINY_VILA / "checkpoint"
    original = open_checkpoint(checkpoint)
    data = EvaluationData(original, examples(questions), own=True, max_sequences=len(questions))
    yield {"quantization": "fp32", **exact_answers(checkpoint, questions)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # "pictures" is a value in the results file.
        for kind, chosen in (("pictures", algorithm), ("text only", algorithm), ("none", "rtn")):
            text_only = kind == "text only"
            calib = None
            if kind != "none":
                calib = write_calibration(folder / f"data {kind}", not text_only)
            options = QuantizeOptions(
                QuantScheme(group_size, symmetric), chosen, calib,
                text_only=text_only, evaluate=False,
            )  # fmt: skip
            report = quantize(checkpoint, folder / kind, options)
            found = evaluate(original, open_checkpoint(folder / kind), data).to_json()
            yield {
                "quantization": chosen,
                "calibration": kind,
                "calibration_tokens": (report["calibration"] or {}).get("tokens"),
                "calibration_image_tokens": (report["calibration"] or {}).get("image_tokens"),
                "group_size": group_size,
                "symmetric": symmetric,
                **exact_answers(folder / kind, questions),
                "quality": found["quality"]["image"],
                "drift": found["layers"],
                "seconds": report["seconds"],
            }


def mixed_rows(
    algorithm: str,
    symmetric: bool,
    group_size: int,
    mean_bits: float,
    questions: Sequence[Question],
) -> Iterator[dict[str, Any]]:
    """One for 4 bits and for each of MIXES, with as many bits on average."""
    checkpoint = TINY_VILA / "checkpoint"
    original = open_checkpoint(checkpoint)
    data = EvaluationData(original, examples(questions), own=True, max_sequences=len(questions))
    for name, (format, kept) in MIXES.items():
        mixed = format != "awq"
        options = QuantizeOptions(
            QuantScheme(group_size, symmetric), algorithm, formats=(format,),
            bits_per_weight=mean_bits if mixed else None, keep_fp16=kept if mixed else (),
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            report = quantize(checkpoint, Path(folder) / "out", options)
            quantized = open_checkpoint(Path(folder) / "out")
            found = evaluate(original, quantized, data).to_json()
            answers = exact_answers(Path(folder) / "out", questions)
        quality = report["evaluation"]["quality"]
        yield {
            "mix": name,
            "mean_bits": report["bit_choice"]["mean_bits"] if mixed else 4,
            "algorithm": algorithm,
            "group_size": group_size,
            "symmetric": symmetric,
            "kl": {
                "built-in text": quality["text"]["kl_mean"],
                "built-in questions about images": quality["image"]["kl_mean"],
                f"{len(questions)} questions about images": found["quality"]["image"]["kl_mean"],
            },
            "output_bytes": report["output_bytes"],
            **answers,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=ALGORITHMS, default=QuantizeOptions().algorithm)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--bits-per-weight", type=float)
    options = parser.parse_args()
    questions = held_out(options.questions)
    common = {"label": "measured", "model": "tiny-vila", "device": device_name()}
    common |= {"versions": versions(), "commit": commit()}
    asked = (options.algorithm, options.symmetric, options.group_size)
    found, output = rows(*asked, questions), OUTPUT
    if options.bits_per_weight is not None:
        found, output = mixed_rows(*asked, options.bits_per_weight, questions), MIXED_BITS
    with output.open("a", encoding="utf-8") as file:
        for row in found:
            line = json.dumps({**common, **row})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()


if __name__ == "__main__":
    main()
