"""The health checks while a stage trains: each new row of figures is looked at, and what is found is acted on.

`doctor` names one action for all critical findings, and others for single checks:

    doctor: [stop, kl_jump=roll_back, length_rewarded=off]

warn writes a log line and sends an alert to W&B; stop saves a checkpoint and ends the run; roll_back goes back to the last
good checkpoint with half the step size or twice the kl_coef, whichever cures the check (PPO; elsewhere it is stop). A warning
only warns, unless its check is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.base import distributed
from rlhf.base.errors import UserError
from rlhf.doctor.health.check import Remedy
from rlhf.doctor.health.findings import ACTIONS, CHECKS, Finding, actions, find
from rlhf.doctor.health.history import SAMPLES_READ, History
from rlhf.run.callbacks import house_metrics
from rlhf.run.tracker import Tracker

#: Updates without a finding after which it counts as news again.
QUIET_UPDATES = 10


class DoctorStop(UserError):
    """A finding whose action is to stop."""


class RollBack(Exception):
    """The run is to return to a good checkpoint; the text says why."""

    def __init__(self, reason: str, remedy: Remedy = "learning_rate") -> None:
        super().__init__(reason)
        self.remedy = remedy


class LiveDoctor:
    """Looks at the rows of a running stage.

    Args:
        orders: the option `doctor`.
        tracker: takes the alerts, and holds what was logged before a resumed run began.
        settings: options of the run.
    """

    def __init__(self, stage: str, orders: Sequence[str], tracker: Tracker, settings: Mapping[str, Any]) -> None:
        self.actions = {check.name: action for check, action in actions(orders).items() if stage in check.stages}
        self.stage, self.tracker, self.settings = stage, tracker, settings
        self.history = History(stage, settings=settings)
        self._seen: dict[str, int] = {}

    @property
    def may_roll_back(self) -> bool:
        """Whether any check may order it, so that there has to be a checkpoint from the start."""
        return "roll_back" in self.actions.values()

    def read_log(self) -> None:
        """Starts again from what is logged: the run goes on from a checkpoint."""
        self.history = History(self.stage, self.tracker.logged(), settings=self.settings)
        self._seen = {name: step for name, step in self._seen.items() if step <= self.history.step}

    def examine(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Looks at the figures of an update. In several processes, those of the first decide for all.

        Raises:
            DoctorStop: a finding asks for it.
            RollBack: a finding asks for it.
        """
        if set(self.actions.values()) == {"off"}:
            return
        self.history.add({**metrics, "step": step})
        if len(self.history.samples) < SAMPLES_READ:
            self.history.samples = list(self.tracker.logged_samples()[:SAMPLES_READ])
        found = [finding for finding in find(self.history) if self.actions[finding.check.name] != "off"]
        for finding in found:
            self._tell(finding)
        worst = max(found, key=lambda finding: ACTIONS.index(self.actions[finding.check.name]), default=None)
        order = _from_main(CHECKS.index(worst.check) if worst is not None else -1)
        if order < 0:
            return
        check = CHECKS[order]
        reason = f"doctor, update {step}: {worst}" if worst and worst.check is check else f"doctor: {check.name}"
        action = self.actions[check.name]
        if action == "roll_back" and self.stage == "ppo":
            raise RollBack(reason, check.remedy)
        if action in ("stop", "roll_back"):
            raise DoctorStop(f"{reason}. Stopped; --resume true --doctor warn goes on")

    def _tell(self, finding: Finding) -> None:
        """A line and an alert, once while it lasts."""
        name, step = finding.check.name, self.history.step
        news = step - self._seen.get(name, -QUIET_UPDATES - 1) > QUIET_UPDATES
        self._seen[name] = step
        if news and distributed.rank() == 0:
            print(f"doctor, update {step}: {finding}", flush=True)
            self.tracker.alert(f"{self.stage}: {name} at update {step}", str(finding), finding.check.severity)


class DoctorCallback(TrainerCallback):
    """The doctor of a Hugging Face trainer. What it stops is saved; the caller raises `stopped` after the training."""

    def __init__(self, doctor: LiveDoctor) -> None:
        self.doctor = doctor
        self.stopped: DoctorStop | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called by the trainer with a mapping of names to numbers."""
        metrics = house_metrics(logs or {}, self.doctor.stage)
        if not metrics or self.stopped is not None:
            return
        try:
            self.doctor.examine(state.global_step, metrics)
        except DoctorStop as stop:
            self.stopped = stop
            control.should_save = control.should_training_stop = True


def _from_main(number: int) -> int:
    return int(distributed.from_main(torch.tensor(number)))
