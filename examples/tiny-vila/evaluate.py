"""Scores a tiny-vila checkpoint on held-out questions, in fp32 or rounded to 4 bits."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from tiny_vila.model import load
from tiny_vila.questions import Question, held_out
from tiny_vila.scoring import score


def rounded(weight: Tensor, group_size: int = 128) -> Tensor:
    """The nearest of 16 evenly spaced values between each group's smallest and largest weight."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True)
    step = (high.clamp(min=0) - low).clamp(min=1e-5) / 15
    zero = (-low / step).round().clamp(0, 15)
    return (((groups / step).round() + zero).clamp(0, 15) - zero).mul(step).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--kind", action="append", help="only this kind; repeatable")
    parser.add_argument("--rtn", action="store_true", help="decoder linears rounded to 4 bits")
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers")
    options = parser.parse_args()
    model = load(options.checkpoint)
    if options.rtn:
        for module in model.llm.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = rounded(module.weight.data)

    def show(question: Question, given: str) -> None:
        print(f"{question.prompt!r}: {given!r}, right is {question.answer!r}")

    questions = held_out(options.questions, options.kind)
    with torch.inference_mode():
        result = score(model.answer, questions, show if options.wrong else None)
    print(result.table())


if __name__ == "__main__":
    main()
