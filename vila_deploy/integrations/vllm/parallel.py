"""How a model is divided among processes, and whether it can be, before vLLM finds out late."""

from __future__ import annotations

from dataclasses import dataclass

from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.utils.errors import VilaDeployError

# Inputs are divided among ranks (row parallel), so a group of weights must lie within one rank.
DIVIDED_INPUTS = ("self_attn.o_proj", "mlp.down_proj")
# vLLM's 4-bit kernel for CPUs takes blocks of this many inputs and outputs.
CPU_BLOCK = 32
PACKED_OUTPUTS = 8


@dataclass(frozen=True)
class Parallel:
    """Tensor parallel × pipeline parallel processes on some nodes.

    Args:
        node_rank: which of the nodes this is; 0 answers requests.
        master: host and port of node 0, where the nodes meet; None on one node.
    """

    tensor: int = 1
    pipeline: int = 1
    nodes: int = 1
    node_rank: int = 0
    master: tuple[str, int] | None = None

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline

    @property
    def local_ranks(self) -> int:
        """Processes on this node."""
        return self.ranks // self.nodes

    def check(self) -> None:
        """Raise VilaDeployError for numbers that contradict each other."""
        if self.ranks % self.nodes:
            raise VilaDeployError(
                f"--nnodes {self.nodes} does not divide --tp {self.tensor} × --pp {self.pipeline} "
                "processes",
                fix="give every node as many processes",
            )
        if self.node_rank >= self.nodes:
            raise VilaDeployError(
                f"--node-rank {self.node_rank} is not one of {self.nodes} nodes",
                fix=f"give 0 to {self.nodes - 1}, a different one on each node",
            )
        if self.nodes > 1 and self.master is None:
            raise VilaDeployError(
                "several nodes need --master, where they meet",
                fix="give the address of node 0 with a free port, such as 10.0.0.1:29501",
            )


def check_divides(llm: LlmConfig, parallel: Parallel, on_cpu: bool) -> None:
    """Raise VilaDeployError where a model can't be divided among so many processes.

    Args:
        on_cpu: whether vLLM computes on a CPU, whose 4-bit kernel has a block size.
    """
    ranks = parallel.tensor
    if parallel.pipeline > llm.num_layers:
        raise _no(f"--pp {parallel.pipeline}", f"the model has {llm.num_layers} layers")
    for what, count in (("heads", llm.num_heads), ("inner channels", llm.intermediate_size)):
        if count % ranks:
            raise _no(f"--tp {ranks}", f"it does not divide the model's {count} {what}")
    # Fewer key heads than ranks are copied, if the ranks are a multiple.
    if llm.num_kv_heads % ranks and ranks % llm.num_kv_heads:
        raise _no(f"--tp {ranks}", f"it does not divide the model's {llm.num_kv_heads} key heads")
    if llm.quantization is not None:
        _check_quantized(llm, llm.quantization.group_size, ranks, on_cpu)


def _check_quantized(llm: LlmConfig, group: int, ranks: int, on_cpu: bool) -> None:
    for name, (outputs, inputs) in llm.linears.items():
        rows_divided = name in DIVIDED_INPUTS
        inputs_here = inputs // ranks if rows_divided else inputs
        outputs_here = outputs if rows_divided else max(outputs // ranks, llm.head_dim)
        if inputs_here % group:
            raise _no(
                f"--tp {ranks}",
                f"a rank has {inputs_here} inputs of {name}, no multiple of the group size {group}",
                f"use a smaller --tp, or quantize with --group-size {_largest_group(inputs_here)}",
            )
        unit = CPU_BLOCK if on_cpu else PACKED_OUTPUTS
        for size, what in ((inputs_here, "inputs"), (outputs_here, "outputs")):
            if size % unit:
                raise _no(
                    f"--tp {ranks}",
                    f"a rank has {size} {what} of {name}, no multiple of {unit}, which its 4-bit "
                    "kernel takes at a time",
                )


def _largest_group(inputs: int) -> int:
    """Return the largest usual group size that divides `inputs`."""
    return next((size for size in (128, 64, 32) if inputs % size == 0), 32)


def _no(flag: str, why: str, fix: str = "give a smaller number") -> VilaDeployError:
    return VilaDeployError(f"{flag} is not possible: {why}", fix=fix)
