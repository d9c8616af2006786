"""A stand-in for tensorrt_llm.bindings.executor: its names and arguments, and how it acts.

Arguments are those of cpp/tensorrt_llm/pybind/executor: for "0.12" of branch v0.12.0-jetson
(20a7cec) and the commits before it, for "1.2" of 24dfa89 (executorConfig.cpp), 007a750
(request.cpp) and 6b25e1e (executor.cpp). Anything else raises TypeError, as pybind11 does.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ARGUMENTS: dict[str, dict[str, set[str]]] = {
    "0.12": {
        "KvCacheConfig": {"enable_block_reuse", "max_tokens", "max_attention_window"},
        "ExecutorConfig": {"max_beam_width", "kv_cache_config", "decoding_config"},
        "SamplingConfig": {"beam_width", "top_k", "top_p", "temperature", "min_length"},
        "OutputConfig": {"return_log_probs", "return_context_logits", "return_generation_logits"},
        "PromptTuningConfig": {"embedding_table"},
        "Request": {
            "input_token_ids", "max_new_tokens", "streaming", "sampling_config", "output_config",
            "end_id", "pad_id", "prompt_tuning_config", "logits_post_processor_name",
        },
        "Executor": {"model_path", "model_type", "executor_config", "use_mmap"},
    },
    "1.2": {
        "KvCacheConfig": {"enable_block_reuse", "max_tokens", "max_attention_window"},
        "ExecutorConfig": {"max_beam_width", "kv_cache_config", "gather_generation_logits"},
        "SamplingConfig": {"beam_width", "top_k", "top_p", "temperature", "min_tokens"},
        "OutputConfig": {"return_log_probs", "return_context_logits", "return_generation_logits"},
        "PromptTuningConfig": {"embedding_table", "input_token_extra_ids"},
        "Request": {
            "input_token_ids", "max_tokens", "streaming", "sampling_config", "output_config",
            "end_id", "pad_id", "prompt_tuning_config", "logits_post_processor_name",
        },
        "Executor": {"model_path", "model_type", "executor_config"},
        "LogitsPostProcessorConfig": {"processor_map", "processor_batched", "replicate"},
        "OrchestratorConfig": {"is_orchestrator", "worker_executable_path"},
        "ParallelConfig": {
            "communication_type", "communication_mode", "device_ids", "participant_ids",
            "orchestrator_config",
        },
    },
}  # fmt: skip
PROPERTIES = {
    "0.12": {
        "ExecutorConfig": {
            "enable_chunked_context", "extended_runtime_perf_knob_config",
            "logits_post_processor_map",
        },
        "ExtendedRuntimePerfKnobConfig": {"multi_block_mode", "enable_context_fmha_fp32_acc"},
    },
    "1.2": {
        "ExecutorConfig": {
            "enable_chunked_context", "extended_runtime_perf_knob_config", "parallel_config",
            "logits_post_processor_config", "gather_generation_logits",
        },
        "ExtendedRuntimePerfKnobConfig": {
            "multi_block_mode", "enable_context_fmha_fp32_acc", "cuda_graph_mode",
        },
    },
}  # fmt: skip


def record_class(release: str, name: str) -> type:
    """A class that takes the arguments and properties of `release`, and holds them."""
    arguments = ARGUMENTS[release].get(name, set())
    properties = arguments | PROPERTIES[release].get(name, set())

    class Record:
        def __init__(self, **given: Any):
            unknown = set(given) - arguments
            if unknown:
                raise TypeError(f"{name}(): incompatible arguments {unknown}")
            for key in properties:
                object.__setattr__(self, key, given.get(key))

        def __setattr__(self, key: str, value: Any) -> None:
            if key not in properties:
                raise AttributeError(f"{name} has no {key}")
            object.__setattr__(self, key, value)

    return Record


class Engine:
    """The model: logits depend on every token and on their order.

    Args:
        embeddings: [vocab, hidden].
        head: [padded vocab, hidden].
    """

    def __init__(self, embeddings: np.ndarray, head: torch.Tensor, max_input: int, max_seq: int):
        self.embeddings, self.head = embeddings, head
        self.max_input, self.max_seq = max_input, max_seq
        # Whether a second pass waits until its request is cancelled.
        self.stops_after_first_pass = False

    def logits(self, embeds: list[Any]) -> torch.Tensor:
        weights = 0.8 ** torch.arange(len(embeds)).flip(0)
        stacked = torch.stack([torch.as_tensor(e).float() for e in embeds])
        return self.head @ (stacked * weights[:, None]).sum(0)


def make_api(release: str, engine: Engine) -> SimpleNamespace:
    """Return the module; `api.executors` are those that were made."""
    names = {*ARGUMENTS[release], *PROPERTIES[release]} - {"Executor"}
    api = SimpleNamespace(**{name: record_class(release, name) for name in names})
    api.ModelType = SimpleNamespace(DECODER_ONLY="decoder")
    api.CommunicationType = SimpleNamespace(MPI="MPI")
    api.CommunicationMode = SimpleNamespace(LEADER="leader", ORCHESTRATOR="orchestrator")
    api.executors = []

    class Executor(FakeExecutor):
        def __init__(self, path: Path, kind: str, config: Any, **more: Any):
            if set(more) - ARGUMENTS[release]["Executor"]:
                raise TypeError(f"Executor(): incompatible arguments {set(more)}")
            assert kind == "decoder"
            super().__init__(release, engine, path, config)
            self.arguments = more
            api.executors.append(self)

    api.Executor = Executor
    return api


class FakeExecutor:
    """Runs requests in threads of its own, as the C++ executor does."""

    def __init__(self, release: str, engine: Engine, path: Path, config: Any):
        self.release, self.engine, self.config = release, engine, config
        built = json.loads((path / "config.json").read_text("utf-8"))["pretrained_config"]
        self.ranks, self.first_row_id = built["mapping"]["world_size"], built["vocab_size"]
        self.requests: list[Any] = []
        self.passes: list[int] = []
        self._reused: dict[tuple[Any, ...], Any] = {}
        self._responses: dict[int, list[Any]] = defaultdict(list)
        self.cancelled: set[int] = set()
        self._change = threading.Condition()
        self._threads: list[threading.Thread] = []
        parallel = getattr(config, "parallel_config", None)
        if self.ranks > 1:
            assert parallel.communication_mode == "orchestrator", "needs mpirun otherwise"
            assert parallel.orchestrator_config.is_orchestrator
            worker = parallel.orchestrator_config.worker_executable_path
            assert Path(worker).name == "executorWorker"
            assert self._processors() is None, "functions can't be sent to workers"
        else:
            assert parallel is None

    def enqueue_request(self, request: Any) -> int:
        number = len(self.requests)
        self.requests.append(request)
        thread = threading.Thread(target=self._run, args=(number, request), daemon=True)
        self._threads.append(thread)
        thread.start()
        return number

    def await_responses(self, *, id: int, timeout: timedelta | None = None) -> list[Any]:
        assert timeout is None or isinstance(timeout, timedelta)
        seconds = None if timeout is None else timeout.total_seconds()
        with self._change:
            self._change.wait_for(lambda: self._responses[id], seconds)
            return self._responses.pop(id, [])

    def cancel_request(self, id: int) -> None:
        with self._change:
            self.cancelled.add(id)
            self._change.notify_all()

    def shutdown(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a request still runs"

    def _processors(self) -> Any:
        if self.release == "0.12":
            return self.config.logits_post_processor_map
        config = self.config.logits_post_processor_config
        return None if config is None else config.processor_map

    def _run(self, number: int, request: Any) -> None:
        try:
            self._loop(number, request)
        except Exception as error:
            response = SimpleNamespace(has_error=lambda: True, error_msg=f"{error}\nmore")
            self._respond(number, response)

    def _loop(self, number: int, request: Any) -> None:
        engine, ids = self.engine, list(request.input_token_ids)
        count = getattr(request, "max_tokens", None) or getattr(request, "max_new_tokens", None)
        longest = engine.max_seq - 1 if self.config.enable_chunked_context else engine.max_input
        if len(ids) > longest:
            raise RuntimeError(f"Prompt length ({len(ids)}) exceeds maximum input length")
        if len(ids) + count > engine.max_seq:
            raise RuntimeError("input and output are longer than max_seq_len")
        embeds = self._prompt_embeds(request, ids)
        processors = self._processors()
        for step in range(count):
            if step and engine.stops_after_first_pass:
                with self._change:
                    self._change.wait_for(lambda: number in self.cancelled)
            logits = engine.logits(embeds)[None, None].clone()
            result_logits = logits[0].clone()
            if request.logits_post_processor_name is not None:
                more = () if self.release == "0.12" else (None,)
                process: Callable[..., None] = processors[request.logits_post_processor_name]
                process(number, logits, [ids], 77, *more)
            token = int(logits.argmax())
            final = number in self.cancelled or step == count - 1
            returned = self._stream_logits(request, result_logits)
            result = SimpleNamespace(
                is_final=final, output_token_ids=[[token]], generation_logits=returned
            )
            self._respond(number, SimpleNamespace(has_error=lambda: False, result=result))
            if final:
                return
            ids.append(token)
            embeds.append(engine.embeddings[token])

    def _stream_logits(self, request: Any, logits: torch.Tensor) -> torch.Tensor | None:
        wanted = request.output_config.return_generation_logits
        gathered = getattr(self.config, "gather_generation_logits", None)
        return logits if wanted and gathered and self.release != "0.12" else None

    def _prompt_embeds(self, request: Any, ids: list[int]) -> list[Any]:
        """Embeddings of a prompt; those that the cache has are not computed again."""
        table = request.prompt_tuning_config.embedding_table
        assert table.dtype == torch.float16
        reuse = bool(self.config.kv_cache_config.enable_block_reuse)
        extra = getattr(request.prompt_tuning_config, "input_token_extra_ids", None)
        assert not reuse or len(extra) == len(ids)
        embeds: list[Any] = []
        computed = 0
        for index, token in enumerate(ids):
            key = tuple(zip(ids[: index + 1], extra[: index + 1], strict=True)) if reuse else ()
            row = token - self.first_row_id
            value = self.engine.embeddings[token] if row < 0 else table[row]
            if reuse and key in self._reused:
                value = self._reused[key]
            else:
                computed += 1
                self._reused[key] = value
            embeds.append(value)
        self.passes.append(computed)
        return embeds

    def _respond(self, number: int, response: Any) -> None:
        with self._change:
            self._responses[number].append(response)
            self._change.notify_all()
