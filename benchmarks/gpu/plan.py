"""The stages of a run: their order, how long each should take, how long it may. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vila_deploy.utils.errors import VilaDeployError, short


@dataclass(frozen=True)
class Stage:
    """One stage, which runs in a process of its own.

    Args:
        function: "module:function" within benchmarks.gpu; it takes the Run.
        estimate_s: on an H200, with imports done.
        timeout_s: after which it is ended.
        background: it runs beside what isn't timed, and is awaited before the first that is.
        timed: its rows are times, so that nothing else may run beside it.
    """

    function: str
    estimate_s: float
    timeout_s: float
    background: bool = False
    timed: bool = True


STAGES = {
    # The first one imports torch for the first time.
    "machine": Stage("machine:measure_machine", 10, 90, timed=False),
    "prepare": Stage("prepare:prepare_baselines", 60, 110, background=True, timed=False),
    "tests": Stage("prepare:run_gpu_tests", 85, 130, background=True, timed=False),
    "compile": Stage("prepare:compile_kernels", 45, 120, timed=False),
    "checks": Stage("checks:measure_checks", 20, 60, timed=False),
    "stream": Stage("products:measure_stream", 3, 20),
    "launch_modes": Stage("steps:measure_launch_modes", 40, 80),
    "steps": Stage("steps:measure_steps", 48, 90),
    "products": Stage("products:measure_products", 36, 60),
    "marlin": Stage("products:measure_marlin", 11, 25),
    "machete": Stage("products:measure_machete", 11, 25),
    "tinychat": Stage("products:measure_tinychat", 12, 30),
    "tinygemm": Stage("products:measure_tinygemm", 9, 25),
    "prefill": Stage("prefill:measure_prefill", 12, 30),
    "lookup": Stage("prompt_lookup:measure_lookup", 4, 20),
    "humming": Stage("products:measure_humming", 75, 90),
    "memory_limit": Stage("memory_limit:measure_memory_limit", 70, 100),
    "fused": Stage("steps:measure_fused", 12, 30),
    "retry": Stage("retry:measure_again", 60, 80),
    "session": Stage("session:measure_sessions", 30, 45),
    "quantize": Stage("quantize:measure_quantize", 30, 60),
    "llamacpp": Stage("baseline_llamacpp:measure_llamacpp", 50, 60),
    "gemlite": Stage("products:measure_gemlite", 60, 60),
    "recheck": Stage("checks:measure_named_check", 20, 40, timed=False),
    "probe": Stage("machine:probe_device", 10, 30, timed=False),
    "pack": Stage("kernel_cache:pack_cache", 5, 15, timed=False),
}
# Most wanted first: what decides the default before what only compares, ours before others', what
# may hang last.
CALLS = {
    "1": (
        "machine", "prepare", "tests", "compile", "checks", "stream", "launch_modes", "steps",
        "products", "marlin", "machete", "tinychat", "tinygemm", "prefill", "humming",
        "memory_limit", "fused", "pack",
    ),
    "2": ("compile", "retry", "session", "quantize", "lookup", "llamacpp", "gemlite", "pack"),
}  # fmt: skip
LIMITS_S = {"1": 480.0, "2": 210.0}
# Begun by other stages.
PARTS = {"recheck", "probe"}
NOT_ALONE = ("retry", "recheck", "pack", "tests", "probe")
# Without a call: all but what only a second call, or another machine, has a use for.
OTHERWISE = tuple(name for name in STAGES if name not in NOT_ALONE)


@dataclass(frozen=True)
class Plan:
    """What a run goes through, and its seconds.

    Args:
        slower: estimates and timeouts of stages are those of an H200 times this.
    """

    stages: tuple[str, ...]
    limit_s: float
    slower: float = 1.0

    def stage(self, name: str) -> Stage:
        """Return a stage with the seconds that it has on this device."""
        stage = STAGES[name]
        times = {"estimate_s": stage.estimate_s, "timeout_s": stage.timeout_s}
        return replace(stage, **{key: value * self.slower for key, value in times.items()})

    @classmethod
    def of(
        cls, call: str | None, only: Sequence[str] | None, limit_s: float, slower: float = 1.0
    ) -> Plan:
        """Return the stages of a call, or those named, in their order.

        Raises:
            VilaDeployError: there is no such stage.
        """
        choices = [name for name in STAGES if name not in PARTS]
        for name in only or ():
            if name not in choices:
                fix = f"choose from {', '.join(choices)}"
                raise VilaDeployError(f"there is no stage {short(name)}", fix=fix)
        stages = CALLS[call] if call else OTHERWISE
        return cls(tuple(only) if only else stages, limit_s, slower)
