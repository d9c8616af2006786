"""The native backend on a real GPU; run `pytest tests/gpu` by itself."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.paths import TINY_VILA
from tiny_vila.questions import held_out
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render
from vila_deploy.processing.multimodal_prompt import merge_embeddings, text_chunks
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.prompt import place_images

# On an emulated GPU (`-p tests.support.emulator.plugin`) answers are shorter and runs are fewer.
EMULATED = os.environ.get("VILA_DEPLOY_EMULATED") == "1"
NEW_TOKENS, RUNS = (8, 2) if EMULATED else (64, 10)
# Whose repetitions prompt lookup takes for guesses, besides those of the answer.
PROMPT = [1, 5, 9, 30, 31, 5, 9]
EOS = 2
PRODUCTS = {"norm_qkv_kernel", "add_residual_kernel", "gate_up_kernel"}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")


@pytest.fixture(autouse=True)
def _compiled_kernels() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process runs kernels in Triton's interpreter; run tests/gpu by itself")


@pytest.fixture(scope="module")
def target() -> str:
    """The target of this device's compute capability."""
    from vila_deploy.engine.target import load_targets

    here = ".".join(map(str, torch.cuda.get_device_capability()))
    names = [name for name, row in load_targets().items() if row.compute_capability == here]
    if not names:
        pytest.skip(f"no target has compute capability {here}")
    return names[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, target: str) -> Iterator[tuple[Any, Any]]:
    """tiny-vila as it was trained: the engine on this GPU, and the reference on the CPU."""
    from vila_deploy.builder.build import build_engine
    from vila_deploy.builder.resolve import BuildOptions
    from vila_deploy.checkpoint import open_checkpoint
    from vila_deploy.model.vila import ReferenceSession
    from vila_deploy.runtime.open_engine import open_engine

    folder = tmp_path_factory.mktemp("native") / "engine"
    build_engine(TINY_VILA, folder, BuildOptions(target, backend="native", max_seq_len=256))
    with open_engine(folder) as engine:
        yield engine.session.sequence, ReferenceSession(open_checkpoint(TINY_VILA))


def prompt(session: Any) -> np.ndarray:
    """A question about an image that the model never saw, whose answer has several words."""
    chunks, tiles = question()
    return merge_embeddings(chunks, [*session.encode_images(tiles)], session.embed_tokens)


@functools.cache
def question() -> tuple[Any, np.ndarray]:
    """The texts around the image of the question, and the image."""
    asked = held_out(2, ["description"])[1]
    tokenizer = load_tokenizer(TINY_VILA / "llm")
    model = ModelInfo.from_config(open_checkpoint(TINY_VILA).config, tokenizer)
    placed, (pixels,) = place_images(asked.prompt, asked.images, model)
    text = render(PROMPT_TEMPLATES[model.prompt], [], placed)
    return text_chunks(tokenizer, text, model.recipe), pixels.tiles


def test_every_kernel_equals_its_reference(tmp_path: Path) -> None:
    from benchmarks.gpu.checks import check_all
    from benchmarks.gpu.environment import Run
    from vila_deploy.kernels.capability import ComputeCapability

    capability = ComputeCapability(*torch.cuda.get_device_capability())
    assert check_all(Run("cuda", capability, 600.0, tmp_path / "rows.jsonl"))


def test_same_tokens_as_the_reference(pair: tuple[Any, Any]) -> None:
    session, reference = pair
    for each in pair:
        each.truncate(0)
    logits, expected = session.prefill(prompt(session)), reference.prefill(prompt(reference))
    tokens: list[int] = []
    # Behind the end of the answer all that follows is as good as equally likely.
    while EOS not in tokens and len(tokens) < NEW_TOKENS:
        tokens.append(int(expected.argmax()))
        assert int(logits.argmax()) == tokens[-1]
        logits, expected = session.decode(tokens[-1]), reference.decode(tokens[-1])
    assert len(set(tokens)) > 5


def test_ten_runs_give_equal_bytes_and_guessing_the_same_tokens(pair: tuple[Any, Any]) -> None:
    from benchmarks.gpu.prompt_lookup import decode
    from vila_deploy.backends.native.decode_step import DecodeStep
    from vila_deploy.kernels.tile_config import TOKENS

    session, _ = pair
    seen = set()
    for _ in range(RUNS):
        session.truncate(0)
        logits = session.prefill(prompt(session))
        tokens = session.decode_greedy(NEW_TOKENS)
        seen.add((logits.tobytes(), tuple(tokens), session.decode(7).tobytes()))
    assert len(seen) == 1
    assert len(set(tokens)) > 5, "a constant would show nothing"
    wide = DecodeStep(session._config, session._llm, session._cache, TOKENS)
    # Guesses are right behind a text that has said the answer before, else mostly wrong.
    repeated = [int(logits.argmax()), *tokens]
    for text in (repeated, PROMPT):
        session.truncate(0)
        session.prefill(prompt(session))
        guessed, steps = decode(session._step, wide, session._cache, text, NEW_TOKENS)
        assert guessed == tokens
        assert text is PROMPT or steps <= NEW_TOKENS // 2


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, target: str) -> Iterator[Any]:
    """Output head in int4, cache in int8."""
    from vila_deploy.builder.build import build_engine
    from vila_deploy.builder.resolve import BuildOptions
    from vila_deploy.engine.precision import ModulePrecision
    from vila_deploy.runtime.open_engine import open_engine

    folder = tmp_path_factory.mktemp("small") / "engine"
    module_precision = ModulePrecision(lm_head="int4", kv_cache="int8")
    options = BuildOptions(
        target, backend="native", max_seq_len=256, module_precision=module_precision
    )
    build_engine(TINY_VILA, folder, options)
    with open_engine(folder) as engine:
        yield engine.session.sequence


@pytest.mark.parametrize("engine", ["pair", "small"])
def test_tokens_chosen_on_the_device_are_those_of_the_host(
    engine: str, request: pytest.FixtureRequest
) -> None:
    """With what runs ahead, and where a stop token cuts that off."""
    from vila_deploy.engine.sampling import SamplingParams
    from vila_deploy.engine.session import OneSlot
    from vila_deploy.runtime.generate import generate

    found = request.getfixturevalue(engine)
    session = found[0] if engine == "pair" else found
    session.truncate(0)
    logits, expected = session.prefill(prompt(session)), []
    for _ in range(NEW_TOKENS):
        expected.append(int(logits.argmax()))
        logits = session.decode(expected[-1])
    sampling = SamplingParams(NEW_TOKENS)
    assert list(generate(OneSlot(session), prompt(session), (), sampling)) == expected
    stop = expected[5]
    cut = list(generate(OneSlot(session), prompt(session), (stop,), sampling))
    assert cut == expected[: expected.index(stop) + 1]
    assert session.position == int(session._cache.position)


def test_eight_sequences_answer_as_each_would_alone(pair: tuple[Any, Any]) -> None:
    """One of them drawn; and one in a slot that another had before."""
    from vila_deploy.backends.native.slotted_session import SlottedSession
    from vila_deploy.engine.precision import ALL_FP16
    from vila_deploy.engine.sampling import SamplingParams

    lone = pair[0]
    parts = lone._config, lone._llm, lone._vision, ALL_FP16
    several = SlottedSession.of_parts(*parts, slots=8)
    greedy = SamplingParams(NEW_TOKENS)
    asked = [greedy] * 7 + [SamplingParams(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=1)]
    prompts, expected = [[*PROMPT, *range(40, 40 + 3 * n)] for n in range(8)], []
    for tokens, sampling in zip(prompts, asked, strict=True):
        lone.truncate(0)
        lone.prefill(lone.embed_tokens(tokens))
        expected.append(list(lone.stream((), sampling)))
    several.prefill(3, several.embed_tokens(prompts[7]))
    several.keep(3, 0)
    answers = []
    for slot, (tokens, sampling) in enumerate(zip(prompts, asked, strict=True)):
        several.prefill(slot, several.embed_tokens(tokens))
        answers.append([several.first_token(slot, sampling)])
    for _ in range(NEW_TOKENS - 1):
        chosen, _ = several.next_tokens(range(8), [answer[-1] for answer in answers])
        for answer, token in zip(answers, chosen, strict=True):
            answer.append(token)
    assert answers == expected


def after_a_step(session: Any, mode: Any, *, fused_warps: bool = False) -> list[torch.Tensor]:
    """What steps leave behind 20 tokens of noise: once launch by launch, then twice as a graph.

    Args:
        fused_warps: separate products have as many warps as those of a fused launch.
    """
    from vila_deploy.backends.native.decode_step import Cache, DecodeStep
    from vila_deploy.kernels.fused_layer import with_fused_warps

    config = dataclasses.replace(session._config, launch_mode=mode)
    cache = Cache(config.llm, config.max_seq_len, config.device)
    step = DecodeStep(config, session._llm, cache)
    launches = [
        with_fused_warps(launch) if fused_warps and launch.name in PRODUCTS else launch
        for launch in step.launches
    ]
    torch.manual_seed(0)
    cache.keys.normal_()
    cache.values.normal_()
    cache.position.fill_(20)
    step.token.fill_(30)
    found = []

    def run() -> None:
        for launch in launches:
            launch()

    def keep() -> None:
        torch.cuda.synchronize()
        kept = (step.logits, step.token, cache.keys, cache.values, cache.position)
        found.extend(tensor.clone() for tensor in kept)

    run()
    keep()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(2):
        graph.replay()
        keep()
    return found


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["separate", "merged-attention", "pdl", "pdl-merged-attention"])
def test_other_launch_modes_give_the_same_bits(pair: tuple[Any, Any], name: str) -> None:
    from vila_deploy.kernels.launch_mode import LAUNCH_MODES, PDL_CAPABILITY, LaunchMode

    session, _ = pair
    if LAUNCH_MODES[name].pdl and session._config.capability < PDL_CAPABILITY:
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    expected = after_a_step(session, LaunchMode())
    assert same(after_a_step(session, LAUNCH_MODES[name]), expected)


def test_opening_takes_the_preferred_launch_mode(pair: tuple[Any, Any]) -> None:
    """From 9.0 on its steps have the bytes of separate launches, also where they overlap."""
    from vila_deploy.kernels.launch_mode import PDL_CAPABILITY, PREFERRED

    session, _ = pair
    choice = session.choices["kernel_launch"]
    early = session._config.capability >= PDL_CAPABILITY
    assert choice["mode"] == (PREFERRED if early else "separate"), choice["reason"]


def test_a_fused_launch_gives_the_bits_of_its_phases(pair: tuple[Any, Any]) -> None:
    from vila_deploy.kernels.launch_mode import LaunchMode

    session, _ = pair
    expected = after_a_step(session, LaunchMode(), fused_warps=True)
    assert expected[0].isfinite().all()
    for merge in (False, True):
        mode = LaunchMode(fuse_layers=True, merge_attention=merge)
        assert same(after_a_step(session, mode, fused_warps=True), expected)


def test_equal_seeds_draw_equal_tokens(pair: tuple[Any, Any]) -> None:
    from vila_deploy.engine.sampling import SamplingParams
    from vila_deploy.engine.session import OneSlot
    from vila_deploy.runtime.generate import generate

    session = OneSlot(pair[0])
    answers = [
        tuple(generate(session, prompt(session), (), SamplingParams(NEW_TOKENS, 1.0, 0.9, seed)))
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_parts_in_host_memory_give_the_same_bits(
    target: str, pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton reads the table in pinned memory, and the tower's layers come and go."""
    from vila_deploy.backends.native import build as build_module
    from vila_deploy.backends.native.memory import EMBEDDINGS, VISION
    from vila_deploy.builder.build import build_engine
    from vila_deploy.builder.resolve import BuildOptions
    from vila_deploy.runtime.open_engine import open_engine

    monkeypatch.setattr(build_module, "host_parts", lambda *_: (EMBEDDINGS, VISION))
    folder = tmp_path / "engine"
    build_engine(TINY_VILA, folder, BuildOptions(target, backend="native", max_seq_len=256))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 72, 72), np.float32)
    whole, _ = pair
    with open_engine(folder) as engine:
        streamed = engine.session.sequence
        for session in (whole, streamed):
            session.truncate(0)
        assert np.array_equal(streamed.encode_images(pixels), whole.encode_images(pixels))
        logits = [s.prefill(prompt(s)) for s in (whole, streamed)]
        assert np.array_equal(*logits)
        assert whole.decode_greedy(8) == streamed.decode_greedy(8)


def test_a_tower_in_int8_is_near_the_float16_one_and_may_be_streamed(
    target: str, pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vila_deploy.backends.native import build as build_module
    from vila_deploy.backends.native.memory import VISION
    from vila_deploy.builder.build import build_engine
    from vila_deploy.builder.resolve import BuildOptions
    from vila_deploy.engine.precision import ModulePrecision
    from vila_deploy.runtime.open_engine import open_engine

    pixels = np.random.default_rng(0).standard_normal((1, 3, 72, 72), np.float32)
    options = BuildOptions(
        target, backend="native", max_seq_len=256, module_precision=ModulePrecision(vision="int8")
    )
    found = []
    for name, outside in (("all", ()), ("few", (VISION,))):
        monkeypatch.setattr(build_module, "host_parts", lambda *_, outside=outside: outside)
        build_engine(TINY_VILA, tmp_path / name, options)
        with open_engine(tmp_path / name) as engine:
            found.append(engine.session.encode_images(pixels))
    assert np.array_equal(*found)
    plain = pair[0].encode_images(pixels)
    assert 0 < np.linalg.norm(found[0] - plain) / np.linalg.norm(plain) < 0.05
