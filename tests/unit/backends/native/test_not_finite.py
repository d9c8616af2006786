"""Weights or activations beyond float16: an error in one line, or the float32 result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.native_cases import TOLERANCE, built, deviation, pack_llm
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.float16_range import fit_into_float16
from vila_deploy.backends.native.prompts import Prompts
from vila_deploy.backends.native.session import NativeSession
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.kernels.capability import INTERPRETER
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.utils.errors import VilaDeployError

LOUDER = {"v_proj": 1e2, "o_proj": 1e4, "up_proj": 1e2, "down_proj": 1e4}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> NativeSession:
    root = tmp_path_factory.mktemp("not_finite")
    checkpoint = open_checkpoint(make_checkpoint(root / "c", kv_heads=1, layers=1))
    with pytest.MonkeyPatch.context() as patch:
        manifest = built(root / "engine", checkpoint, patch, 16)
    return NativeSession(root / "engine", manifest)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "ask",
    [
        lambda session: session.prefill(session.embed_tokens([4])),
        lambda session: session.decode(4),
        lambda session: session.decode_greedy(2),
        lambda session: list(session.stream((), SamplingParams(3))),
        lambda session: list(session.stream((), SamplingParams(3, temperature=1.0, seed=1))),
    ],
)
def test_logits_that_are_no_numbers_are_an_error(
    session: NativeSession, ask: Callable[[NativeSession], Any]
) -> None:
    session.truncate(0)
    session.prefill(session.embed_tokens([3, 5, 7]))
    kept = session._llm.head.words.clone()
    session._llm.head.words.fill_(torch.nan)
    try:
        with pytest.raises(VilaDeployError, match=r"behind \d tokens are not numbers; a weight"):
            ask(session)
    finally:
        session._llm.head.words.copy_(kept)


@pytest.mark.parametrize("token", [-1, 2**31 - 1, 96_000])
def test_a_token_that_is_none_is_refused(session: NativeSession, token: int) -> None:
    with pytest.raises(ValueError, match="of a vocabulary of"):
        session.decode(token)


@dataclass(frozen=True)
class Louder:
    """A WeightSource with the products of a layer that may be large 100 to 10 000 times so."""

    source: Any

    def tensor(self, name: str) -> torch.Tensor:
        return self.source.tensor(name)

    def linear(self, prefix: str) -> torch.Tensor:
        factor = LOUDER.get(prefix.rpartition(".")[2], 1.0)
        return self.source.linear(prefix).float() * factor


def test_a_prompts_products_may_exceed_float16(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", kv_heads=1, layers=1))
    config, weights = checkpoint.config.llm, Louder(checkpoint.llm)
    louder = SimpleNamespace(
        config=checkpoint.config, llm=weights, vision=checkpoint.vision,
        projector=checkpoint.projector,
    )  # fmt: skip
    reference = ReferenceSession(louder)
    embeds = reference.embed_tokens(range(3, 15))
    expected = reference.prefill(embeds)
    llm = pack_llm(config, weights, 16)
    cache = Cache(config, 16, "cpu")
    step_config = StepConfig(config, 16, INTERPRETER, "cpu")
    step = DecodeStep(step_config, llm, cache)
    prompts = Prompts(step_config, llm, cache, step)
    prompts.append(torch.from_numpy(embeds), 0)
    assert prompts._last.abs().max() > 65504
    assert deviation(step.logits[0].numpy(), expected) < TOLERANCE


def test_activations_beyond_float16_are_scaled_by_a_power_of_two() -> None:
    values = torch.tensor([[1.0, -3.0], [1e5, -2e6], [7e4, 0.25], [32752.0, 1.0], [0.0, 0.0]])
    halves, scale = fit_into_float16(values)
    assert halves.isfinite().all()
    assert scale.flatten().tolist() == [1, 64, 4, 1, 1]
    assert torch.allclose(halves.float() * scale, values, rtol=1e-3)
