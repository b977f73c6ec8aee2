"""The doctor of a running stage: each new row of metrics and each statement is examined, and findings are acted on.

The option `doctor` names one action for all critical findings, and others for single checks and statements:

    doctor: [stop, kl_jump=roll_back, length_rewarded=off, gamma=off]

warn writes a log line and sends an alert to W&B; stop saves a checkpoint and ends the run; roll_back goes back to the last
good checkpoint with half the step size or twice the kl_coef, whichever cures the check (PPO; elsewhere it is stop). A warning
only warns, unless its check is named. No step back mends a computation or an input, so a failed statement stops instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.base import distributed
from rlhf.base.errors import UserError
from rlhf.base.reading import FolderReader
from rlhf.doctor import statements as records
from rlhf.doctor.finding import Finding, of_statement
from rlhf.doctor.health.findings import ACTIONS, CHECKS, actions, find, reaction
from rlhf.doctor.health.history import SAMPLES_READ, History
from rlhf.doctor.statements import Statement
from rlhf.ppo.state import Order
from rlhf.run.callbacks import house_metrics
from rlhf.run.tracker import Tracker

#: Updates without a finding after which it is reported again.
QUIET_UPDATES = 10


class LiveDoctor:
    """Examines the metrics of a running stage.

    Args:
        words: the option `doctor`.
        tracker: takes the alerts, and holds the log of a resumed run.
        settings: options of the run.
    """

    def __init__(self, stage: str, words: Sequence[str], tracker: Tracker, settings: Mapping[str, Any]) -> None:
        reactions = actions(words)
        self.actions = {check.name: reactions[check.name] for check in CHECKS if stage in check.stages}
        self.words = words
        self.stage, self.tracker, self.settings = stage, tracker, settings
        self.history = History(stage, settings=settings)
        self._reported: dict[str, int] = {}
        self._passed = records.passed(records.read(FolderReader(tracker.run_dir)))

    @property
    def may_roll_back(self) -> bool:
        """Some check may order a roll-back, so there has to be a checkpoint from the start."""
        return "roll_back" in self.actions.values()

    def read_log(self, *, before: float = float("inf")) -> None:
        """Start again from the logged metrics of the updates before `before`: the run goes on from a checkpoint."""
        rows = [row for row in self.tracker.logged() if row["step"] < before]
        self.history = History(self.stage, rows, settings=self.settings)
        self._reported = {name: step for name, step in self._reported.items() if step <= self.history.step}

    def observe(self, step: int, metrics: Mapping[str, Any]) -> Order | None:
        """Examine an update of a stage that may go back, once for each update."""
        if step <= self.history.step:
            self.read_log(before=step)
        return self.examine(step, metrics)

    def examine(self, step: int, metrics: Mapping[str, Any]) -> Order | None:
        """Examine metrics of an update; return the order of the worst finding, if its action is more than to warn.

        In several processes, the metrics of the first decide for all.
        """
        if set(self.actions.values()) == {"off"}:
            return None
        self.history.add({**metrics, "step": step})
        if len(self.history.samples) < SAMPLES_READ:
            self.history.samples = list(self.tracker.logged_samples()[:SAMPLES_READ])
        findings = [
            finding for finding in find(self.history, passed=self._passed) if self.actions[finding.name] != "off"
        ]
        for finding in findings:
            self._report(finding)
        worst = max(findings, key=lambda finding: ACTIONS.index(self.actions[finding.name]), default=None)
        numbers = {check.name: number for number, check in enumerate(CHECKS)}
        number = int(distributed.from_main(torch.tensor(numbers[worst.name] if worst else -1)))
        if number < 0 or self.actions[CHECKS[number].name] == "warn":
            return None
        check = CHECKS[number]
        reason = f"doctor, update {step}: {worst if worst and worst.name == check.name else check.name}"
        if self.stage == "ppo" and self.actions[check.name] == "roll_back":
            return Order(action="roll_back", reason=reason, remedy=check.remedy)
        return Order(action="stop", reason=f"{reason}. Stopped; --resume true --doctor warn goes on")

    def examine_statements(self, statements: Sequence[Statement]) -> Order | None:
        """Report failed statements of the audit or the review; return an order to stop where one's action says so.

        One that another explains has no line of its own. In several processes, the statements of the first decide for all.
        """
        self._passed = self._passed - {f"{s.part}:{s.name}" for s in statements} | records.passed(statements)
        reactions = [(of_statement(s), reaction(self.words, s)) for s in statements if s.is_finding]
        explained = {name for finding, action in reactions if action != "off" for name in finding.explains}
        for finding, action in reactions:
            if action != "off" and finding.name not in explained:
                self._report(finding)
        stops = [finding for finding, action in reactions if action in ("stop", "roll_back")]
        if not int(distributed.from_main(torch.tensor(int(bool(stops))))):
            return None
        reason = f"doctor, {moment(stops[0].last)}: {stops[0]}" if stops else "doctor"
        trained = bool(self.history.step or any(s.step for s in statements))
        end = "Stopped; --resume true" if trained else "Stopped before the training;"
        return Order(action="stop", reason=f"{reason}. {end} --doctor warn goes on")

    def _report(self, finding: Finding) -> None:
        """Print a line and send an alert, once while the finding lasts."""
        name, step = finding.name, finding.last
        is_news = step - self._reported.get(name, -QUIET_UPDATES - 1) > QUIET_UPDATES
        self._reported[name] = step
        if is_news and distributed.rank() == 0:
            print(f"doctor, {moment(step)}: {finding}", flush=True)
            self.tracker.alert(f"{self.stage}: {name} at {moment(step)}", str(finding), finding.severity)


def moment(step: int) -> str:
    """Return an update as text; 0 is the start."""
    return f"update {step}" if step else "the start"


class ObserverCallback(TrainerCallback):
    """The observer of a Hugging Face trainer; the caller raises `error`, if there is one, after the training."""

    def __init__(self, stage: str, observe: Callable[[int, Mapping[str, float]], Order | None]) -> None:
        self.stage, self.observe = stage, observe
        self.error: UserError | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the logged metrics to the observer; on an order, have the trainer save and end."""
        metrics = house_metrics(logs or {}, self.stage)
        order = self.observe(state.global_step, metrics) if metrics and self.error is None else None
        if order is not None:
            self.error = UserError(order.reason)
            control.should_save = control.should_training_stop = True
