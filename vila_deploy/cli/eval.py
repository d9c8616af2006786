"""vila-eval: what an engine or a checkpoint scores, and how far it is from a reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vila_deploy.cli.common import EXIT_INTERRUPTED, FilePath, command, echo_json, fail, no_nan

if TYPE_CHECKING:
    from vila_deploy.cli.eval_run import Evaluation

FILE = FilePath()
# As in harness/, which takes longer to import than --help may.
TASKS = ("own", "mmmu", "textvqa", "pope", "scienceqa-img", "gqa", "mmbench")
METRICS = ("exact", "vqa", "choice", "anls")


@command("vila-eval")
@click.argument("model", type=FILE, metavar="ENGINE_OR_CHECKPOINT")
@click.option(
    "--data", type=FILE, metavar="DIR",
    help="Folder with questions.jsonl (question, answer, image, choices, …), or the local copy of "
    "a benchmark.",
)  # fmt: skip
@click.option(
    "--task", type=click.Choice(TASKS), default=TASKS[0], show_default=True,
    help="What DIR holds: questions of one's own, or a benchmark in its published files.",
)  # fmt: skip
@click.option(
    "--metric", type=click.Choice(METRICS),
    help="Of rows that name none: exact, vqa (VQA accuracy), anls (documents). Rows with choices "
    "are scored as MMMU does. Default: exact.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Ask the first so many questions only.")
@click.option(
    "--reference", type=FILE, metavar="MODEL",
    help="Engine or checkpoint to compare next-token distributions with: perplexity, KL and "
    "top-1 agreement on right answers and on --text.",
)  # fmt: skip
@click.option(
    "--text", type=FILE, metavar="FILE_OR_DIR",
    help="Texts for --reference, .txt or a folder of them. Default: built-in ones.",
)  # fmt: skip
@click.option(
    "--min-score", type=click.FloatRange(0, 100), metavar="PERCENT", callback=no_nan,
    help="Exit code 1 if the score is below.",
)  # fmt: skip
@click.option(
    "--max-kl", type=click.FloatRange(min=0), metavar="X", callback=no_nan,
    help="Exit code 1 if the mean KL of text or of answers about images is above X.",
)  # fmt: skip
@click.option(
    "-o", "--out", type=FILE, metavar="FILE",
    help="Write each answer with its score, one JSON object a line.",
)  # fmt: skip
@click.option(
    "--resume", is_flag=True, help="Go on from what an ended run has left in FILE.partial."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--slots", type=click.IntRange(1, 64),
    help="Questions answered at once by an engine. Default: as many as memory holds, at most 8.",
)  # fmt: skip
@click.option("--prompt-template", metavar="NAME", help="Of a checkpoint whose configs name none.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def main(
    model: Path,
    data: Path | None,
    task: str,
    metric: str | None,
    limit: int | None,
    reference: Path | None,
    text: Path | None,
    min_score: float | None,
    max_kl: float | None,
    out: Path | None,
    resume: bool,
    max_new_tokens: int,
    slots: int | None,
    prompt_template: str | None,
    as_json: bool,
) -> None:
    """Score ENGINE_OR_CHECKPOINT on questions, or compare it with a reference.

    A checkpoint is run by PyTorch, in float32 on the CPU. Answers are greedy.

    \b
    vila-eval vila-3b-cpu --data my-questions -o answers.jsonl --min-score 80
    vila-eval vila-3b-cpu --data MMMU --task mmmu -o answers.jsonl --resume
    vila-eval vila-3b-cpu --reference VILA1.5-3b --max-kl 0.1
    """
    _check_usage(data, task, metric, reference, text, min_score, max_kl, out, resume)
    from vila_deploy.cli.eval_run import Evaluation, Interrupted

    evaluation = Evaluation(
        model=model,
        data=data,
        task=task,
        metric=metric,
        limit=limit,
        reference=reference,
        text=text,
        out=out,
        resume=resume,
        max_new_tokens=max_new_tokens,
        slots=slots,
        prompt_template=prompt_template,
    )
    try:
        report = evaluation.run()
    except Interrupted as interrupt:
        click.echo(f"interrupted: {interrupt}", err=True)
        sys.exit(EXIT_INTERRUPTED)
    _show(report, as_json)
    _judge(evaluation, report, min_score, max_kl)


def _check_usage(
    data: Path | None,
    task: str,
    metric: str | None,
    reference: Path | None,
    text: Path | None,
    min_score: float | None,
    max_kl: float | None,
    out: Path | None,
    resume: bool,
) -> None:
    wrong = (
        (data is None and reference is None, "give --data to score, --reference to compare"),
        (data is None and task != TASKS[0], "--task needs --data, the folder of its files"),
        (data is None and min_score is not None, "--min-score needs --data"),
        (data is None and metric is not None, "--metric needs --data"),
        (metric is not None and task != TASKS[0], "--metric is for questions of one's own"),
        (reference is None and max_kl is not None, "--max-kl needs --reference"),
        (reference is None and text is not None, "--text needs --reference"),
        (out is None and resume, "--resume needs -o, beside which the answers are kept"),
    )
    for holds, problem in wrong:
        if holds:
            raise click.UsageError(problem)


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        echo_json(report)
        return
    from vila_deploy.cli.eval_lines import report_lines

    for line in report_lines(report):
        click.echo(line)


def _judge(
    evaluation: Evaluation, report: dict[str, Any], min_score: float | None, max_kl: float | None
) -> None:
    """End with exit code 1 if questions have failed, or a figure is not as demanded."""
    if report["failed"]:
        again = "mend it and repeat with --resume" if evaluation.out else "mend it and repeat"
        first = report["failed"][0]
        fail(f"questions that could not be asked: {len(report['failed'])}, one: {first}; {again}")
    score = report["task"] and report["task"]["score"]["value"]
    if min_score is not None and not score >= min_score:
        fail(f"{evaluation.model}: scores {score:.2f}, below --min-score {min_score:g}")
    if max_kl is not None:
        from vila_deploy.harness.likelihood import worst_kl

        kind, worst = next(worst_kl(report["likelihood"]["quality"]))
        if not worst <= max_kl:
            fail(f"{evaluation.model}: mean KL of {kind} is {worst:.4g}, above --max-kl {max_kl:g}")
