"""Small random decoder layers with uneven channels, the same on every computer (numpy streams)."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.variants import LLM_FAMILIES
from vila_deploy.model.layerwise import PackedHiddenStates
from vila_deploy.model.llm import transformers_config


@dataclass(frozen=True)
class Case:
    seed: int
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 256
    group_size: int = 64
    sequences: int = 6
    length: int = 100


# 6 × 100 tokens: every token is a clip sample; 20 × 77: every third is.
CASES = {
    "plain": Case(seed=0),
    "grouped_query": Case(seed=1, kv_heads=2),
    "strided": Case(seed=2, group_size=32, sequences=20, length=77),
}


def llm_config(case):
    return LlmConfig(
        family=LLM_FAMILIES["LlamaForCausalLM"],
        hidden_size=case.hidden,
        num_layers=1,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.hidden // case.heads,
        intermediate_size=case.intermediate,
        vocab_size=64,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(),
        quantization=None,
    )


def random_layer(case):
    """A decoder layer and the inputs of its sequences, from RandomState(seed).

    In this order: each parameter by sorted name (matrices normal · sqrt(2/in), vectors uniform
    0.25..1.75), then exp(1.2 · normal) per channel, then each sequence normal · that.
    """
    random = np.random.RandomState(case.seed)
    layer = LlamaDecoderLayer(transformers_config(llm_config(case)), 0)
    layer = layer.eval().requires_grad_(False)
    for _, parameter in sorted(layer.named_parameters()):
        shape = tuple(parameter.shape)
        if len(shape) == 2:
            values = random.standard_normal(shape) * (2 / shape[1]) ** 0.5
        else:
            values = random.random_sample(shape) * 1.5 + 0.25
        parameter.copy_(torch.from_numpy(values))
    size = np.exp(1.2 * random.standard_normal(case.hidden))
    inputs = [
        torch.from_numpy(random.standard_normal((case.length, case.hidden)) * size).float()
        for _ in range(case.sequences)
    ]
    return layer, inputs


def packed_states(case, inputs):
    return PackedHiddenStates.on_device(llm_config(case), list(inputs))
