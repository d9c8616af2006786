"""The run of vila-eval: questions and samples through the log into a report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vila_deploy.cli.chat_batch_log import BatchLog
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.harness.asking import Inquiry, ask
from vila_deploy.harness.likelihood import (
    TokenSample,
    answered_sample,
    check_comparable,
    compare,
    is_measured,
    summarize,
    text_samples,
)
from vila_deploy.harness.question import Question
from vila_deploy.harness.reference_texts import ReferenceTexts, read_reference_texts
from vila_deploy.harness.report import score_answers, task_report
from vila_deploy.harness.subject import Subject, open_subject
from vila_deploy.harness.tasks.own import read_own
from vila_deploy.harness.tasks.registry import PUBLISHED
from vila_deploy.harness.tasks.task import Task
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import check_new
from vila_deploy.utils.progress import Advance, progress

ANSWER, ERROR = "answer", "error"
Results = dict[str, dict[str, Any]]
Samples = dict[str, Callable[[], TokenSample]]


class Interrupted(Exception):
    """The run was ended early; the message says what is kept."""


@dataclass(frozen=True)
class Evaluation:
    """What to score, on what, and where to keep it; see vila-eval --help."""

    model: Path
    data: Path | None
    task: str
    metric: str | None
    limit: int | None
    reference: Path | None
    text: Path | None
    out: Path | None
    resume: bool
    max_new_tokens: int
    slots: int | None
    prompt_template: str | None

    def run(self) -> dict[str, Any]:
        """Return the report; answers and figures are logged as they come.

        Raises:
            VilaDeployError: whatever is wrong with files and options, before models are opened.
            Interrupted: Ctrl-C or SIGTERM.
        """
        task = self._task()
        # Read before models are: what is wrong with it is found at once.
        texts = read_reference_texts(self.text, with_images=task is None)
        if self.out is not None and not self.resume:
            check_new(self.out, kind="file")
        results: Results = {}
        try:
            with ExitStack() as stack:
                return self._run(task, texts, results, stack)
        except KeyboardInterrupt:
            kept = f"{len(results)} results are kept in {self.out}.partial; --resume goes on"
            if not self.out or not results:
                kept = "nothing is kept yet" if self.out else "nothing is kept without -o"
            raise Interrupted(kept) from None

    def _task(self) -> Task | None:
        if self.data is None:
            return None
        read = PUBLISHED.get(self.task)
        task = read_own(self.data, self.metric) if read is None else read(self.data)
        return task if self.limit is None else replace(task, questions=task.questions[: self.limit])

    def _run(
        self, task: Task | None, texts: ReferenceTexts, results: Results, stack: ExitStack
    ) -> dict[str, Any]:
        opened = [
            stack.enter_context(open_subject(path, self.slots, self.prompt_template))
            for path in (self.model, self.reference)
            if path is not None
        ]
        subject, reference = opened[0], opened[1] if len(opened) > 1 else None
        log = self._log([one.fingerprint for one in opened], results)
        stack.callback(log.close)
        questions = task.questions if task else ()
        samples = dict(_samples(questions, texts, subject, reference))
        if reference is not None and not samples:
            raise VilaDeployError(
                "no text has two tokens that fit into both models",
                where=self.text,
                fix="give longer texts, or engines of a larger --max-input-len",
            )
        with progress(len(questions) + len(samples), "evaluating") as advance:
            _answer(questions, subject, self.max_new_tokens, log, advance)
            if reference is not None:
                _compare(samples, subject, reference, log, advance)
        report = self._report(task, subject, samples, log.results)
        log.finish([q.digest for q in questions] or list(samples), lambda row: ERROR in row)
        return report

    def _log(self, fingerprints: Sequence[str], results: Results) -> BatchLog | MemoryLog:
        if self.out is None:
            return MemoryLog(results)
        job = {"models": fingerprints, "max_new_tokens": self.max_new_tokens}
        log = BatchLog(self.out, job, self.resume)
        results.update(log.results)
        log.results = results
        return log

    def _report(
        self, task: Task | None, subject: Subject, samples: Samples, results: Results
    ) -> dict[str, Any]:
        """Return the report; each question's row gets its score."""
        names = {question.id: question.digest for question in task.questions} if task else {}
        rows = {name: results[digest] for name, digest in names.items()}
        answers = {name: row[ANSWER] for name, row in rows.items() if ANSWER in row}
        scored = score_answers(task, answers) if task else []
        for one in scored:
            rows[one.question.id]["score"] = one.score
        measured = [results[name] for name in samples if is_measured(results[name])]
        failed = [results[n][ERROR] for n in (*names.values(), *samples) if ERROR in results[n]]
        return {
            "model": subject.name,
            "kind": subject.kind,
            "fingerprint": subject.fingerprint,
            "max_new_tokens": self.max_new_tokens,
            "task": task_report(task, scored) if task and scored else None,
            "likelihood": (
                {"reference": str(self.reference), "quality": summarize(measured)}
                if measured
                else None
            ),
            "failed": failed,
            "out": None if self.out is None else str(self.out),
        }


class MemoryLog:
    """A BatchLog that keeps nothing."""

    def __init__(self, results: Results):
        self.results = results

    def add(self, name: str, result: dict[str, Any]) -> None:
        self.results[name] = result

    def finish(self, names: Sequence[str], failed: Callable[[dict[str, Any]], bool]) -> int:
        return sum(failed(self.results[name]) for name in names)

    def close(self) -> None:
        """Do nothing."""


def _answer(
    questions: Sequence[Question],
    subject: Subject,
    max_new_tokens: int,
    log: BatchLog | MemoryLog,
    advance: Advance,
) -> None:
    left = [q for q in questions if not _is_answered(log.results.get(q.digest))]
    advance(steps=len(questions) - len(left))
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    inquiries = ((q, Inquiry(q.text, q.read_images, sampling)) for q in left)
    for question, reply in ask(inquiries, subject):
        row: dict[str, Any] = {"id": question.id, "question": question.text}
        row |= {"right": list(question.answers), "category": question.category}
        failed = isinstance(reply, VilaDeployError)
        log.add(question.digest, row | ({ERROR: str(reply)} if failed else {ANSWER: reply}))
        advance("questions")


def _is_answered(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get(ANSWER), str)


def _samples(
    questions: Sequence[Question],
    texts: ReferenceTexts,
    subject: Subject,
    reference: Subject | None,
) -> Iterator[tuple[str, Callable[[], TokenSample]]]:
    """Yield what is compared with the reference, by names that change with the content."""
    if reference is None:
        return
    check_comparable(subject, reference, (*texts.plain, "Hello?")[0])
    for question in (*questions, *texts.questions):
        yield f"likelihood {question.digest}", partial(answered_sample, question, subject)
    shorter = min((subject, reference), key=lambda opened: opened.max_input_len)
    for number, sample in enumerate(text_samples(texts.plain, shorter)):
        digest = hashlib.sha256(repr(sample.chunks).encode()).hexdigest()
        yield f"text {number} {digest}", partial(_same, sample)


def _same(sample: TokenSample) -> TokenSample:
    return sample


def _compare(
    samples: Samples,
    subject: Subject,
    reference: Subject,
    log: BatchLog | MemoryLog,
    advance: Advance,
) -> None:
    left = {n: make for n, make in samples.items() if not is_measured(log.results.get(n))}
    advance(steps=len(samples) - len(left))
    for name, make in left.items():
        try:
            log.add(name, compare(make(), subject, reference))
        except VilaDeployError as error:
            log.add(name, {ERROR: str(error)})
        advance("likelihood")
