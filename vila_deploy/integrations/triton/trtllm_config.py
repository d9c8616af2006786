"""config.pbtxt of the LLM in Triton's backend for TensorRT-LLM, which batches requests in flight.

Names, types and shapes are those of triton_backend/all_models/inflight_batcher_llm/tensorrt_llm of
NVIDIA/TensorRT-LLM (0c8de69), parameters those that inflight_batcher_llm/src/model_state.cc and
model_instance_state.cc there read. Inputs that our model does not send are left out.
"""

from __future__ import annotations

from pathlib import Path

from vila_deploy.backends.tensorrt_llm import files
from vila_deploy.backends.tensorrt_llm.releases import Release
from vila_deploy.engine.manifest import Limits
from vila_deploy.integrations.triton.pbtxt import Tensor, parameters_text, tensors_text

LLM_MODEL = "tensorrt_llm"
WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"


LLM_INPUTS = (
    Tensor("input_ids", "TYPE_INT32", (-1,), ragged=True),
    Tensor("input_lengths", "TYPE_INT32", (), optional=False),
    Tensor("request_output_len", "TYPE_INT32", (), optional=False),
    Tensor("end_id", "TYPE_INT32", ()),
    Tensor("pad_id", "TYPE_INT32", ()),
    Tensor("stop_words_list", "TYPE_INT32", (2, -1), ragged=True),
    Tensor("runtime_top_k", "TYPE_INT32", ()),
    Tensor("runtime_top_p", "TYPE_FP32", ()),
    Tensor("temperature", "TYPE_FP32", ()),
    Tensor("seed", "TYPE_UINT64", ()),
    Tensor("streaming", "TYPE_BOOL", ()),
    Tensor("prompt_embedding_table", "TYPE_FP16", (-1, -1), ragged=True),
    Tensor("prompt_table_extra_ids", "TYPE_UINT64", (-1,), ragged=True),
    Tensor("prompt_vocab_size", "TYPE_INT32", ()),
)
OUTPUT_IDS, OUTPUT_LENGTH = "output_ids", "sequence_length"
LLM_OUTPUTS = (
    Tensor(OUTPUT_IDS, "TYPE_INT32", (-1, -1), optional=False),
    Tensor(OUTPUT_LENGTH, "TYPE_INT32", (-1,), optional=False),
)


def llm_config(engine: Path, limits: Limits, release: Release) -> str:
    """Return config.pbtxt of the model that runs the LLM of the engine folder `engine`.

    Its cache has the size that the engine was planned with: the default is 90% of a GPU.
    """
    reuses = "true" if release.reuses_cache else "false"
    parameters = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(engine / files.LLM),
        "executor_worker_path": WORKER,
        "max_beam_width": "1",
        "max_tokens_in_paged_kv_cache": str(limits.max_batch_size * limits.max_seq_len),
        "enable_kv_cache_reuse": reuses,
        "enable_chunked_context": reuses,
        "exclude_input_in_output": "true",
        **dict.fromkeys(release.runtime_switches, "true"),
        # The backend ends without these three, which only constrained answers need.
        "tokenizer_dir": "",
        "guided_decoding_backend": "",
        "xgrammar_tokenizer_info_path": "",
    }
    return (
        f'name: "{LLM_MODEL}"\nbackend: "tensorrtllm"\nmax_batch_size: {limits.max_batch_size}\n'
        "model_transaction_policy { decoupled: true }\n"
        f"dynamic_batching {{ preferred_batch_size: [ {limits.max_batch_size} ] }}\n"
        f"{tensors_text('input', LLM_INPUTS)}{tensors_text('output', LLM_OUTPUTS)}"
        f"{parameters_text(parameters)}"
        # The backend finds its GPUs itself.
        "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
    )
