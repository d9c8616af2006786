"""Refuse what generation_config.json asks of VILA1.5's answers that is not done here.

VILA1.5's code generates with the language model's own generation_config.json, from which greedy
decoding keeps all but the sampling parameters; NVILA's code reads the stop tokens alone
(llava/model/language_model/llava_llama.py of branch vila1.5, llava/model/llava_arch.py of main).
"""

from __future__ import annotations

from typing import Any

from vila_deploy.utils.errors import short
from vila_deploy.utils.fields import Fields

# Keys that change greedy answers → values with which they don't.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "repetition_penalty": (1,),
    "sequence_bias": ([], {}),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "watermarking_config": (),
}


def check_decoding(generation: Fields) -> None:
    """Raise VilaDeployError for the first key of generation_config.json that changes answers."""
    for key, neutral in NEUTRAL.items():
        if key in generation and generation.values[key] not in neutral:
            raise generation.error(
                key,
                f"{short(generation.values[key])} is not supported",
                "remove this key: answers are then what the model says most probable",
            )
