"""Kernels run in Triton's interpreter here, which must be known before triton is imported."""

import os
import random

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Have numbers drawn in a test depend on nothing that ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
