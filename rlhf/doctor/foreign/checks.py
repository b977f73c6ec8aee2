"""Which health checks a foreign log has the data for, and why the others cannot run."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from rlhf.doctor.foreign.figure import Figure
from rlhf.doctor.foreign.reading import COUNTED, ForeignRun
from rlhf.doctor.health.check import HealthCheck
from rlhf.doctor.health.findings import CHECKS, Finding, replay
from rlhf.doctor.health.ppo_computation import wrong_reference
from rlhf.doctor.health.ppo_reward import NO_SPREAD, reward_constant

#: What checks need besides the figures that they name in `needs`: files, or figures of which one is enough.
_SAMPLES = "sampled texts are not in such a log"
_BESIDES = {
    "template_twice": _SAMPLES,
    "same_as_sft": _SAMPLES,
    "answers_empty": _SAMPLES,
    "answers_alike": _SAMPLES,
    "reward_scale": "its limits are for reward models that were trained here",
}
#: Figures that checks need beside those in `needs`, with the number of values.
_ALSO = {"loss_flat": {"STAGE/eval_loss": 2}, "gradient_zero": {"ppo/grad_norm": 2}}


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Findings of the checks that could run on a log, and the others with the reason."""

    run: ForeignRun
    findings: list[Finding]
    ran: list[HealthCheck]
    left_out: dict[str, str]
    """Checks of the stage that did not run, each with the reason."""


def examine(run: ForeignRun) -> Examination:
    """Run the health checks that a log has the data for."""
    stage = run.kind.stage
    reasons = {check.name: _reason(run, check) for check in CHECKS if stage in check.stages}
    if run.kind.project != "rlhf" and max(run.history.values("objective/score_std"), default=0) >= NO_SPREAD:
        reasons[reward_constant.name] = "the spread of the scores is above 0 in some rollouts"
    ran = [_limited(run, check) for check in CHECKS if reasons.get(check.name) == ""]
    left_out = {name: reason for name, reason in reasons.items() if reason}
    return Examination(run=run, findings=replay(run.history, ran), ran=ran, left_out=left_out)


def _sources(run: ForeignRun, ours: str) -> list[Figure]:
    """Return the figures of the log that one of ours was made of."""
    return [figure for figure in run.kind.figures if ours in figure.ours and run.names & set(figure.theirs)]


def _limited(run: ForeignRun, check: HealthCheck) -> HealthCheck:
    """Return a check with the limits that the log's figures need."""
    limits: dict[str, float] = {}
    for ours in check.needs:
        for figure in _sources(run, ours):
            limits |= figure.limits.get(check.name, {})
    return dataclasses.replace(check, look=functools.partial(check.look, **limits)) if limits else check


def _reason(run: ForeignRun, check: HealthCheck) -> str:
    """Return why a check cannot run on a log; empty if it can."""
    if check.name in run.kind.apart:
        return run.kind.apart[check.name]
    if check.name in _BESIDES:
        return _BESIDES[check.name]
    if check.name == wrong_reference.name and COUNTED in run.log.notes:
        return "which line is of the first update is not in the log"
    needs = dict.fromkeys(check.needs, check.rows) | _ALSO.get(check.name, {})
    for name, rows in needs.items():
        ours = name.replace("STAGE/", f"{run.kind.stage}/")
        count = run.history.count(ours)
        sources = _sources(run, ours)
        if count == 0:
            return _lacking(run, ours)
        for figure in sources:
            if check.name in figure.unfit:
                return f"the log has {_name(run, figure)}, which is {figure.meaning}"
        if count < rows:
            return f"{count} values of {', '.join(_name(run, figure) for figure in sources)}, {rows} are needed"
    if check.name == "loss_rising" and not any(
        run.history.count(f"{run.kind.stage}/{name}") for name in ("loss", "eval_loss")
    ):
        return "the log has no loss"
    if check.name == "controller_saturated" and not run.history.setting("kl_target"):
        return "the run's KL target is not known"
    return ""


def _lacking(run: ForeignRun, ours: str) -> str:
    near = [figure for figure in run.kind.figures if ours in figure.near and run.names & set(figure.theirs)]
    if near:
        return f"the log has {_name(run, near[0])}, which is {near[0].meaning}"
    here = [figure for figure in _sources(run, ours) if figure.zero_counts]
    if here:
        return f"the log has {_name(run, here[0])}, rounded to zero"
    made_of = [f"`{figure.theirs[0]}`" for figure in run.kind.figures if ours in figure.ours]
    return f"the log has no {' or '.join(made_of)}" if made_of else f"no figure of {run.kind.project} is {ours}"


def _name(run: ForeignRun, figure: Figure) -> str:
    return next(f"`{name}`" for name in figure.theirs if name in run.names)


def learning_rates(run: ForeignRun) -> str:
    """Return the course of the step size that the log shows, as a text; empty if it has none."""
    values = [value for value in run.history.values(f"{run.kind.stage}/lr") if math.isfinite(value)]
    if not values:
        return ""
    if max(values) == min(values):
        return f"{values[0]:.3g} throughout"
    return f"{values[0]:.3g} at first, {max(values):.3g} at most, {values[-1]:.3g} at last"
