"""The output Hessians of q_proj and k_proj: which of their errors change attention's output.

GPTQ takes all outputs of a linear as equally important. Errors of queries and keys count only as
far as they change the scores, that is along the keys and queries that they meet: a few directions
of each head. With the Hessian H of a linear's inputs and G of its outputs, the error of a weight
change D is tr(G D H Dᵀ) (Kronecker-factored, as Tseng et al. 2025, YAQA). Here G is that of the
mean square error of attention's output, so no gradient goes through other layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila_deploy.model.layerwise import PackedHiddenStates

QUERY, KEY = "self_attn.q_proj", "self_attn.k_proj"
# Tokens of whole chunks that are enough for a head's few channels.
OUTPUT_TOKENS = 8192
# As for the inputs' Hessian; figures in docs/accuracy.md.
SHRINK, DAMPING = 0.3, 0.01
SEED = 0


@dataclass(frozen=True)
class OutputFactor:
    """The factor of the output Hessian of each head: G[order][:, order] = U · diag · Uᵀ.

    Args:
        order: int64 [heads, head_dim], output rows of the linear, by falling diagonal of G.
        u: unit upper triangular, in that order [heads, head_dim, head_dim].
        d: the diagonal, in that order [heads, head_dim].
    """

    order: Tensor
    u: Tensor
    d: Tensor

    @classmethod
    def of(cls, hessians: Tensor) -> OutputFactor:
        """Factor `hessians` [heads, head_dim, head_dim] after shrinking and damping a copy."""
        diagonal = hessians.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1, keepdim=True)
        # A head that changes nothing, as one pruned, gets the identity: its rows count the same.
        damping = torch.where(mean > 0, DAMPING * mean, 1.0)
        shrunk = hessians * (1 - SHRINK)
        shrunk.diagonal(dim1=1, dim2=2).copy_(diagonal + damping)
        within = diagonal.argsort(dim=1, descending=True, stable=True)
        # A Cholesky factor is lower triangular; the reversed matrix gives the upper one.
        reverse = within.flip(1)
        heads = torch.arange(len(hessians), device=hessians.device)
        reordered = shrunk[heads[:, None, None], reverse[:, :, None], reverse[:, None]]
        factor = torch.linalg.cholesky(reordered).flip(1, 2)
        root = factor.diagonal(dim1=1, dim2=2).clone()
        order = within + heads[:, None] * within.shape[1]
        return cls(order, factor / root[:, None], root.square())

    def weigh(self, weight: Tensor) -> Tensor:
        """Return what has the plain output error that `weight` [out, in] has under G, same shape.

        The rows of each head are in the factor's order: weight → diag^½ · Uᵀ · weight.
        """
        weighed = self.u.mT @ weight[self.order]
        return (weighed * self.d.sqrt()[..., None]).flatten(0, 1)


def output_factors(layer: nn.Module, states: PackedHiddenStates) -> dict[str, OutputFactor]:
    """Return the factors for q_proj and k_proj of `layer`, given the hidden states before it.

    The mean of GᵀG over tokens is estimated with one random direction of attention's output for
    each token (Hutchinson), always the same ones.
    """
    attention = layer.get_submodule("self_attn")
    generator = torch.Generator().manual_seed(SEED)
    sums: dict[str, Tensor] = {}
    tokens = 0
    for chunk in states.chunks:
        hidden = states.load(chunk)
        gradients = _output_gradients(layer, attention, states, hidden, chunk.lengths, generator)
        for name, gradient in gradients.items():
            by_head = gradient.unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
            product = by_head.mT @ by_head
            sums[name] = sums[name] + product if name in sums else product
        tokens += len(hidden)
        if tokens >= OUTPUT_TOKENS:
            break
    return {name: OutputFactor.of(total / tokens) for name, total in sums.items()}


def _output_gradients(
    layer: nn.Module,
    attention: nn.Module,
    states: PackedHiddenStates,
    hidden: Tensor,
    lengths: tuple[int, ...],
    generator: torch.Generator,
) -> Mapping[str, Tensor]:
    """Return the gradients [tokens, outputs] of a random direction of attention's output."""
    outputs: dict[str, list[Tensor]] = {QUERY: [], KEY: []}
    # The caller may be in inference mode, whose tensors can't take part in a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = layer.get_submodule("input_layernorm")(hidden.clone()).requires_grad_(True)
        hooks = [
            layer.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: outputs[name].append(output)
            )
            for name in outputs
        ]
        try:
            result = states.attention(attention, inputs, lengths)
        finally:
            for hook in hooks:
                hook.remove()
        direction = torch.randn(result.shape, generator=generator).to(result.device)
        every = [output for parts in outputs.values() for output in parts]
        gradients = iter(torch.autograd.grad(result, every, direction))
        return {
            name: torch.cat([next(gradients).flatten(0, 1) for _ in parts])
            for name, parts in outputs.items()
        }
