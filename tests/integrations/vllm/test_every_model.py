"""Every kind of model under vLLM in float32, token for token as our reference answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.vllm.one_process import answers, check_answers
from tests.support.tiny import make_checkpoint
from tests.support.vllm_cases import CASES
from vila_deploy.integrations.served_model import read_served_model

# Logits that are closer than this may change places between two orders of summation.
NEAR_TIE = 1e-3


@pytest.mark.parametrize("case", CASES)
def test_answers_equal_the_reference(case: str, tmp_path: Path) -> None:
    served = read_served_model(make_checkpoint(tmp_path / "c", **CASES[case]))
    found = answers(served, case, dtype="float32")
    check_answers(served, case, found, NEAR_TIE)
