"""What `vila-build-engine --plan` shows: one engine's memory, and every target's."""

from __future__ import annotations

from vila_deploy.builder.fit import Fit, advise, fit_everywhere
from vila_deploy.builder.memory_plan import EnginePlan, plan_engine
from vila_deploy.builder.resolve import ResolvedBuild
from vila_deploy.utils.errors import VilaDeployError


def plan_build(build: ResolvedBuild) -> EnginePlan:
    """Return what building and running the engine will take."""
    return plan_engine(build.config, build.backend, build.precision, build.request)


def plan_targets(build: ResolvedBuild) -> list[Fit]:
    """Return on which targets that engine would fit on one GPU."""
    request = build.request
    fits = fit_everywhere(
        build.config,
        build.precision,
        request.limits,
        request.module_precision,
        build.backend_asked,
    )
    # The plan itself speaks of a target that is planned for several GPUs.
    return [fit for fit in fits if request.gpus == 1 or fit.target != build.target.name]


def check_fits(build: ResolvedBuild) -> None:
    """Raise VilaDeployError, with what would fit, for an engine too large for its target.

    What fits into this computer's own memory is known when it runs.
    """
    target = build.target
    if target.memory_bytes is None:
        return
    plan = plan_build(build)
    if not plan.fits:
        advice = advise(build.config, build.backend, build.precision, build.request)
        raise VilaDeployError(
            f"the engine would need {plan.device_bytes / 1e9:.1f} GB, {target.title} has "
            f"{plan.limit_bytes / 1e9:.1f} GB for it",
            fix=f"what would do: {advice}",
        )
