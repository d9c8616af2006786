"""Stands in for Triton's backend for TensorRT-LLM: same tensors, our engine on the CPU, greedy."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from vila_deploy import open_engine
from vila_deploy.utils.arrays import Floats


class TritonPythonModel:
    """Answers requests one after the other; each response holds one new token."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self._engine = open_engine(parameters["stand_in_engine"]["string_value"])
        self._first_row_id = int(parameters["first_row_id"]["string_value"])
        self._lock = threading.Lock()

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            threading.Thread(target=self._answer, args=(request,)).start()

    def _answer(self, request: Any) -> None:
        sender = request.get_response_sender()
        with self._lock:
            try:
                for token in self._tokens(request):
                    ids = triton.Tensor("output_ids", np.array([[[token]]], np.int32))
                    length = triton.Tensor("sequence_length", np.array([[1]], np.int32))
                    sender.send(triton.InferenceResponse([ids, length]))
                sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            except Exception as error:
                response = triton.InferenceResponse([], triton.TritonError(str(error)))
                sender.send(response, triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _tokens(self, request: Any) -> Any:
        session = self._engine.session
        session.keep(0, 0)
        logits = session.prefill(0, self._embeds(request))
        stops = set(_input(request, "stop_words_list")[0, 0].tolist())
        for _ in range(int(_input(request, "request_output_len").item())):
            token = int(logits.argmax())
            yield token
            if token in stops:
                return
            logits = session.decode([0], [token])[0]

    def _embeds(self, request: Any) -> Floats:
        """Return the embeddings [tokens, hidden]: text of the engine, images of the table."""
        ids = _input(request, "input_ids")[0]
        assert len(ids) == _input(request, "input_lengths").item()
        assert _input(request, "runtime_top_k").item() == 1
        rows = ids - self._first_row_id
        embeds = self._engine.session.embed_tokens(np.where(rows < 0, ids, 0).tolist())
        if (rows >= 0).any():
            table = _input(request, "prompt_embedding_table")[0]
            assert len(table) == _input(request, "prompt_vocab_size").item() == rows.max() + 1
            extra = _input(request, "prompt_table_extra_ids")[0]
            assert ((extra != 0) == (rows >= 0)).all()
            embeds[rows >= 0] = table[rows[rows >= 0]]
        return embeds


def _input(request: Any, name: str) -> Any:
    return triton.get_input_tensor_by_name(request, name).as_numpy()
