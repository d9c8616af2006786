"""Write the tables of README and docs from results/*.jsonl, published figures and --plan's code.

$ python benchmarks/tables.py            # rewrites every table between its markers
$ python benchmarks/tables.py --check    # exit code 1 if a page is stale, and which

A page marks a table with `<!-- table: NAME -->` and `<!-- /table -->`; TABLES has the names.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Python looks for modules beside a script only.
    sys.path.insert(0, str(REPOSITORY))

from benchmarks.page_tables import (  # noqa: E402
    accuracy,
    builds,
    cpu_engine,
    kernels,
    llamacpp,
    models,
    precision,
    predicted,
    serving,
    speed,
)
from benchmarks.page_tables.options import COMMANDS, options  # noqa: E402

PAGES = ("README.md", "benchmarks/README.md", "examples/*/README.md", "docs/*.md")
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.S)
TABLES: dict[str, Callable[[], str]] = {
    "models": models.models,
    "video-models": models.video_models,
    "memory": models.memory,
    "targets": models.targets,
    "speed": speed.speed,
    "speed-cpu": speed.speed_cpu,
    "authors-table": speed.authors_table,
    "published-speed": speed.published_speed,
    "published-ttft": speed.published_ttft,
    "published-accuracy": speed.published_accuracy,
    "accuracy": accuracy.accuracy,
    "accuracy-baselines": accuracy.accuracy_baselines,
    "accuracy-processors": accuracy.accuracy_processors,
    "ablation-kl": accuracy.ablation_kl,
    "ablation-error": accuracy.ablation_error,
    "rounding-kl": accuracy.rounding_kl,
    "rounding-ideas": accuracy.rounding_ideas,
    "mixed-bits": accuracy.mixed_bits,
    "tiny-vila": accuracy.tiny_vila,
    "tiny-vila-kinds": accuracy.tiny_vila_kinds,
    "headline": accuracy.headline,
    "cpu-choices": cpu_engine.cpu_choices,
    "cpu-choices-answers": cpu_engine.cpu_choices_answers,
    "cpu-engine": cpu_engine.cpu_engine,
    "cpu-llamacpp": cpu_engine.cpu_llamacpp,
    "llamacpp-accuracy": llamacpp.llamacpp_accuracy,
    "llamacpp-arithmetic": llamacpp.llamacpp_arithmetic,
    "llamacpp-slots": llamacpp.llamacpp_slots,
    "module-precision": accuracy.module_precision,
    "module-support": precision.module_support,
    "module-sizes": precision.module_sizes,
    "serving-true-shapes": serving.serving_true_shapes,
    "serving-beside": serving.serving_beside,
    "serving-kinds": serving.serving_kinds,
    "kernel-instructions": kernels.kernel_instructions,
    "kernel-attention": kernels.kernel_attention,
    "predicted-modes": predicted.predicted_modes,
    "predicted-sequences": predicted.predicted_sequences,
    "prompt-launches": kernels.prompt_launches,
    "quantize-cost": builds.quantize_cost,
    "tensorrt-graphs": builds.tensorrt_graphs,
    "tensorrt-engines": builds.tensorrt_engines,
    **{f"options-{name}": partial(options, name) for name in COMMANDS},
}


def pages() -> list[Path]:
    """Return the pages that may have tables."""
    return sorted(path for pattern in PAGES for path in REPOSITORY.glob(pattern))


def rendered(text: str) -> str:
    """Return a page with every marked table written anew.

    Raises:
        KeyError: a marker names no table.
    """
    return MARKED.sub(lambda m: m[1] + TABLES[m["name"]]() + m[4], text)


def stale() -> list[Path]:
    """Return the pages that are not as `main` would write them."""
    texts = {path: path.read_text("utf-8") for path in pages()}
    return [path for path, text in texts.items() if rendered(text) != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if stale")
    if parser.parse_args().check:
        names = ", ".join(str(path.relative_to(REPOSITORY)) for path in stale())
        sys.exit(f"stale: {names}; run python benchmarks/tables.py" if names else 0)
    for path in pages():
        text = path.read_text("utf-8")
        path.write_text(rendered(text), "utf-8")


if __name__ == "__main__":
    main()
