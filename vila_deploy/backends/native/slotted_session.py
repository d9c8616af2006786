"""The session of a native engine that holds several sequences and decodes them together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vila_deploy.backends.native.decode_step import StepConfig
from vila_deploy.backends.native.launch_choice import TRIED_STEPS, captured, choose_launch_mode
from vila_deploy.backends.native.loading import load_weights
from vila_deploy.backends.native.memory import PREFILL_TOKENS, row_counts
from vila_deploy.backends.native.prompts import Prompts
from vila_deploy.backends.native.rows_step import RowsStep
from vila_deploy.backends.native.session import (
    PromptInputs,
    compile_kernels,
    draw_uniform,
    not_numbers,
    read_later,
)
from vila_deploy.backends.native.slot_caches import SlotCaches
from vila_deploy.backends.native.weights import PackedLlm
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import DeviceRows, check_keep, check_room, check_slots
from vila_deploy.kernels.argmax import NO_TOKEN
from vila_deploy.kernels.tile_config import TOKENS
from vila_deploy.model.vision import VisionEncoder
from vila_deploy.utils.arrays import Floats

_CapturedSteps = tuple[dict[int, RowsStep], dict[tuple[int, bool], torch.cuda.CUDAGraph]]


@dataclass
class _Run:
    """A step that was launched; `read` waits for the tokens that it chose.

    Args:
        slots: of its rows.
        inputs: the token that each slot got; empty while those are still on the device alone.
    """

    step: RowsStep
    slots: list[int]
    sampled: bool
    read: Callable[[], list[int]]
    inputs: dict[int, int] = field(default_factory=dict)


class SlottedSession(PromptInputs):
    """Implements `vila_deploy.engine.session.Session` and all that may stand beside it.

    A step has 1, 2, 4 or 8 rows, of which those without a sequence cost no attention; more slots
    take several steps. What a slot answers depends neither on the others nor on that number, bit
    for bit. With tokens chosen on the device, the next step is launched before those of this one
    are read, and forgotten if other slots or tokens are asked for.

    Raises:
        VilaDeployError: no CUDA GPU, or one of another compute capability than the target's.
    """

    prefill_chunk = PREFILL_TOKENS

    def __init__(self, folder: Path, manifest: Manifest, slots: int):
        self._begin(*load_weights(folder, manifest), manifest.module_precision, slots)

    @classmethod
    def of_parts(
        cls,
        config: StepConfig,
        llm: PackedLlm,
        vision: VisionEncoder,
        modules: ModulePrecision,
        slots: int,
    ) -> SlottedSession:
        """Return a session of what is on the device already, as a benchmark makes it."""
        session = cls.__new__(cls)
        session._begin(config, llm, vision, modules, slots)
        return session

    def _begin(
        self,
        config: StepConfig,
        llm: PackedLlm,
        vision: VisionEncoder,
        modules: ModulePrecision,
        slots: int,
    ) -> None:
        self._config, self._llm, self._vision = config, llm, vision
        self._device, self.max_seq_len, self.slots = config.device, config.max_seq_len, slots
        sizes = config.llm, config.max_seq_len, slots, config.device, modules.kv_cache
        self._caches = SlotCaches(*sizes)
        self._lengths, self._samples = [0] * slots, [False] * slots
        # A prompt's own step, so that a step that runs ahead stays as it is.
        self._prompt, self._prompted = RowsStep(config, llm, self._caches), -1
        self._prompts = Prompts(config, llm, self._caches, self._prompt)
        self._steps = self._make_steps(config)
        self._ahead: _Run | None = None
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._choices: dict[str, dict[str, Any]] = {}
        if self._device != "cpu":
            # Sums of float16 products stay in float32.
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            self._warm_up(modules)

    @torch.inference_mode()
    def _warm_up(self, modules: ModulePrecision) -> None:
        """Compile, load and capture all that answers need, so that the first is no slower."""
        config = self._config
        compile_kernels(config, modules, several=True)
        self._prompts.capture()
        self._prompts.capture_finish(self._prompt)
        prompt = self._warm_up_prompt(config)
        self._prompt.draw()
        if config.preferred_mode is not None:
            self._prompts.append(prompt, 0)
            for slot in range(1, min(self.slots, TOKENS)):
                self._caches.copy(0, slot, len(prompt))
        # Behind the prompt, as far as there is room.
        steps = min(TRIED_STEPS, len(prompt))
        self._tried_range = range(len(prompt) - steps, len(prompt))
        (self._steps, self._graphs), choice = choose_launch_mode(
            config, self._prepare, self._tried_outputs
        )  # fmt: skip
        self._choices = {"kernel_launch": choice.to_json()}

    def _prepare(self, config: StepConfig) -> _CapturedSteps:
        """Return steps of each number of rows in the config's launch mode, and their graphs."""
        steps, graphs = self._make_steps(config), {}
        for rows, step in steps.items():
            for sampled in (False, True):
                # No row has a slot, so no cache changes.
                step.set_rows([], [], [])
                graphs[rows, sampled] = captured(step, sampled=sampled)
        return steps, graphs

    def _make_steps(self, config: StepConfig) -> dict[int, RowsStep]:
        return {
            rows: RowsStep(config, self._llm, self._caches, rows)
            for rows in row_counts(self.slots)
        }  # fmt: skip

    def _tried_outputs(self, tried: _CapturedSteps) -> list[Tensor]:
        """Return what some steps leave, greedy and drawn, the same each time for the same bytes."""
        steps, graphs = tried
        found, caches = list[Tensor](), self._caches
        for (rows, sampled), graph in graphs.items():
            step, slots = steps[rows], range(min(rows, self.slots))
            caches.settings[: len(slots)] = float(sampled)
            caches.uniform[: len(slots)] = 0.5
            written = [
                vectors
                for slot in slots
                for vectors in self._caches.sequence(slot).between(
                    self._tried_range.start, self._tried_range.stop
                )
            ]
            for vectors in written:
                vectors.zero_()
            start = self._tried_range.start
            step.set_rows(slots, [start] * len(slots), [1 + slot for slot in slots])
            for _ in self._tried_range:
                graph.replay()
                kept = (step.logits, step.token, step.position)
                found += [tensor[: len(slots)].clone() for tensor in kept]
            found += [vectors.contiguous().clone() for vectors in written]
        caches.settings.zero_()
        return found

    @property
    def choices(self) -> Mapping[str, Mapping[str, Any]]:
        return self._choices

    def length(self, slot: int) -> int:
        check_slots(self, [slot])
        return self._lengths[slot]

    def keep(self, slot: int, tokens: int) -> None:
        check_keep(self, slot, tokens)
        if tokens < self._lengths[slot]:
            self._change(slot)
            self._lengths[slot] = tokens

    @torch.inference_mode()
    def copy(self, source: int, target: int, tokens: int) -> None:
        check_slots(self, [source, target])
        check_keep(self, source, tokens)
        self._change(target)
        self._choose_greedily(target)
        self._caches.copy(source, target, tokens)
        self._lengths[target] = tokens

    def prefill(
        self,
        slot: int,
        embeds: Floats | DeviceRows,
        all_logits: bool = False,
        more: bool = False,
    ) -> Floats:
        check_room(self.length(slot), len(embeds), self.max_seq_len)
        self._change(slot)
        self._choose_greedily(slot)
        if all_logits:
            rows = (embeds[index : index + 1] for index in range(len(embeds)))
            return np.stack([self._append(slot, row) for row in rows])
        return self._append(slot, embeds, more)

    def prefill_on_device(self, slot: int, embeds: DeviceRows, more: bool = False) -> Floats:
        return self.prefill(slot, embeds, more=more)

    @torch.inference_mode()
    def _append(self, slot: int, embeds: Floats | DeviceRows, more: bool = False) -> Floats:
        held = self._lengths[slot]
        self._prompts.append(self._as_rows(embeds), held, slot, more=more)
        self._lengths[slot] = held + len(embeds)
        self._prompted = -1
        if more:
            return np.empty(0, np.float32)
        self._prompted = slot
        (logits,) = self._checked(self._prompt, [0], [held + len(embeds)])
        return logits

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Floats:
        self._check_rows(slots, tokens)
        logits = []
        for group, given in _groups(slots, tokens):
            run = self._launch(group, given)
            ends = [self._lengths[slot] + 1 for slot in group]
            logits.append(self._checked(run.step, range(len(group)), ends))
        self._advance(slots)
        return np.concatenate(logits)

    @torch.inference_mode()
    def first_token(self, slot: int, sampling: SamplingParams) -> int:
        check_slots(self, [slot])
        if slot != self._prompted:
            raise ValueError(f"the last call was no prefill of slot {slot}")
        sampled = self._samples[slot] = sampling.temperature > 0
        inverse = 1 / sampling.temperature if sampled else 0.0
        self._caches.settings[slot] = torch.tensor([inverse, sampling.top_p])
        if sampled:
            uniform = self._caches.uniform[slot]
            uniform.copy_(draw_uniform(len(uniform), sampling.seed))
            self._prompt.set_rows([slot], [self._lengths[slot]], [0])
            self._prompt.draw()
        (token,) = read_later(self._prompt.token, self._device)()
        if token == NO_TOKEN:
            raise not_numbers(self._lengths[slot])
        return token

    @torch.inference_mode()
    def next_tokens(
        self, slots: Sequence[int], tokens: Sequence[int], logits_of: Sequence[int] = ()
    ) -> tuple[list[int], Floats]:
        self._check_rows(slots, tokens)
        chosen = list[int]()
        logits = np.empty((len(logits_of), self._config.llm.vocab_size), np.float32)
        for group, given in _groups(slots, tokens):
            run = self._take_ahead(group, given) or self._launch(group, given)
            rows = [run.slots.index(slot) for slot in group]
            begun = len(chosen)
            wanted = [i for i, row in enumerate(logits_of) if 0 <= row - begun < len(group)]
            ahead = None
            if len(group) == len(slots) and not wanted:
                ahead = self._run_ahead(run, group)
            values = run.read()
            chosen += [values[row] for row in rows]
            for slot, token in zip(group, chosen[begun:], strict=True):
                if token == NO_TOKEN:
                    raise not_numbers(self._lengths[slot] + 1)
            if wanted:
                of_rows = [rows[logits_of[i] - begun] for i in wanted]
                logits[wanted] = run.step.logits[of_rows].cpu().numpy()
            if ahead is not None:
                ahead.inputs = dict(zip(run.slots, values, strict=False))
                self._ahead = ahead
        self._advance(slots)
        return chosen, logits

    def stream(
        self, slot: int, stop_token_ids: Collection[int], sampling: SamplingParams
    ) -> Iterator[int] | None:
        check_slots(self, [slot])
        return self._stream(slot, stop_token_ids, sampling) if slot == self._prompted else None

    def _stream(
        self, slot: int, stop_token_ids: Collection[int], sampling: SamplingParams
    ) -> Iterator[int]:
        token = self.first_token(slot, sampling)
        for remaining in reversed(range(sampling.max_new_tokens)):
            yield token
            full = self._lengths[slot] >= self.max_seq_len
            if token in stop_token_ids or not remaining or full:
                return
            (token,), _ = self.next_tokens([slot], [token])

    def close(self) -> None:
        """Free weights, caches and graphs."""
        names = "_graphs", "_steps", "_prompts", "_prompt", "_caches", "_vision", "_llm", "_ahead"
        for name in names:
            self.__dict__.pop(name, None)

    def _check_rows(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        check_slots(self, slots)
        if len(slots) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens for {len(slots)} slots")
        for token in tokens:
            if not 0 <= token < self._config.llm.vocab_size:
                raise ValueError(f"token {token} of a vocabulary of {self._config.llm.vocab_size}")
        for slot in slots:
            check_room(self._lengths[slot], 1, self.max_seq_len)

    def _advance(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._lengths[slot] += 1

    def _launch(self, slots: Sequence[int], tokens: Sequence[int]) -> _Run:
        """Launch a step that appends a token to each of at most 8 slots."""
        self._ahead = None
        step = self._steps[next(rows for rows in self._steps if rows >= len(slots))]
        step.set_rows(slots, [self._lengths[slot] for slot in slots], tokens)
        return self._run_step(step, list(slots))

    def _run_step(self, step: RowsStep, slots: list[int]) -> _Run:
        sampled = any(self._samples[slot] for slot in slots)
        if self._device == "cpu":
            step(sampled=sampled)
        else:
            self._graphs[len(step.token), sampled].replay()
        return _Run(step, slots, sampled, read_later(step.token, self._device))

    def _run_ahead(self, run: _Run, slots: Sequence[int]) -> _Run | None:
        """Launch the step behind `run`, whose tokens only the device knows yet."""
        room = all(self._lengths[slot] + 2 <= self.max_seq_len for slot in slots)
        if self._device == "cpu" or len(slots) < len(run.slots) or not room:
            return None
        return self._run_step(run.step, run.slots)

    def _take_ahead(self, slots: Sequence[int], tokens: Sequence[int]) -> _Run | None:
        """Return the step that ran ahead if it gave each of `slots` its token."""
        run, self._ahead = self._ahead, None
        if run is None or any(
            run.inputs.get(slot) != token for slot, token in zip(slots, tokens, strict=True)
        ):
            return None
        return run

    def _change(self, slot: int) -> None:
        """Forget a step that ran ahead of what `slot` holds."""
        if self._ahead is not None and slot in self._ahead.slots:
            self._ahead = None
        if slot == self._prompted:
            self._prompted = -1

    def _choose_greedily(self, slot: int) -> None:
        """Forget how the tokens of what was in `slot` before are chosen."""
        if self._samples[slot]:
            self._samples[slot] = False
            self._caches.settings[slot].zero_()

    def _checked(self, step: RowsStep, rows: Sequence[int], ends: Sequence[int]) -> Floats:
        """Return the logits of `rows`; `ends` says behind how many tokens each is."""
        logits: Floats = step.logits[list(rows)].cpu().numpy()
        for row, end in zip(logits, ends, strict=True):
            if not np.isfinite(row.max()):
                raise not_numbers(end)
        return logits


def _groups(
    slots: Sequence[int], tokens: Sequence[int]
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Yield at most 8 slots and their tokens at a time."""
    for first in range(0, len(slots), TOKENS):
        yield slots[first : first + TOKENS], tokens[first : first + TOKENS]
