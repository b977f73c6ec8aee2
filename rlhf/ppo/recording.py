"""The recorder of an update, which is shown its steps: the doctor's audit writes a sample of them down.

A recorder changes nothing, and draws no random numbers: a run ends in the same bytes with it and without.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf.ppo.credit import Credit
from rlhf.ppo.metrics import LossStatistics
from rlhf.ppo.state import TrainingState
from rlhf.ppo.types import Rollout

Text = tuple[list[int], list[int]]
"""Token ids of a prompt and its answer."""


class Recorder:
    """Is shown the steps of an update in their order; this one looks at nothing."""

    def rolled(self, state: TrainingState, rollout: Rollout, credit: Credit) -> None:
        """Look at a rollout with its credit, before anything is trained on it."""

    def opened(self) -> None:
        """Look at what the weights hold when a minibatch begins."""

    def accumulated(self, microbatches: Sequence[Tensor], losses: LossStatistics, texts: Sequence[Text]) -> None:
        """Look at a minibatch's rows and losses, the texts mixed in, and its gradients before they are clipped."""

    def clipped(self) -> None:
        """Look at the gradients and step sizes that the optimiser is about to use."""

    def stepped(self) -> None:
        """Look at what an optimiser step has changed."""

    def updated(self) -> None:
        """Look at the state that an update leaves behind."""
