"""The session of a native engine: on a CUDA GPU, or slowly in Triton's interpreter."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from vila_deploy.backends.native.compile import cannot_compile
from vila_deploy.backends.native.compile_ahead import KernelSet, compile_ahead
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.launch_choice import TRIED_STEPS, captured, choose_launch_mode
from vila_deploy.backends.native.loading import load_weights, vision_dtype
from vila_deploy.backends.native.prompts import Prompts
from vila_deploy.backends.native.weights import PackedLlm
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import DeviceRows, OneSlot, check_room
from vila_deploy.kernels.argmax import NO_TOKEN
from vila_deploy.model.vision import VisionEncoder
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

# Of the prompt behind which launch modes are tried.
WARM_UP_TOKENS = 257
_CapturedStep = tuple[DecodeStep, dict[bool, torch.cuda.CUDAGraph]]


class PromptInputs:
    """What every session of loaded weights does alike: images and tokens become embeddings."""

    _llm: PackedLlm
    _vision: VisionEncoder
    _device: str

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        return self._encode(pixels, grid).float().cpu().numpy()

    def encode_on_device(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Tensor:
        return self._encode(pixels, grid).flatten(0, 1)

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return self._embed(tokens).cpu().numpy()

    @torch.inference_mode()
    def embed_on_device(self, parts: Sequence[Sequence[int] | Floats | DeviceRows]) -> Tensor:
        return torch.cat([self._as_rows(part) for part in parts])

    def to_host(self, features: DeviceRows) -> Floats:
        assert isinstance(features, Tensor)
        return features.float().cpu().numpy()

    def _encode(self, pixels: Floats, grid: tuple[int, int] | None) -> Tensor:
        tiles = torch.from_numpy(pixels).to(self._device, vision_dtype(self._device))
        found: Tensor = self._vision(tiles, grid)
        return found

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        """Return embeddings, float32 [tokens, hidden], where the table is."""
        ids = torch.tensor(list(tokens), dtype=torch.int64, device=self._llm.table.device)
        return self._llm.table[ids].float()

    def _warm_up_prompt(self, config: StepConfig) -> Tensor:
        """Return embeddings on the device of a prompt that attention splits."""
        tokens = min(WARM_UP_TOKENS, config.max_seq_len)
        vocabulary = config.llm.vocab_size
        return self._embed([token % vocabulary for token in range(tokens)]).to(self._device)

    def _as_rows(self, part: Sequence[int] | Floats | DeviceRows) -> Tensor:
        """Return token ids, or embeddings wherever they are, as float32 rows on the device."""
        if isinstance(part, np.ndarray):
            part = torch.from_numpy(np.ascontiguousarray(part, np.float32))
        rows = part if isinstance(part, Tensor) else self._embed(cast(Sequence[int], part))
        return rows.to(self._device).float()


class NativeSession(PromptInputs):
    """Implements `vila_deploy.engine.session.SequenceSession`, `DeviceSampling` and `Decides`.

    Raises:
        VilaDeployError: no CUDA GPU, or one of another compute capability than the target's.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self._begin(*load_weights(folder, manifest), manifest.module_precision)

    @classmethod
    def of_parts(
        cls, config: StepConfig, llm: PackedLlm, vision: VisionEncoder, modules: ModulePrecision
    ) -> NativeSession:
        """Return a session of what is on the device already, as a benchmark makes it."""
        session = cls.__new__(cls)
        session._begin(config, llm, vision, modules)
        return session

    def _begin(
        self, config: StepConfig, llm: PackedLlm, vision: VisionEncoder, modules: ModulePrecision
    ) -> None:
        self._config, self._llm, self._vision = config, llm, vision
        self._device = config.device
        self.position, self.max_seq_len = 0, config.max_seq_len
        self._cache = Cache(config.llm, self.max_seq_len, self._device, modules.kv_cache)
        self._step = DecodeStep(self._config, self._llm, self._cache)
        self._prompts = Prompts(self._config, self._llm, self._cache, self._step)
        # By whether the step samples.
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._choices: dict[str, dict[str, Any]] = {}
        if self._device != "cpu":
            # Sums of float16 products stay in float32.
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            self._warm_up(modules)

    @torch.inference_mode()
    def _warm_up(self, module_precision: ModulePrecision) -> None:
        """Compile, load and capture all that answers need, so that the first is no slower."""
        config = self._config
        compile_kernels(config, module_precision)
        self._prompts.capture()
        prompt = self._warm_up_prompt(config)
        if config.preferred_mode is not None:
            self._prompts.append(prompt, 0)
        self._step.settings.fill_(1.0)
        self._step.draw()
        # Behind the prompt, as far as there is room.
        steps = min(TRIED_STEPS, len(prompt))
        self._tried_range = range(len(prompt) - steps, len(prompt))
        (self._step, self._graphs), choice = choose_launch_mode(
            config, self._prepare, self._tried_outputs
        )  # fmt: skip
        self._choices = {"kernel_launch": choice.to_json()}
        self._prompts.capture_finish(self._step)
        self.truncate(0)

    def _prepare(self, config: StepConfig) -> _CapturedStep:
        """Return a step in the config's launch mode, and its graphs."""
        step, graphs = DecodeStep(config, self._llm, self._cache), {}
        step.settings.fill_(1.0)
        step.uniform.fill_(0.5)
        for sampled in (False, True):
            self._cache.position.fill_(self._tried_range.start)
            graphs[sampled] = captured(step, sampled=sampled)
        return step, graphs

    def _tried_outputs(self, tried: _CapturedStep) -> list[Tensor]:
        """Return what some steps leave, greedy and drawn, the same each time for the same bytes."""
        step, graphs = tried
        cache, found = self._cache, list[Tensor]()
        written = cache.between(self._tried_range.start, self._tried_range.stop)
        for graph in graphs.values():
            for vectors in written:
                vectors.zero_()
            step.token.fill_(1)
            cache.position.fill_(self._tried_range.start)
            for _ in self._tried_range:
                graph.replay()
                found += [step.logits.clone(), step.token.clone(), cache.position.clone()]
            found += [vectors.contiguous().clone() for vectors in written]
        return found

    @torch.inference_mode()
    def prefill(self, embeds: Floats | DeviceRows, *, more: bool = False) -> Floats:
        """Append [tokens, hidden] to the cache; return logits of the last token [vocab].

        Args:
            more: the prompt goes on: nothing is returned.
        """
        self._prompts.append(self._as_rows(embeds), self.position, more=more)
        self.truncate(self.position + len(embeds))
        return np.empty(0, np.float32) if more else self._logits()

    @torch.inference_mode()
    def decode(self, token: int) -> Floats:
        if not 0 <= token < self._config.llm.vocab_size:
            raise ValueError(f"token {token} of a vocabulary of {self._config.llm.vocab_size}")
        self._step.token.fill_(token)
        self._run_step()
        self.position += 1
        return self._logits()

    @torch.inference_mode()
    def decode_greedy(self, tokens: int) -> list[int]:
        """Return the next `tokens` greedy tokens after prefill or decode, chosen on the device.

        The host waits once, at the end.
        """
        check_room(self.position, tokens, self.max_seq_len)
        start = self.position
        for _ in range(tokens):
            self._run_step()
        self.position += tokens
        decoded: list[int] = self._cache.history[start + 1 : self.position + 1].tolist()
        if NO_TOKEN in decoded:
            raise not_numbers(start + decoded.index(NO_TOKEN))
        return decoded

    @torch.inference_mode()
    def stream(self, stop_token_ids: Collection[int], sampling: SamplingParams) -> Iterator[int]:
        """Yield tokens after prefill, chosen on the device, the stop token included.

        The host reads one token behind, so the device never waits for it. Numbers for sampling are
        drawn beforehand from `sampling.seed`: equal seeds give equal tokens.
        """
        sampled = sampling.temperature > 0
        if sampled:
            self._begin_sampling(sampling)
        room = self.max_seq_len - self.position
        steps = max(0, min(sampling.max_new_tokens - 1, room))
        start, taken, read = self.position, 0, deque([self._read_token()])
        try:
            while sampling.max_new_tokens:
                # Nothing runs ahead of the first token, so that it is seen as soon as it is known.
                while len(read) <= (self._ahead if taken else 0) and taken + len(read) <= steps:
                    self._run_step(sampled=sampled)
                    read.append(self._read_token())
                token = read.popleft()()
                if token == NO_TOKEN:
                    raise not_numbers(start + taken)
                yield token
                if token in stop_token_ids or taken == steps:
                    return
                taken += 1
        finally:
            # Steps that ran ahead of the last token are forgotten.
            self.position = start + taken
            self._cache.position.fill_(self.position)

    def _begin_sampling(self, sampling: SamplingParams) -> None:
        """Draw the random numbers of all positions, and the first token."""
        step = self._step
        step.uniform.copy_(draw_uniform(len(step.uniform), sampling.seed))
        step.settings.copy_(torch.tensor([1 / sampling.temperature, sampling.top_p]))
        step.draw()

    def _read_token(self) -> Callable[[], int]:
        """Begin to copy the newest token; return a call that waits for it."""
        read = read_later(self._step.token, self._device)
        return lambda: read()[0]

    @property
    def _ahead(self) -> int:
        """How many tokens are computed before the one before them is read."""
        return 0 if self._device == "cpu" else 1

    @property
    def choices(self) -> Mapping[str, Mapping[str, Any]]:
        return self._choices

    def truncate(self, tokens: int) -> None:
        self.position = tokens
        self._cache.position.fill_(tokens)

    def close(self) -> None:
        """Free weights, cache and graphs."""
        for name in ("_graphs", "_prompts", "_step", "_cache", "_vision", "_llm"):
            self.__dict__.pop(name, None)

    def _run_step(self, *, sampled: bool = False) -> None:
        if self._device == "cpu":
            self._step(sampled=sampled)
            return
        self._graphs[sampled].replay()

    def _logits(self) -> Floats:
        logits = self._step.logits[0].cpu().numpy().copy()
        if not np.isfinite(logits.max()):
            raise not_numbers(self.position)
        return logits


class OneNativeSlot(OneSlot):
    """The Session of one sequence, which also implements `KeepsOnDevice`."""

    sequence: NativeSession

    def encode_on_device(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Tensor:
        return self.sequence.encode_on_device(pixels, grid)

    def embed_on_device(self, parts: Sequence[Sequence[int] | Floats | DeviceRows]) -> Tensor:
        return self.sequence.embed_on_device(parts)

    def prefill_on_device(self, slot: int, embeds: DeviceRows, more: bool = False) -> Floats:
        check_room(self.length(slot), len(embeds), self.max_seq_len)
        return self.sequence.prefill(embeds, more=more)

    def to_host(self, features: DeviceRows) -> Floats:
        return self.sequence.to_host(features)


def read_later(tokens: Tensor, device: str) -> Callable[[], list[int]]:
    """Begin to copy tokens from the device; return a call that waits for them."""
    if device == "cpu":
        values = tokens.tolist()
        return lambda: values
    copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    copy.copy_(tokens, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[int]:
        done.synchronize()
        return list(map(int, copy))

    return wait


def draw_uniform(count: int, seed: int | None) -> Tensor:
    """Return random numbers in 0..1 of `count` positions; a seed of None draws new ones."""
    random = torch.Generator()
    random.seed() if seed is None else random.manual_seed(seed)
    return torch.rand(count, generator=random)


def not_numbers(position: int) -> VilaDeployError:
    """Return the error for logits of NaN or infinity behind so many tokens."""
    return VilaDeployError(
        f"the logits behind {position} tokens are not numbers",
        fix="a weight of the checkpoint isn't finite, or an activation exceeds float16: ask "
        "the same of an engine of another backend",
    )


def compile_kernels(
    config: StepConfig, modules: ModulePrecision, *, several: bool = False
) -> None:  # fmt: skip
    """Bring an engine's kernels into Triton's cache; say so if that takes long.

    Those of a preferred launch mode too.

    Raises:
        VilaDeployError: one does not compile.
    """
    modes = [config.launch_mode, *filter(None, [config.preferred_mode])]
    kernels = [
        KernelSet(config.llm, config.max_seq_len, config.capability, modules, mode, several=several)
        for mode in modes
    ]
    try:
        compile_ahead(kernels, on_missing=_say_compiling)
    except Exception as error:
        raise cannot_compile([config.capability], str(error)) from error


def _say_compiling(kernels: int) -> None:
    print(f"compiling {kernels} kernels, once for this GPU", file=sys.stderr, flush=True)
