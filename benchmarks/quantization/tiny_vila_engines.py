"""Exact answers of engines of the trained tiny-vila, built here in each way of the CPU backend.

$ python benchmarks/quantization/tiny_vila_engines.py CHECKPOINT --results FILE

CHECKPOINT is tiny-vila quantized to 4 bits. A JSON line for each choice of activations and output
head has the share of right greedy answers to held-out questions, in all and by kind.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vila_deploy.bench.measure import commit, device_name, versions
from vila_deploy.builder import build_engine
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.runtime.conversation import Conversation
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.progress import progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "tiny-vila"))

from tiny_vila.questions import Question, held_out
from tiny_vila.scoring import score

# Activations, output head and vision tower; the first is what engines had before there was a
# choice, the last the default.
CHOICES = (
    ("int8x2", "fp16", "fp16"),
    ("int8", "fp16", "fp16"),
    ("int8", "int8", "fp16"),
    ("int8", "int8", "int8"),
)


def exact_answers(engine_folder: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the share of right greedy answers, in all and by kind."""
    with open_engine(engine_folder) as engine, progress(len(questions), "asking") as advance:
        session, tokenizer = engine.session, engine.tokenizer
        assert tokenizer is not None

        def answer(images: Sequence[Image.Image], prompt: str) -> str:
            conversation = Conversation(session, tokenizer, engine.model, session.max_seq_len)
            return conversation.ask(prompt, list(images), SamplingParams(max_new_tokens=96)).text

        result = score(answer, questions, on_answer=advance)
    by_kind = {kind: result.right[kind] / asked for kind, asked in result.asked.items()}
    return {"questions": len(questions), "exact_match": result.accuracy, "by_kind": by_kind}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument(
        "--last", type=int, default=len(CHOICES), help="of the choices, only the last so many"
    )
    parser.add_argument("--results", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    questions = held_out(options.questions)
    for activations, head, vision in CHOICES[-options.last :]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "engine"
            build_engine(
                options.checkpoint, folder, "cpu",
                lm_head=head, activations=activations, vision=vision,
            )  # fmt: skip
            row = {
                "what": "exact answers of a CPU engine",
                "model": "tiny-vila int4",
                "activations": activations,
                "lm_head": head,
                "vision": vision,
                **exact_answers(folder, questions),
                "label": "measured",
                "device": device_name(),
                "versions": versions(),
                "commit": commit(),
            }
        print(json.dumps(row), flush=True)
        if options.results is not None:
            with options.results.open("a", encoding="utf-8") as results:
                results.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
