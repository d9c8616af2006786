"""The generation loop and the conversation, on a session whose answers are known beforehand."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.scripted_session import ScriptedSession
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.sampling import SamplingParams, penalize_repetition, sample
from vila_deploy.engine.session import OneSlot
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render, with_markers
from vila_deploy.processing.multimodal_prompt import merge_embeddings, text_chunks
from vila_deploy.processing.tokenizer import IncrementalDetokenizer, load_tokenizer
from vila_deploy.runtime.conversation import Conversation
from vila_deploy.runtime.generate import generate
from vila_deploy.runtime.token_sampler import TokenSampler
from vila_deploy.utils.errors import VilaDeployError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("generate") / "c")


def conversation(checkpoint: Path, answer: str, max_seq_len: int = 2000) -> Conversation:
    tokenizer = load_tokenizer(checkpoint / "llm")
    script = [*tokenizer.encode(answer), 2] * 3
    session = ScriptedSession(script, max_seq_len=max_seq_len)
    model = ModelInfo.from_config(load_config(checkpoint), tokenizer)
    return Conversation(OneSlot(session), tokenizer, model, max_input_len=1000)


def test_answer_streams_and_stops(checkpoint: Path) -> None:
    shown: list[str] = []
    chat = conversation(checkpoint, " the rain is on the sun, été 🎉")
    answer = chat.ask("Why?", [], SamplingParams(), shown.append)
    assert answer.text == "the rain is on the sun, été 🎉" == "".join(shown).strip()
    assert "\ufffd" not in "".join(shown)
    assert answer.finish_reason == "stop"
    assert answer.tokens[-1] == 2


def test_max_new_tokens_and_context_end_an_answer(checkpoint: Path) -> None:
    chat = conversation(checkpoint, " the rain is on the sun")
    assert len(chat.ask("Why?", [], SamplingParams(max_new_tokens=3)).tokens) == 3
    full = conversation(checkpoint, " the rain is on the sun")
    length = conversation(checkpoint, "x").ask("Why?", [], SamplingParams()).prompt_tokens
    full.session.sequence.max_seq_len = length + 1
    answer = full.ask("Why?", [], SamplingParams())
    assert (len(answer.tokens), answer.finish_reason) == (2, "context")


def test_pictures_lie_where_their_markers_are(checkpoint: Path) -> None:
    chat = conversation(checkpoint, " a")
    question = "first <image> second <image> end"
    answer = chat.ask(question, [Image.new("RGB", (9, 9))] * 2, SamplingParams())
    text = render(PROMPT_TEMPLATES["vicuna_v1"], [], question)
    left, middle, right = (chat.tokenizer.encode(piece) for piece in text.split("<image>"))
    expected = [1, *left, 1, 1, 1, 1, *middle, 1, 1, 1, 1, *right]
    assert chat.session.sequence.prompt[: len(expected)].tolist() == expected
    assert answer.prompt_tokens == len(expected)


def test_second_turn_holds_the_first(checkpoint: Path) -> None:
    chat = conversation(checkpoint, " a")
    first = chat.ask("one", [Image.new("RGB", (9, 9))], SamplingParams())
    second = chat.ask("two", [], SamplingParams())
    assert chat.turns == [("<image>\none", "a"), ("two", "a")]
    assert second.prompt_tokens > first.prompt_tokens
    text = render(PROMPT_TEMPLATES["vicuna_v1"], chat.turns[:1], "two")
    assert "ASSISTANT: a</s>USER: two ASSISTANT:" in text
    assert 2 in text_chunks(chat.tokenizer, text)[1]
    chat.reset()
    assert chat.ask("one", [], SamplingParams()).prompt_tokens < first.prompt_tokens


def test_a_marker_in_an_answer_asks_for_no_picture(checkpoint: Path) -> None:
    chat = conversation(checkpoint, " see <image> here")
    assert chat.ask("What?", [], SamplingParams()).text == "see <image> here"
    assert chat.ask("And?", [], SamplingParams()).text == "see <image> here"


def test_a_question_that_is_no_utf8_is_refused(checkpoint: Path) -> None:
    with pytest.raises(VilaDeployError, match="not valid UTF-8"):
        conversation(checkpoint, " a").ask("\udcff", [], SamplingParams())


def test_too_long_a_prompt_and_wrong_markers_are_refused(checkpoint: Path) -> None:
    chat = conversation(checkpoint, " a")
    with pytest.raises(VilaDeployError, match=r"2 <image> markers for 1 image"):
        chat.ask("<image> <image>", [Image.new("RGB", (9, 9))], SamplingParams())
    with pytest.raises(VilaDeployError, match="--max-input-len"):
        chat.ask("long " * 1000, [], SamplingParams())
    assert chat.turns == []
    assert with_markers("hi", 2) == "<image>\n<image>\nhi"


def test_choose_follows_temperature_and_top_p() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)

    def frequencies(sampling: SamplingParams) -> np.ndarray:
        draws = [sample(logits, sampling, random) for _ in range(4000)]
        return np.bincount(draws, minlength=4) / 4000

    assert sample(logits, SamplingParams(), random) == 0
    np.testing.assert_allclose(
        frequencies(SamplingParams(temperature=1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.03
    )
    # 0.7 of the mass: the first two tokens, renormalised.
    np.testing.assert_allclose(
        frequencies(SamplingParams(temperature=1.0, top_p=0.7)), [0.625, 0.375, 0, 0], atol=0.03
    )
    assert frequencies(SamplingParams(temperature=0.01))[0] == 1
    assert frequencies(SamplingParams(temperature=1.0, top_p=1e-6))[0] == 1


def test_top_k_and_top_p_together() -> None:
    logits = np.log(np.array([0.05, 0.3, 0.15, 0.5], np.float32))
    random = np.random.default_rng(0)

    def drawn(sampling: SamplingParams) -> set[int]:
        return {sample(logits, sampling, random) for _ in range(300)}

    assert drawn(SamplingParams(temperature=1.0, top_k=1)) == {3}
    assert drawn(SamplingParams(temperature=1.0, top_k=3)) == {1, 2, 3}
    assert drawn(SamplingParams(temperature=1.0, top_k=3, top_p=0.8)) == {1, 3}
    assert drawn(SamplingParams(temperature=1.0, top_k=9)) == {0, 1, 2, 3}


def test_a_repetition_penalty_weighs_on_what_was_said() -> None:
    """transformers divides positive logits and multiplies negative ones (Keskar et al. 2019)."""
    logits = np.array([4.0, 3.0, -1.0, -3.0], np.float32)
    penalized = penalize_repetition(logits, np.array([0, 3]), 2.0)
    assert penalized.tolist() == [2.0, 3.0, -1.0, -6.0]
    assert logits[0] == 4.0
    sampler = TokenSampler(SamplingParams(repetition_penalty=2.0), prompt_tokens=(0, 999))
    assert [sampler.choose(logits) for _ in range(3)] == [1, 0, 0]


@pytest.mark.parametrize("penalty", [1e-40, 1e-300])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-320])
def test_tiny_settings_choose_a_token(penalty: float, temperature: float) -> None:
    """Quotients beyond float32 would be infinite, and their differences no numbers."""
    logits = np.array([4.0, 3.0, -1.0, 0.0], np.float32)
    params = SamplingParams(repetition_penalty=penalty, temperature=temperature)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = TokenSampler(params, prompt_tokens=(0, 1, 2, 3))
        assert sampler.choose(logits) in (0, 1)


def test_a_slot_that_generate_has_filled_is_not_reused(checkpoint: Path) -> None:
    """Of the same length as the conversation's prompt and answer, so that nobody could tell."""
    chat = conversation(checkpoint, " a")
    first = chat.ask("Why?", [], SamplingParams(1))
    held = chat.session.length(0)
    list(generate(chat.session, np.zeros((held, 128), np.float32), (), SamplingParams(1)))
    assert chat.session.length(0) == held
    chat.reset()
    again = chat.ask("Why?", [], SamplingParams(1))
    assert again.prompt_tokens == first.prompt_tokens
    assert again.cached_tokens == 0


def test_seed_repeats_draws() -> None:
    session = OneSlot(ScriptedSession([5] * 30, vocab=50))

    def draw(seed: int) -> list[int]:
        sampling = SamplingParams(max_new_tokens=1, temperature=5.0, seed=seed)
        return list(generate(session, np.zeros((1, 4), np.float32), (), sampling))

    assert draw(1) == draw(1)
    assert len({draw(seed)[0] for seed in range(20)}) > 5


def test_splice_puts_features_between_pieces() -> None:
    embeds = merge_embeddings(
        [[1, 2], [3]],
        [np.full((2, 4), 9.0, np.float32)],
        lambda ids: np.repeat(np.array(ids, np.float32)[:, None], 4, 1),
    )
    assert embeds[:, 0].tolist() == [1, 2, 9, 9, 3]


def test_text_stream_holds_back_half_a_character(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint / "llm")
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode("a é🎉b")
    pushed = [detokenizer.push(i) for i in ids]
    assert "".join(pushed) + detokenizer.finish() == tokenizer.decode(ids)
    assert not any("\ufffd" in text for text in pushed)
