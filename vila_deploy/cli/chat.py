"""vila-chat: ask an engine about images and videos."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vila_deploy.cli.chat_interactive import check_input, check_output, converse, show
from vila_deploy.cli.common import command, echo_json, no_nan

if TYPE_CHECKING:
    from vila_deploy.processing.placeholders import Media
    from vila_deploy.runtime.conversation import Answer


@command("vila-chat")
@click.argument("engine", type=click.Path(path_type=Path))
@click.option(
    "--image", "images", type=click.Path(path_type=Path), multiple=True, help="Image; repeatable."
)
@click.option(
    "--video", "videos", type=click.Path(path_type=Path), multiple=True,
    help="Video, sampled as images at even distances; repeatable. Videos come after all images.",
)  # fmt: skip
@click.option(
    "--video-frames", type=click.IntRange(1),
    help="Images from each video; the model's own number if left out, mostly 8.",
)  # fmt: skip
@click.option("-p", "--prompt", help="Question; <image> and <video> in it mark where each goes.")
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
@click.option("--seed", type=click.IntRange(0), help="Makes draws repeatable.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; needs -p.")
def main(
    engine: Path,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    video_frames: int | None,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Ask ENGINE, a folder made by vila-build-engine, about images and videos.

    Without -p it asks for questions until you end it.

    \b
    vila-chat ENGINE --image cat.jpg -p "What is this?"
    vila-chat ENGINE --image a.jpg --image b.jpg -p "<image> <image> Which one is darker?"
    vila-chat ENGINE --video cat.mp4 -p "What happens?"
    """
    if as_json and prompt is None:
        raise click.UsageError("--json needs -p")

    from vila_deploy.engine.sampling import SamplingParams
    from vila_deploy.processing.images import read_image
    from vila_deploy.processing.video import sample_video
    from vila_deploy.runtime.open_engine import open_engine

    check_output()
    if prompt is None:
        check_input()
    media: list[Media] = [read_image(path) for path in images]
    sampling = SamplingParams(max_new_tokens, temperature, top_p, seed)
    with open_engine(engine) as opened:
        conversation = opened.chat()
        model = opened.model
        frames_of = partial(
            sample_video,
            video=model.video, image=model.image, tiling=model.tiling, count=video_frames,
        )  # fmt: skip
        media += [frames_of(path) for path in videos]
        if prompt is None:
            converse(conversation, media, sampling, {"/image": read_image, "/video": frames_of})
            return
        answer = conversation.ask(prompt, media, sampling, on_text=None if as_json else show)
    if as_json:
        echo_json(_for_programs(answer))
    else:
        click.echo()


def _for_programs(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "finish_reason": answer.finish_reason,
        "timings_ms": answer.timings_ms,
        "decode_tokens_per_s": answer.decode_tokens_per_s,
    }
