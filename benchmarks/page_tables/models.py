"""Released models and targets: sizes and memory, as --plan computes them."""

from __future__ import annotations

from functools import cache

from benchmarks.page_tables.sources import PRECISIONS, markdown
from vila_deploy.backends.registry import get_backend
from vila_deploy.builder.fit import Fit, fit_everywhere
from vila_deploy.builder.memory_plan import plan_engine
from vila_deploy.checkpoint.presets import PRESETS, VIDEO_PRESETS, base_models, preset
from vila_deploy.engine.build_request import BuildRequest, resolve_limits
from vila_deploy.engine.memory import MemoryRow
from vila_deploy.engine.target import Target, get_target, load_targets


def models() -> str:
    """Return the released models by name: LLM, tower, how images are cut, GB of weights."""

    images = {
        "single": "one of {0.tile} px",
        "s2": "S2, scales {0.scales}",
        "dynamic": "{0.min_tiles} to {0.max_tiles} tiles of {0.tile} px",
        "dynamic_s2": "dynamic S2, scales {0.scales}",
    }
    rows = []
    for name in PRESETS:
        config = preset(name, "fp16")
        llm, tower = base_models(name)
        sizes = [f"{_weight_bytes(name, precision) / 1e9:.1f}" for precision in PRECISIONS]
        tokens = str(config.max_tokens_per_image)
        cut = images[config.tiling.mode].format(config.tiling).replace("(", "").replace(")", "")
        rows.append([name, llm, tower, cut, tokens, *sizes])
    titles = ["model", "LLM", "vision tower", "image", "tokens per image, at most"]
    return markdown([*titles, "int4 GB", "fp16 GB"], rows)


def video_models() -> str:
    """Return the released models of videos: frames, tokens of a video, GB of weights and cache."""

    rows = []
    for name in VIDEO_PRESETS:
        config = preset(name, "fp16")
        llm, tower = base_models(name)
        sizes = [f"{_weight_bytes(name, precision) / 1e9:.1f}" for precision in PRECISIONS]
        per_token = 4 * config.llm.num_layers * config.llm.num_kv_heads * config.llm.head_dim
        cache = f"{per_token * config.tokens_per_video / 1e9:.1f}"
        video = [str(config.video.num_frames), f"{config.tokens_per_video:,}"]
        rows.append([name, llm, tower, *video, *sizes, cache])
    titles = ["model", "LLM", "vision tower", "frames of a video", "its tokens"]
    return markdown([*titles, "int4 GB", "fp16 GB", "its cache in float16, GB"], rows)


def memory() -> str:
    """Return the GB that each released model needs on each target, int4 / fp16."""

    known = (target for target in load_targets().values() if target.is_one_device)
    targets = sorted(known, key=_by_memory)
    titles = ["model"]
    for target in targets:
        titles.append(f"`{target.name}` {_room(target)}")
    rows = []
    for name in PRESETS:
        fits = {precision: _fits(name, precision) for precision in PRECISIONS}
        cells = [
            " / ".join(_needed(fits[precision][target.name]) for precision in PRECISIONS)
            for target in targets
        ]
        rows.append([name, *cells])
    return markdown(titles, rows)


def _room(target: Target) -> str:
    """Return the memory that the device is sold with: GiB, or GB where that is no whole number."""
    if target.memory_bytes is None:
        return "RAM"
    whole = target.memory_bytes % 2**30 == 0
    return f"{target.memory_bytes // 2**30 if whole else target.memory_bytes // 10**9} GB"


def _by_memory(target: Target) -> tuple[bool, int]:
    return target.memory_bytes is None, target.memory_bytes or 0


def _needed(fit: Fit) -> str:
    """Return GB, or a dash where it does not fit; a CPU's memory is the reader's."""
    return f"{fit.device_bytes / 1e9:.1f}" if fit.fits or fit.target == "cpu" else "–"


@cache
def _fits(model: str, precision: str) -> dict[str, Fit]:

    config = preset(model, precision)
    return {fit.target: fit for fit in fit_everywhere(config, precision, resolve_limits(config))}


def _weight_bytes(model: str, precision: str) -> int:
    """Return the bytes of weights on a GPU, which are those of the checkpoint."""

    config = preset(model, precision)
    request = BuildRequest(get_target("a100"), resolve_limits(config))
    plan = plan_engine(config, get_backend("tensorrt"), precision, request)
    running = (MemoryRow.KV_CACHE, MemoryRow.ACTIVATIONS)
    return sum(item.bytes for row, item in plan.items.items() if row not in running)


def targets() -> str:
    """Return the rows of engines/: device, backends, what each of them needs."""

    rows = []
    for target in sorted(load_targets().values(), key=_by_memory):
        others = {k: v for k, v in target.backends.items() if k != target.default_backend}
        default = f"{target.default_backend}: {target.backends[target.default_backend]}"
        also = "; ".join(f"{name}: {needs}" for name, needs in others.items())
        capability = target.compute_capability or ""
        rows.append([f"`{target.name}`", target.title, capability, default, also])
    titles = ["`--target`", "device", "compute capability", "default backend", "other backends"]
    return markdown(titles, rows)
