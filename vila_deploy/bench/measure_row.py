"""Measure one row of the table in this process: repetitions, contexts, memory, host."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vila_deploy.backends.registry import get_backend
from vila_deploy.bench.bandwidth import BandwidthReadings
from vila_deploy.bench.conditions import commit, machine_state, processor_name, versions
from vila_deploy.bench.energy import EnergyMeter
from vila_deploy.bench.first_token import (
    FirstToken,
    check_room,
    measure_first_token,
    noise_image,
    prompt_tokens,
)
from vila_deploy.bench.gpu import gpu_name
from vila_deploy.bench.host_load import LoadMonitor, load_before
from vila_deploy.bench.measure import time_decoding
from vila_deploy.bench.roofline import cache_values_per_token
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.session import Session, choices_of
from vila_deploy.engine.target import get_target
from vila_deploy.formats.module_dtypes import FP16
from vila_deploy.runtime.open_engine import OpenedEngine, open_engine
from vila_deploy.utils.arrays import Floats

# TinyChat's scripts time an answer behind a prompt of so many tokens.
TINYCHAT_CONTEXT = 4
TEXT_TOKEN = 1
WARM_UP_STEPS = 2
FEWEST_STEPS = 8


@dataclass(frozen=True)
class MeasureSettings:
    """How a row is measured.

    Args:
        repetitions: of each figure of decoding; the median counts. The memory is read between them.
        decode_tokens: steps of a repetition where they are quick.
        decode_s: seconds of a repetition, for which a slow engine decodes fewer tokens.
        first_token_s: the question about an image is asked again until so many have passed.
        first_tokens: how often it is asked at most.
        contexts: cached tokens at the start of further measurements of decoding; 0 means one
            token, which the model has to begin with.
    """

    repetitions: int = 5
    decode_tokens: int = 128
    decode_s: float = 3.0
    first_token_s: float = 8.0
    first_tokens: int = 3
    contexts: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "contexts": list(self.contexts)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MeasureSettings:
        return cls(**{**values, "contexts": tuple(values["contexts"])})


def measure_row(folder: Path, settings: MeasureSettings) -> dict[str, Any]:
    """Return the measured part of a table's row for the engine in `folder`.

    Decoding is greedy at batch 1: behind the question about an image, with TinyChat's context of 4
    tokens, and with each of the settings' contexts.
    """
    others_before = load_before()
    start = time.perf_counter()
    with open_engine(folder) as engine:
        load_s = time.perf_counter() - start
        after_load = _resident_bytes()
        target = get_target(engine.manifest.target)
        gpu = gpu_name(target, engine.manifest.backend)
        # A GPU's memory is not the host's.
        readings = BandwidthReadings() if gpu is None else None
        monitor, energy = LoadMonitor(), EnergyMeter()
        figures = _measure_engine(engine, settings, readings)
        joules, load = energy.joules(), monitor.load()
        at_end, choices = _resident_bytes(), choices_of(engine.session)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    manifest = engine.manifest
    bandwidth = readings.median() if readings else target.bandwidth_bytes_per_s
    return {
        "label": "measured",
        "target": manifest.target,
        "backend": manifest.backend,
        "device": gpu or processor_name(),
        "weights": manifest.weights,
        **figures,
        **({"choices": choices} if choices else {}),
        "load_s": load_s,
        "resident_after_load_bytes": after_load,
        "resident_at_end_bytes": at_end,
        "peak_memory_bytes": peak_bytes,
        "weight_bytes_per_token": manifest.weight_bytes_per_token,
        "cache_bytes_per_token": cache_bytes(manifest),
        "read_bandwidth_bytes_per_s": bandwidth,
        "bandwidth_label": "published" if gpu else "measured",
        "bandwidth_readings": readings.readings if readings else [],
        "roofline_fraction": _share(manifest, figures["decode"]["image"], bandwidth),
        "energy_joules": joules,
        "others_before_cores": others_before,
        "others_during_cores": load.others_cores if load else None,
        "stolen_cores": load.stolen_cores if load else None,
        "state": machine_state(gpu is not None),
        "versions": versions(manifest.versions),
        "commit": commit(),
    }


def cache_bytes(manifest: Manifest) -> int:
    """Return the bytes of one cached token as the engine's backend keeps them."""
    model, dtype = manifest.model, manifest.module_precision.kv_cache
    bits = get_backend(manifest.backend).cache_bits if dtype == FP16 else 8
    return cache_values_per_token(model.num_layers, model.num_kv_heads, model.head_dim) * bits // 8


def _share(manifest: Manifest, decode: dict[str, Any], bandwidth: float | None) -> float | None:
    """Return the bytes of the mean step over those that the memory gives in that time."""
    if not bandwidth:
        return None
    context = decode["context"] + decode["tokens"] / 2
    step = manifest.weight_bytes_per_token + context * cache_bytes(manifest)
    share: float = step * decode["tokens_per_s"] / bandwidth
    return share


def _measure_engine(
    engine: OpenedEngine, settings: MeasureSettings, readings: BandwidthReadings | None
) -> dict[str, Any]:
    """Return times to first token and of decoding; the memory is read before each part.

    Args:
        readings: of a CPU's memory; None on a GPU.
    """
    session, image = engine.session, noise_image()
    check_room(engine, image, FEWEST_STEPS + WARM_UP_STEPS + 1)
    if readings is None:
        # The first time, kernels are compiled and libraries loaded.
        measure_first_token(engine, image, max_runs=1)
    else:
        readings.read()
    prompt = prompt_tokens(engine, image)
    first_token = measure_first_token(engine, image, settings.first_token_s, settings.first_tokens)
    step_s = _step_seconds(session, first_token)
    decoding = _Decoding(session, settings, step_s, readings)
    decode = {
        "image": decoding.measure(prompt, first_token.last_embed),
        "tinychat": decoding.measure_after_text(TINYCHAT_CONTEXT),
    }
    contexts = [
        {**decoding.measure_after_text(max(context, 1)), "context": context}
        for context in _possible(settings.contexts, session.max_seq_len)
    ]
    prefill_s = first_token.medians_ms["prefill"] / 1e3
    return {
        "decode": decode,
        "contexts": contexts,
        "ttft_ms": first_token.medians_ms,
        "ttft_runs": first_token.runs,
        "prompt_tokens": prompt,
        "asked_tokens": settings.decode_tokens,
        "prefill_tokens_per_s": prompt / prefill_s,
    }


def _possible(contexts: Sequence[int], max_seq_len: int) -> list[int]:
    """Return the contexts that leave room for the fewest steps, smallest first."""
    return sorted(c for c in contexts if c + FEWEST_STEPS + WARM_UP_STEPS + 1 <= max_seq_len)


def _step_seconds(session: Session, first_token: FirstToken) -> float:
    """Return the seconds of a step, from a few."""
    return statistics.median(time_decoding(session, first_token.logits, WARM_UP_STEPS + 1))


@dataclass(frozen=True)
class _Decoding:
    """Times decoding in repetitions, and reads the memory before each.

    Args:
        step_s: seconds of a step, about.
    """

    session: Session
    settings: MeasureSettings
    step_s: float
    readings: BandwidthReadings | None

    def measure_after_text(self, context: int) -> dict[str, Any]:
        """Fill the cache with `context` equal text tokens and time decoding behind them."""
        self.session.keep(0, 0)
        embeds = self.session.embed_tokens([TEXT_TOKEN] * context)
        self.session.prefill(0, embeds)
        return self.measure(context, embeds[-1:])

    def measure(self, context: int, last_embed: Floats) -> dict[str, Any]:
        """Time decoding behind the first `context` tokens of slot 0.

        The last of them, whose embedding is `last_embed`, goes through the model again each time.
        """
        session, settings = self.session, self.settings
        room = session.max_seq_len - context - WARM_UP_STEPS - 1
        in_time = int(settings.decode_s / self.step_s)
        steps = min(max(in_time, FEWEST_STEPS), settings.decode_tokens, room)
        speeds, step_ms = [], []
        for _ in range(settings.repetitions):
            if self.readings is not None:
                self.readings.read()
            session.keep(0, context - 1)
            logits = session.prefill(0, last_embed)
            seconds = time_decoding(session, logits, WARM_UP_STEPS + steps)[WARM_UP_STEPS:]
            speeds.append(steps / sum(seconds))
            step_ms += [second * 1e3 for second in seconds]
        return {
            "context": context,
            "tokens": steps,
            "tokens_per_s": statistics.median(speeds),
            "min_tokens_per_s": min(speeds),
            "max_tokens_per_s": max(speeds),
            "step_ms_median": float(np.median(step_ms)),
            "repetitions": len(speeds),
        }


def _resident_bytes() -> int | None:
    """Return this process's present resident set, mapped files included."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text("ascii", "replace").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
