"""vila-chat: ask an engine about images and videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vila_deploy.cli.common import FilePath, command, echo_json, no_nan

if TYPE_CHECKING:
    from vila_deploy.runtime.conversation import Answer


@command("vila-chat")
@click.argument("engine", type=FilePath())
@click.option(
    "--image", "images", type=FilePath(path_type=str), multiple=True,
    help="Image; repeatable. - reads one from stdin.",
)  # fmt: skip
@click.option(
    "--video", "videos", type=FilePath(), multiple=True,
    help="Video, sampled as images at even distances; repeatable. Videos come after all images.",
)  # fmt: skip
@click.option(
    "--video-frames", type=click.IntRange(1),
    help="Images from each video; the model's own number if left out, mostly 8.",
)  # fmt: skip
@click.option(
    "-p", "--prompt",
    help="Question; <image> and <video> in it mark where each goes. - reads it from stdin.",
)  # fmt: skip
@click.option("--system", help="System message; the model's own if left out.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True,
    callback=no_nan,
    help="0 always takes the most likely token.",
)  # fmt: skip
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    callback=no_nan,
    help="Draw only from the most likely tokens that hold this share of probability.",
)  # fmt: skip
@click.option(
    "--top-k", type=click.IntRange(0), default=0, show_default=True,
    help="Draw only from so many of the most likely tokens; 0: from all.",
)  # fmt: skip
@click.option(
    "--repetition-penalty", type=click.FloatRange(0, 100, min_open=True), default=1.0,
    show_default=True, callback=no_nan,
    help="Above 1, tokens of the prompt and of the answer so far become less likely.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="Makes draws repeatable.")
@click.option(
    "--stop", multiple=True, metavar="TEXT",
    help="Ends the answer where this text would come; repeatable.",
)  # fmt: skip
@click.option(
    "--batch", type=FilePath(), metavar="FILE_OR_DIR",
    help="Answer each row of a .jsonl file (text, image, video), or ask -p, a description if left "
    "out, about each image in a folder.",
)  # fmt: skip
@click.option(
    "-o", "--out", type=FilePath(), metavar="FILE",
    help="With --batch: .jsonl file to write, a line for each row.",
)  # fmt: skip
@click.option(
    "--resume", is_flag=True,
    help="With --batch: go on from the rows that an earlier run has left in OUT.partial; those "
    "that failed are asked again.",
)  # fmt: skip
@click.option(
    "--slots", type=click.IntRange(1, 64),
    help="With --batch: rows answered at once, where the engine can; 8 if left out, or as many as "
    "fit into memory.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object; needs -p or --batch.")
def main(
    engine: Path,
    images: tuple[str, ...],
    videos: tuple[Path, ...],
    video_frames: int | None,
    prompt: str | None,
    system: str | None,
    stop: tuple[str, ...],
    batch: Path | None,
    out: Path | None,
    resume: bool,
    slots: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Ask ENGINE, a folder made by vila-build-engine, about images and videos.

    Without -p and --batch it asks for questions until you end it.

    \b
    vila-chat ENGINE --image cat.jpg -p "What is this?"
    vila-chat ENGINE --image a.jpg --image b.jpg -p "<image> <image> Which one is darker?"
    vila-chat ENGINE --video cat.mp4 -p "What happens?"
    vila-chat ENGINE --batch photos -p "Describe this image." -o captions.jsonl
    """
    _check_options(images, videos, prompt, stop, batch, out, resume, slots, as_json)

    from vila_deploy.cli.chat_input import (
        check_output,
        read_media_image,
        read_question,
        video_reader,
    )
    from vila_deploy.cli.chat_interactive import Chat, Loader, converse, show
    from vila_deploy.engine.sampling import SamplingParams
    from vila_deploy.runtime.open_engine import open_engine

    check_output()
    if prompt == "-":
        prompt = read_question()
    params = SamplingParams(**sampling)
    if batch is not None and out is not None:
        from vila_deploy.cli.chat_batch import Batch, run

        asked = Batch(engine, batch, out, prompt, video_frames, slots, system, params, stop)
        run(asked, resume, as_json)
        return
    media: list[Any] = [read_media_image(path) for path in images]
    with open_engine(engine) as opened:
        conversation = opened.chat(system)
        frames_of = video_reader(opened.model, video_frames)
        media += [frames_of(path) for path in videos]
        if prompt is None:
            loaders: dict[str, Loader] = {"/image": read_media_image, "/video": frames_of}
            converse(Chat(conversation, media, params, loaders, stop))
            return
        answer = conversation.ask(prompt, media, params, None if as_json else show, stop)
    echo_json(_for_programs(answer)) if as_json else click.echo()


def _check_options(
    images: tuple[str, ...],
    videos: tuple[Path, ...],
    prompt: str | None,
    stop: tuple[str, ...],
    batch: Path | None,
    out: Path | None,
    resume: bool,
    slots: int | None,
    as_json: bool,
) -> None:
    """Raise UsageError for options that don't go together."""
    if batch is None:
        if as_json and prompt is None:
            raise click.UsageError("--json needs -p or --batch")
        if out is not None or resume:
            raise click.UsageError("-o and --resume need --batch")
        if slots is not None:
            raise click.UsageError("--slots needs --batch")
    else:
        if out is None:
            raise click.UsageError("--batch needs -o, the file to write")
        if images or videos:
            raise click.UsageError("--batch takes its images and videos from its rows")
    from_stdin = images.count("-") + (prompt == "-")
    if from_stdin > 1:
        raise click.UsageError("stdin is one image or one question")
    if "-" in images and prompt is None:
        raise click.UsageError("--image - needs -p: stdin holds the image, not questions")
    if "" in stop:
        raise click.UsageError("--stop needs some text")


def _for_programs(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "finish_reason": answer.finish_reason,
        "timings_ms": answer.timings_ms,
        "decode_tokens_per_s": answer.decode_tokens_per_s,
    }
