"""The audit beside a running PPO stage: what it records, when it recomputes, and where its statements go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.base import distributed
from rlhf.config import PPOConfig
from rlhf.doctor import statements
from rlhf.doctor.audit.ppo import examine
from rlhf.doctor.audit.record import SheetRecorder, sources
from rlhf.doctor.statements import Statement
from rlhf.models.compute import Compute
from rlhf.ppo.recording import Recorder
from rlhf.registry import Artifact
from rlhf.run.memory import free_bytes
from rlhf.run.timing import PhaseTimer

#: Free memory, as a multiple of the run's models, with which they are opened a second time.
ROOM = 2.0


class PPOAudit:
    """The recorder of a run, and the examination of what it wrote; nothing with `audit_steps` 0 or in several processes."""

    def __init__(
        self,
        config: PPOConfig,
        folder: Path,
        compute: Compute,
        policy: Artifact,
        rewards: Sequence[Artifact],
        rows: Sequence[Mapping[str, Any]],
        timer: PhaseTimer,
    ) -> None:
        self.folder, self.timer, self.device = folder, timer, compute.device
        self._sheets: SheetRecorder | None = None
        if config.audit_steps and distributed.size() == 1:
            self._sheets = SheetRecorder(config, folder, sources(config, compute, policy, rewards), rows)

    @property
    def recorder(self) -> Recorder:
        """The recorder for the trainer."""
        return self._sheets or Recorder()

    def statements(self) -> list[Statement]:
        """Write and examine the sheet of the update that has just ended, if it has one; return and keep the statements."""
        sheet = self._sheets.take() if self._sheets else None
        if sheet is None:
            return []
        with self.timer.phase("audit"):
            sheet.keep(self.folder)
            results = examine(sheet, with_models=free_bytes(self.device) > ROOM * sheet.facts["model_bytes"])
            statements.append(self.folder, results)
        return results
