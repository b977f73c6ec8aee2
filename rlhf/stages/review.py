"""The review of a stage's inputs, before it trains: statements in the run's folder, and a line for each finding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.base import distributed
from rlhf.base.errors import UserError
from rlhf.data_prep.load import Loaded
from rlhf.doctor.health.findings import actions
from rlhf.doctor.live import LiveDoctor
from rlhf.doctor.review import answer_limits, inputs
from rlhf.doctor.review.facts import Facts
from rlhf.doctor.review.limits import judge
from rlhf.doctor.review.tables import ANSWER_TABLE
from rlhf.doctor.statements import STATEMENTS, Statement, append
from rlhf.evaluation.policy import PolicyEvaluation
from rlhf.registry import IMPORTED
from rlhf.stages.run import Run


def review(
    run: Run[Any],
    base_model: str,
    sets: dict[str, Loaded],
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: int | None = None,
) -> Facts | None:
    """Review a stage's data and options, and return the facts; None with `doctor: off`.

    Args:
        rows: training rows, where they are not those of `sets`.

    Raises:
        UserError: the doctor is to stop at a finding.
    """
    if set(actions(run.config.doctor).values()) == {"off"}:
        return None
    with run.timer.phase("review"):
        facts, statements = inputs.review_inputs(
            run.stage, run.config, base_model, sets, tokenizer, _demonstrations(run), rows
        )
    _state(run, statements)
    return facts


def review_answers(run: Run[Any], facts: Facts | None, answers: PolicyEvaluation) -> None:
    """Review the SFT model's answers and their scores; `facts` are those of its inputs, None for no review."""
    if facts is None:
        return
    sampled = answers.answers
    figures = answer_limits.of_answers(answers.scores, sampled.lengths, sampled.stopped, run.config, answers.gold)
    if any(IMPORTED in parent.manifest.config for parent in run.parents if parent.stage == "reward"):
        figures.add("own_unit", 1.0)
    _state(run, judge(ANSWER_TABLE, inputs.with_figures(facts, figures)))


def _demonstrations(run: Run[Any]) -> Loaded | None:
    """Return the demonstrations that the policy of a PPO run was trained on, where they are still in place."""
    if run.stage != "ppo":
        return None
    sets = next((run.parents_data.get(parent.reference) for parent in run.parents if parent.stage == "sft"), None)
    return sets["train"] if isinstance(sets, dict) else None


def _state(run: Run[Any], statements: Sequence[Statement]) -> None:
    """Keep statements in the run's folder, and show them to the doctor; a resumed run has made them before."""
    if run.config.resume and (run.folder / STATEMENTS).is_file():
        return
    if distributed.rank() == 0:
        append(run.folder, statements)
    order = LiveDoctor(run.stage, run.config.doctor, run.tracker, {}).examine_statements(statements)
    if order is not None:
        raise UserError(order.reason)
