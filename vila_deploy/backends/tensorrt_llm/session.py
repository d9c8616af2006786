"""Run an engine through TensorRT-LLM's Python runtime (ModelRunner, 0.12 to 1.2.1).

Written against the source of those releases and tested against a module that records its calls.

All embeddings of a prompt are rows of the prompt table, with ids that count up from the end of the
vocabulary, so that images and text are treated alike. `ModelRunner.generate` loops by itself: it
runs in a thread, its logits processor passes the logits of each step to the session, and it is made
to choose the session's next token by masking the logits of all others.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from vila_deploy.backends.tensorrt_llm import files
from vila_deploy.backends.tensorrt_llm.releases import release_for
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.target import get_target
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import read_json_object
from vila_deploy.utils.own_stdout import imports_print_to_stderr, libraries_print_to_stderr

STOP = None


class TensorrtLlmSession:
    """Run an engine folder; implements `vila_deploy.engine.session.SequenceSession`.

    `max_seq_len` is one less than the engine's, which also counts the token after the last pass.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        _check_one_gpu(folder)
        self.position, self.max_seq_len = 0, manifest.limits.max_seq_len - 1
        self._max_input_len = manifest.limits.max_input_len
        self._vocab_size = manifest.model.vocab_size
        self._table = np.load(folder / files.EMBEDDING, mmap_mode="r")
        self._embeds: list[Floats] = []
        self._generating = False
        with ExitStack() as stack:
            # Its C++ code and its Python code print to stdout, where the answer goes.
            stack.enter_context(libraries_print_to_stderr())
            self._thread = _RuntimeThread(lambda: Runtime(folder, manifest))
            self._own_stdout = stack.pop_all()

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        """Return features [images, tokens, hidden] of [images, 3, size, size]."""
        self._end_generation()
        features: Floats = self._thread.call(lambda runtime: runtime.encode(pixels))
        return features

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return self._table[np.asarray(tokens, np.int64)].astype(np.float32)

    def prefill(self, embeds: Floats) -> Floats:
        """Append [tokens, hidden]; return logits of the last token [vocab].

        Earlier tokens are computed again, since the runtime has no call that adds to a prompt.
        """
        self._end_generation()
        self._embeds.append(np.asarray(embeds, np.float32))
        prompt = np.concatenate(self._embeds)
        if len(prompt) > self._max_input_len:
            self._embeds.pop()
            raise VilaDeployError(
                f"{len(prompt)} tokens are more than the {self._max_input_len} that this engine "
                "takes at once",
                fix="ask for less, or build it with a larger --max-input-len",
            )
        self.position = len(prompt)
        logits = self._thread.begin(lambda runtime, step: runtime.generate(prompt, step))
        self._generating = True
        return self._without_padding(logits)

    def decode(self, token: int) -> Floats:
        logits = self._thread.step(token) if self._generating else None
        if logits is None:  # the token ended the runtime's loop
            self._generating = False
            return self.prefill(self.embed_tokens([token]))
        self._embeds.append(self.embed_tokens([token]))
        self.position += 1
        return self._without_padding(logits)

    def truncate(self, tokens: int) -> None:
        self._end_generation()
        self._embeds = [np.concatenate(self._embeds)[:tokens]] if tokens else []
        self.position = tokens

    def close(self) -> None:
        """End the thread, which frees the engines."""
        self._end_generation()
        self._thread.close()
        self._own_stdout.close()

    def _end_generation(self) -> None:
        if self._generating:
            self._generating = False
            self._thread.end()

    def _without_padding(self, logits: Floats) -> Floats:
        """Return the logits of the model's own vocabulary; the engine pads it."""
        return logits[: self._vocab_size]


Step = Callable[[Floats], int | None]
"""A function from the logits of a pass to the next token or STOP."""


class Runtime:
    """The engines of one GPU; all calls come from one thread, since CUDA keeps state by thread."""

    device = "cuda"

    def __init__(self, folder: Path, manifest: Manifest):
        self._trtllm, self._torch = _import()
        release = release_for(get_target(manifest.target).compute_capability, manifest.target)
        runtime = self._trtllm.runtime
        self._output = release.vision_output
        self._stops = manifest.model.stop_token_ids
        self._max_seq_len = manifest.limits.max_seq_len
        engine = (folder / files.VISION / release.vision_engine).read_bytes()
        self._vision = runtime.Session.from_serialized_engine(engine)
        self._llm = runtime.ModelRunner.from_dir(engine_dir=str(folder / files.LLM), rank=0)

    def encode(self, pixels: Floats) -> Floats:
        torch = self._torch
        half = self._trtllm._utils.str_dtype_to_trt("float16")
        features = []
        for start in range(0, len(pixels), files.MAX_IMAGES):
            batch = torch.from_numpy(np.ascontiguousarray(pixels[start : start + files.MAX_IMAGES]))
            batch = batch.to(self.device, torch.float16).contiguous()
            info = self._trtllm.runtime.TensorInfo(files.VISION_INPUT, half, tuple(batch.shape))
            (output_info,) = self._vision.infer_shapes([info])
            output = torch.empty(tuple(output_info.shape), dtype=torch.float16, device=self.device)
            stream = torch.cuda.current_stream()
            if not self._vision.run(
                {files.VISION_INPUT: batch}, {self._output: output}, stream.cuda_stream
            ):
                raise VilaDeployError(
                    "TensorRT could not run the vision engine", fix="build the engine again"
                )
            stream.synchronize()
            features.append(output.float().cpu().numpy())
        return np.concatenate(features)

    def generate(self, embeds: Floats, step: Step) -> None:
        """Run one pass over the prompt, then one for each token that `step` returns, until STOP."""
        torch, runner = self._torch, self._llm
        first, count = runner.vocab_size, len(embeds)
        stopped = False

        def take(number: int, ids: Any, logits: Any) -> Any:
            nonlocal stopped
            token = step(logits[0].float().cpu().numpy().copy())
            if token is STOP:
                stopped = True
                return logits
            # In place, since the next pass writes into this buffer.
            logits.fill_(torch.finfo(logits.dtype).min)
            logits[0, token] = 0
            return logits

        # min_length 0 leaves end_id without a penalty; `step` ends the loop, whatever end_id is.
        end = self._stops[-1] if self._stops else first - 1
        sampling = self._trtllm.runtime.SamplingConfig(
            end_id=end,
            pad_id=end,
            max_new_tokens=self._max_seq_len - count,
            num_beams=1,
            top_k=1,
            temperature=1.0,
            min_length=0,
        )
        runner.generate(
            [torch.arange(first, first + count, dtype=torch.int32)],
            sampling_config=sampling,
            prompt_table=torch.from_numpy(embeds)[None],
            prompt_tasks="0",
            logits_processor=take,
            stopping_criteria=lambda number, ids, logits: stopped,
        )


class _RuntimeThread:
    """A Runtime in its own thread, which does one call at a time for one caller."""

    def __init__(self, make: Callable[[], Runtime]):
        self._requests: queue.Queue[Any] = queue.Queue()
        self._answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()
        self._answer()

    def call(self, work: Callable[[Runtime], Any]) -> Any:
        """Return the result of `work` on the runtime."""
        self._requests.put(work)
        return self._answer()[1]

    def begin(self, work: Callable[[Runtime, Step], None]) -> Floats:
        """Start a generation and return the logits of its first pass."""
        self._requests.put(lambda runtime: work(runtime, self._step))
        kind, logits = self._answer()
        if kind != "logits":
            raise VilaDeployError(
                "TensorRT-LLM gave no logits",
                fix="build the engine for one GPU, without --tp and --pp",
            )
        return logits

    def step(self, token: int) -> Floats | None:
        """Return the logits after `token`; None if the generation ended instead."""
        self._requests.put(token)
        kind, logits = self._answer()
        return logits if kind == "logits" else None

    def end(self) -> None:
        """End the generation that waits for a token."""
        self._requests.put(STOP)
        self._answer()

    def close(self) -> None:
        """End the thread."""
        self._requests.put(STOP)
        self._thread.join()

    def _answer(self) -> tuple[str, Any]:
        kind, value = self._answers.get()
        if kind == "error":
            raise value if isinstance(value, VilaDeployError) else _failure(value) from value
        return kind, value

    def _step(self, logits: Floats) -> int | None:
        """Pass logits to the caller and wait for its token; called by the runtime's loop."""
        self._answers.put(("logits", logits))
        token: int | None = self._requests.get()
        return token

    def _work(self, make: Callable[[], Runtime]) -> None:
        try:
            runtime = make()
        except Exception as error:
            self._answers.put(("error", error))
            return
        self._answers.put(("done", None))
        while (work := self._requests.get()) is not STOP:
            try:
                self._answers.put(("done", work(runtime)))
            except Exception as error:
                self._answers.put(("error", error))


def _failure(error: Exception) -> VilaDeployError:
    first_line = str(error).partition("\n")[0] or type(error).__name__
    return VilaDeployError(
        f"TensorRT-LLM failed ({first_line[:200]})",
        fix="build the engine again with the version that is installed",
    )


def _import() -> tuple[Any, Any]:
    """Import and return tensorrt_llm and torch."""
    try:
        with imports_print_to_stderr():
            import tensorrt_llm
            import tensorrt_llm._utils
            import tensorrt_llm.runtime
            import torch
    except Exception as error:  # a half-installed TensorRT-LLM raises what its libraries raise
        first_line = str(error).partition("\n")[0]
        raise VilaDeployError(
            f"TensorRT-LLM can't be loaded ({first_line[:200]})",
            fix="install the version that built the engine; manifest.json names it",
        ) from error
    return tensorrt_llm, torch


def _check_one_gpu(folder: Path) -> None:
    config = read_json_object(folder / files.LLM / files.CONFIG)
    mapping = config.get("pretrained_config", {}).get("mapping", {})
    ranks = mapping.get("world_size", 1)
    if ranks != 1:
        raise VilaDeployError(
            f"was built for {ranks} GPUs, vila-deploy runs TensorRT-LLM on one",
            where=folder,
            fix="build it without --tp and --pp; docs/tensorrt-llm.md says what TensorRT-LLM's own "
            f"runner needs for mpirun -n {ranks}",
        )
