"""Run the LLM's engines in TensorRT-LLM's Executor, its C++ runtime.

One GPU: in this process. Several: TensorRT-LLM starts a worker for each, and this process asks
them (orchestrator mode), so that nothing is started with mpirun. Names and arguments are those of
tensorrt_llm.bindings.executor in 0.12 (its type stubs; branch v0.12.0-jetson at 20a7cec) and in
0.16 to 1.2 (cpp/tensorrt_llm/pybind/executor at 0396172, 24dfa89, 007a750, 6b25e1e).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vila_deploy.backends.tensorrt_llm import files
from vila_deploy.backends.tensorrt_llm.generation import (
    Generation,
    SteppedGeneration,
    StreamedGeneration,
)
from vila_deploy.backends.tensorrt_llm.releases import Release
from vila_deploy.backends.tensorrt_llm.sequence import PromptSequence
from vila_deploy.engine.manifest import Limits
from vila_deploy.utils.errors import VilaDeployError

DEVICE = "cuda"
PROCESSOR = "vila_deploy"
# No token ends a request: the caller knows when an answer is complete.
NO_END_ID = -1
# Variables in which launchers of MPI programs count their processes.
MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class LlmExecutor:
    """The engines in `folder`; one request at a time.

    Args:
        package: the module tensorrt_llm.
        api: the module tensorrt_llm.bindings.executor.
        ranks: GPUs that the engine was built for.
    """

    def __init__(
        self,
        package: Any,
        api: Any,
        torch: Any,
        folder: Path,
        limits: Limits,
        release: Release,
        ranks: int,
    ):
        self._api, self._torch, self._release = api, torch, release
        self._max_seq_len, self._streams = limits.max_seq_len, ranks > 1
        self._stepped: SteppedGeneration | None = None
        config = _config(api, limits, release)
        if self._streams:
            worker = Path(package.__file__).parent / "bin" / "executorWorker"
            check_workers(torch, worker, ranks)
            _start_workers(api, config, worker)
        else:
            _set_processor(api, config, self._process_logits)
        # Without a second copy of the engine in memory that GPU and CPU share.
        mapped = {"use_mmap": True} if release.maps_engines else {}
        kind = api.ModelType.DECODER_ONLY
        self._executor = api.Executor(folder / files.LLM, kind, config, **mapped)

    def begin(self, sequence: PromptSequence) -> Generation:
        """Start a request that continues `sequence`.

        Raises:
            VilaDeployError: the executor refuses it.
        """
        generation: Generation
        if self._streams:
            generation = StreamedGeneration(self._executor)
        else:
            generation = self._stepped = SteppedGeneration(self._executor, self._torch)
        generation.start(self._request(sequence))
        return generation

    def close(self) -> None:
        """Free the engines and end the workers."""
        self._executor.shutdown()

    def _request(self, sequence: PromptSequence) -> Any:
        api = self._api
        table = self._torch.from_numpy(sequence.table.copy())
        if not self._streams:
            table = table.to(DEVICE)
        reuse = {"input_token_extra_ids": sequence.extra_ids} if self._release.reuses_cache else {}
        processor = {} if self._streams else {"logits_post_processor_name": PROCESSOR}
        length = {self._release.length_argument: self._max_seq_len - len(sequence)}
        return api.Request(
            input_token_ids=sequence.ids,
            streaming=True,
            sampling_config=api.SamplingConfig(beam_width=1, top_k=1),
            output_config=api.OutputConfig(return_generation_logits=self._streams),
            end_id=NO_END_ID,
            pad_id=0,
            prompt_tuning_config=api.PromptTuningConfig(embedding_table=table, **reuse),
            **processor,
            **length,
        )

    def _process_logits(
        self, request_id: int, logits: Any, tokens: Any, stream: int, client_id: Any = None
    ) -> None:
        """Called by the executor between a pass and its sampler; not always with `client_id`."""
        if self._stepped is not None:
            self._stepped.process_logits(logits, stream)


def _config(api: Any, limits: Limits, release: Release) -> Any:
    """Return an ExecutorConfig whose cache has the planned size: the default is 90% of a GPU."""
    cache = api.KvCacheConfig(
        enable_block_reuse=release.reuses_cache,
        max_tokens=limits.max_batch_size * limits.max_seq_len,
    )
    config = api.ExecutorConfig(max_beam_width=1, kv_cache_config=cache)
    config.enable_chunked_context = release.reuses_cache
    knobs = api.ExtendedRuntimePerfKnobConfig()
    for name in release.runtime_switches:
        setattr(knobs, name, True)
    config.extended_runtime_perf_knob_config = knobs
    return config


def _set_processor(api: Any, config: Any, process: Any) -> None:
    processors = {PROCESSOR: process}
    if hasattr(api, "LogitsPostProcessorConfig"):
        config.logits_post_processor_config = api.LogitsPostProcessorConfig(
            processor_map=processors
        )
    else:
        config.logits_post_processor_map = processors


def _start_workers(api: Any, config: Any, worker: Path) -> None:
    config.parallel_config = api.ParallelConfig(
        communication_type=api.CommunicationType.MPI,
        communication_mode=api.CommunicationMode.ORCHESTRATOR,
        orchestrator_config=api.OrchestratorConfig(
            is_orchestrator=True, worker_executable_path=str(worker)
        ),
    )
    # From 0.17 on beside the engine's own --gather_generation_logits.
    if hasattr(config, "gather_generation_logits"):
        config.gather_generation_logits = True


def check_workers(torch: Any, worker: Path, ranks: int) -> None:
    """Raise VilaDeployError if workers for `ranks` GPUs can't be started from here."""
    found = torch.cuda.device_count()
    if found < ranks:
        raise VilaDeployError(
            f"was built for {ranks} GPUs, {found} are here",
            fix="run it where they are, or build it with a smaller --tp and --pp",
        )
    if not worker.is_file():
        raise VilaDeployError(
            "TensorRT-LLM's executorWorker, which runs each GPU, is not here",
            where=worker,
            fix="install NVIDIA's wheel of TensorRT-LLM",
        )
    if any(int(os.environ.get(name) or 1) > 1 for name in MPI_SIZE_VARIABLES):
        raise VilaDeployError(
            "several processes were started for one engine",
            fix="start it without mpirun: TensorRT-LLM starts its workers itself",
        )
