"""The model before Triton's backend for TensorRT-LLM: prompts and images in, text out.

It tokenizes, encodes images with the engine folder's vision encoder, and sends token ids and image
embeddings to the model that runs the LLM, which batches requests in flight; what comes back becomes
text here. Calls to another model are "business logic scripting" of the Python backend's README.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from numpy.typing import NDArray

from vila_deploy.backends.tensorrt_llm import files
from vila_deploy.backends.tensorrt_llm.releases import release_for
from vila_deploy.backends.tensorrt_llm.sequence import PromptSequence
from vila_deploy.backends.tensorrt_llm.session import import_tensorrt_llm
from vila_deploy.backends.tensorrt_llm.vision_engine import VisionEngine
from vila_deploy.engine.manifest import TOKENIZER_FOLDER, Manifest, read_manifest
from vila_deploy.engine.target import get_target
from vila_deploy.integrations.triton.repository import ENGINE, SLOTS
from vila_deploy.integrations.triton.request import Answer, parse_request
from vila_deploy.integrations.triton.responses import Responses, input_arrays
from vila_deploy.integrations.triton.trtllm_config import LLM_MODEL, OUTPUT_IDS, OUTPUT_LENGTH
from vila_deploy.integrations.triton.trtllm_request import llm_inputs
from vila_deploy.processing.images import place_features
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.answer_text import AnswerText
from vila_deploy.runtime.prompt import Prompt, check_prompt_length
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields


class TritonPythonModel:
    """What the Python backend calls; see its README."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the vision encoder of the engine that config.pbtxt names.

        Args:
            args: `model_config` is config.pbtxt as JSON, `model_repository` the model's folder.
        """
        import triton_python_backend_utils

        self._triton = triton_python_backend_utils
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(args["model_repository"], parameters[ENGINE]["string_value"])
        self._manifest = read_manifest(folder)
        self._tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
        # Ids behind the engine's vocabulary are rows of the prompt table.
        config = Fields.from_file(folder / files.LLM / files.CONFIG).child("pretrained_config")
        self._first_row_id = config.integer("vocab_size", 1)
        self._vision, self._one_pass = self.open_vision(folder, self._manifest), Lock()
        self._threads = ThreadPoolExecutor(int(parameters[SLOTS]["string_value"]))

    def open_vision(self, folder: Path, manifest: Manifest) -> Any:
        """Return an object whose `run` encodes images; tests have one of their own."""
        package, _, torch = import_tensorrt_llm()
        target = get_target(manifest.target)
        release = release_for(target.compute_capability, target.name)
        return VisionEngine(package, torch, folder, release)

    def execute(self, requests: Sequence[Any]) -> None:
        """Let each request wait for a thread; its answer follows piece by piece."""
        for request in requests:
            responses = Responses(self._triton, request.get_response_sender())
            inputs = input_arrays(self._triton, request)
            self._threads.submit(self._answer, inputs, responses)

    def finalize(self) -> None:
        """End what runs."""
        self._threads.shutdown()

    def _answer(self, inputs: Mapping[str, NDArray[Any]], responses: Responses) -> None:
        try:
            answer = parse_request(inputs, self._manifest.model, self._tokenizer)
            self._generate(answer, responses)
        except VilaDeployError as error:
            responses.fail(str(error))
        except Exception as error:  # the client waits for an end, whatever happened
            responses.fail(f"the server failed ({type(error).__name__})")
            raise

    def _generate(self, answer: Answer, responses: Responses) -> None:
        request, limits = answer.request, self._manifest.limits
        prompt, wanted = request.prompt, request.sampling.max_new_tokens
        check_prompt_length(len(prompt), limits.max_input_len)
        room = min(wanted, limits.max_seq_len - len(prompt))
        stops = self._manifest.model.stop_token_ids
        inputs = llm_inputs(self._sequence(prompt), request.sampling, room, sorted(stops))
        text, whole, left = AnswerText(self._tokenizer, request.stop, prompt.strip), "", room
        for token in self._tokens(inputs, responses):
            if token in stops:
                break
            left -= 1
            piece = text.push(token)
            whole += piece
            if piece and answer.streams:
                responses.piece(piece)
            if text.stopped:
                break
        reason = "length" if room == wanted else "context"
        if text.stopped or left:
            reason = "stop"
        rest = text.finish()
        responses.end(rest if answer.streams else whole + rest, reason)

    def _tokens(self, inputs: Mapping[str, NDArray[Any]], responses: Responses) -> Iterator[int]:
        """Yield the tokens of an answer while they come; ends early when nobody waits for them."""
        triton = self._triton
        request = triton.InferenceRequest(
            model_name=LLM_MODEL,
            requested_output_names=[OUTPUT_IDS, OUTPUT_LENGTH],
            inputs=[triton.Tensor(name, value) for name, value in inputs.items()],
        )
        found = request.exec(decoupled=True)
        try:
            for response in found:
                if response.has_error():
                    message = str(response.error().message()).partition("\n")[0]
                    raise VilaDeployError(f"TensorRT-LLM refuses ({message})", fix="ask for less")
                yield from self._new_tokens(response)
                if responses.cancelled:
                    return
        finally:
            # Releases of Triton before 24.09 let the answer run to its end.
            cancel = getattr(found, "cancel", None)
            if cancel is not None:
                cancel()

    def _new_tokens(self, response: Any) -> list[int]:
        ids = self._triton.get_output_tensor_by_name(response, OUTPUT_IDS)
        lengths = self._triton.get_output_tensor_by_name(response, OUTPUT_LENGTH)
        # The last response may hold nothing.
        if ids is None or lengths is None:
            return []
        count = int(lengths.as_numpy().reshape(-1)[0])
        new: list[int] = ids.as_numpy().reshape(-1)[:count].tolist()
        return new

    def _sequence(self, prompt: Prompt) -> PromptSequence:
        """Return the prompt's tokens, with embeddings of images in the table."""
        sequence = PromptSequence(self._first_row_id, self._manifest.model.hidden_size)
        features = [
            place
            for image in prompt.images
            for place in place_features(list(self._encode(image.pixels.tiles)), image.pixels)
        ]
        first, *rest = prompt.chunks
        sequence.ids += first
        for rows, chunk in zip(features, rest, strict=True):
            sequence.append_embeds(rows)
            sequence.ids += chunk
        return sequence

    def _encode(self, pixels: Floats) -> Floats:
        with self._one_pass:
            features: Floats = self._vision.run(pixels)
        return features
