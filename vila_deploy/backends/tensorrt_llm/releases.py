"""List the releases of TensorRT-LLM that build engines, and the commands of each.

Sources: tensorrt_llm/commands/build.py and examples/multimodal of 0.12 to 1.2.1, release notes of
0.13 (logits in streams, cache reuse with prompt tables), README4Jetson.md and model_runner_cpp.py
of branch v0.12.0-jetson.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vila_deploy.backends.tensorrt_llm import files
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.utils.errors import VilaDeployError


@dataclass(frozen=True)
class Release:
    """A range of versions with the same commands and names.

    Args:
        title: the versions, in words.
        oldest, newest: first two numbers of the oldest and newest version.
        vision_engine, vision_output: file and output name that its multimodal runner expects.
        fused_mlp: flags of trtllm-build by precision. A fused MLP has one prequant scale for gate
            and up; W4A16_AWQ has two.
        install: commands that install it.
        length_argument: what a request calls the number of tokens to generate.
        runtime_switches: attributes of ExtendedRuntimePerfKnobConfig to turn on: long contexts over
            several blocks of a GPU, decoding as a CUDA graph.
        reuses_cache: a request begins with what the cache holds of its prompt, prompt tables
            included, and takes a prompt in chunks.
        maps_engines: the executor can map an engine's file instead of reading it.
    """

    title: str
    oldest: tuple[int, int]
    newest: tuple[int, int]
    vision_engine: str
    vision_output: str
    fused_mlp: Mapping[str, tuple[str, ...]]
    install: tuple[str, ...]
    length_argument: str
    runtime_switches: tuple[str, ...]
    reuses_cache: bool
    maps_engines: bool


JETSON = Release(
    title="0.12.0 of branch v0.12.0-jetson",
    oldest=(0, 12),
    newest=(0, 12),
    vision_engine="visual_encoder.engine",
    vision_output="output",
    fused_mlp={"fp16": ("--use_fused_mlp",), "int4": ()},
    install=(
        "git clone --branch v0.12.0-jetson https://github.com/NVIDIA/TensorRT-LLM",
        "# then follow its README4Jetson.md: JetPack 6.1, build_wheel.py for architecture 87",
    ),
    length_argument="max_new_tokens",
    runtime_switches=("multi_block_mode",),
    reuses_cache=False,
    maps_engines=True,
)
# The runner of 0.13 to 0.15 looks for the vision engine's older names.
DESKTOP = Release(
    title="0.16 to 1.2.1",
    oldest=(0, 16),
    newest=(1, 2),
    vision_engine="model.engine",
    vision_output="encoder_output",
    fused_mlp={"fp16": ("--use_fused_mlp=enable",), "int4": ("--use_fused_mlp=disable",)},
    install=("pip install 'tensorrt-llm==1.2.1'",),
    length_argument="max_tokens",
    runtime_switches=("multi_block_mode", "cuda_graph_mode"),
    reuses_cache=True,
    maps_engines=False,
)
# CUDA compute capability → release; no release builds engines for others.
BY_CAPABILITY = {"8.0": DESKTOP, "8.6": DESKTOP, "8.9": DESKTOP, "9.0": DESKTOP, "8.7": JETSON}


def release_for(capability: str | None, target: str) -> Release:
    """Return the release for a device; raise VilaDeployError if none builds engines for it."""
    if capability not in BY_CAPABILITY:
        raise VilaDeployError(
            f"TensorRT-LLM builds no engines for {target}", fix="use another --backend"
        )
    return BY_CAPABILITY[capability]


def check_version(release: Release, version: str) -> None:
    """Raise VilaDeployError if the installed version of TensorRT-LLM is not of this release."""
    numbers = version.split(".")
    version_numbers = (
        (int(numbers[0]), int(numbers[1])) if numbers[1:] and numbers[0].isdigit() else (0, 0)
    )
    if not release.oldest <= version_numbers <= release.newest:
        raise VilaDeployError(
            f"TensorRT-LLM {version} is here, this engine needs {release.title}",
            fix=f"install it ({release.install[0]}) or use --backend tensorrt",
        )


def build_command(
    release: Release, request: BuildRequest, precision: str, folder: Path
) -> list[str]:
    """Return the command that builds `folder`/llm from `folder`/llm_checkpoint.

    The prompt table is as large as the longest prompts of a full batch, so that any number of
    images fits.
    """
    limits = request.limits
    tokens = limits.max_batch_size * limits.max_input_len
    command = [
        "trtllm-build",
        f"--checkpoint_dir={folder / files.CHECKPOINT}",
        f"--output_dir={folder / files.LLM}",
        "--gemm_plugin=float16",
        f"--max_batch_size={limits.max_batch_size}",
        f"--max_input_len={limits.max_input_len}",
        f"--max_seq_len={limits.max_seq_len}",
        f"--max_num_tokens={tokens}",
        f"--max_multimodal_len={tokens}",
        *release.fused_mlp[precision],
    ]
    if release.reuses_cache:
        command.append("--use_paged_context_fmha=enable")
    if request.gpus > 1:
        # The session takes logits from the stream there: see generation.py.
        command += ["--gather_generation_logits", f"--workers={request.gpus}"]
    return command


def shell_line(command: list[str]) -> str:
    """Return the command as it is typed into a shell."""
    return " \\\n    ".join(shlex.quote(argument) for argument in command)
