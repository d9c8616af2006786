"""AWQ GEMM packing against an unpacker written from the format's description."""

import numpy as np
import pytest
import torch

from tests.support.awq_words import independent_levels
from vila_deploy.formats.awq import AWQ_GEMM
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.utils.errors import VilaDeployError


def random_linear(out_features, in_features, group_size, seed=0, bias=False):
    rng = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    return QuantizedLinear(
        q=torch.randint(0, 16, (out_features, in_features), generator=rng, dtype=torch.uint8),
        scale=torch.rand((out_features, groups), generator=rng).half() + 0.01,
        zero=torch.randint(0, 16, (out_features, groups), generator=rng, dtype=torch.uint8),
        bias=torch.randn(out_features, generator=rng).half() if bias else None,
    )


def test_layout_is_the_described_one():
    linear = random_linear(24, 64, 32)
    tensors = AWQ_GEMM.pack(linear)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "qweight": (torch.int32, (64, 3)),
        "qzeros": (torch.int32, (2, 3)),
        "scales": (torch.float16, (2, 24)),
    }
    assert all(t.is_contiguous() for t in tensors.values())
    q = independent_levels(tensors["qweight"])
    zero = np.repeat(independent_levels(tensors["qzeros"]), 32, axis=0)
    scale = np.repeat(tensors["scales"].numpy().astype(np.float64), 32, axis=0)
    assert np.array_equal(((q - zero) * scale).T, linear.dequantize().double().numpy())


def test_one_word_by_hand():
    q = torch.arange(8, dtype=torch.uint8).reshape(8, 1) + 8
    linear = QuantizedLinear(q, torch.ones(8, 1).half(), torch.full((8, 1), 8, dtype=torch.uint8))
    word = int(AWQ_GEMM.pack(linear)["qweight"]) % (1 << 32)
    # From the low nibble up: channels 0 2 4 6 1 3 5 7, which hold 8 a c e 9 b d f.
    assert f"{word:08x}" == "fdb9eca8"


@pytest.mark.parametrize("bias", [False, True])
def test_round_trip_is_exact(bias):
    linear = random_linear(40, 96, 32, seed=3, bias=bias)
    back = AWQ_GEMM.unpack(AWQ_GEMM.pack(linear), 32)
    for name in ("q", "scale", "zero"):
        assert torch.equal(getattr(back, name), getattr(linear, name))
    assert (back.bias is None) if not bias else torch.equal(back.bias, linear.bias)


def test_refuses_what_does_not_fit():
    with pytest.raises(VilaDeployError, match="packs 8 output channels"):
        AWQ_GEMM.pack(random_linear(12, 32, 32))
    tensors = AWQ_GEMM.pack(random_linear(16, 64, 32))
    with pytest.raises(VilaDeployError, match="qzeros: is missing"):
        AWQ_GEMM.unpack({k: v for k, v in tensors.items() if k != "qzeros"}, 32)
    with pytest.raises(VilaDeployError, match="groups of 48"):
        AWQ_GEMM.unpack(tensors, 48)
    with pytest.raises(VilaDeployError, match=r"qzeros: must be torch.int32 \[1, 2\]"):
        AWQ_GEMM.unpack(tensors, 64)
    with pytest.raises(VilaDeployError, match="scales: must be"):
        AWQ_GEMM.unpack({**tensors, "scales": tensors["scales"].float()}, 32)
