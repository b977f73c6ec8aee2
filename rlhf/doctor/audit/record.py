"""The recorder of PPO's audit: copies a sample of an update onto a sheet, and changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.base.redaction import redact
from rlhf.config import PPOConfig
from rlhf.doctor.audit import sheet as sheets
from rlhf.doctor.audit.sheet import Sheet
from rlhf.models.catalogue import resolve_model
from rlhf.models.compute import Compute
from rlhf.ppo.credit import Credit
from rlhf.ppo.metrics import LossStatistics
from rlhf.ppo.recording import Recorder, Text
from rlhf.ppo.state import TRAINED, TrainedRole, TrainingState
from rlhf.ppo.types import Rollout
from rlhf.registry import Artifact

#: Most bytes of weights on a sheet; larger ones are left out, and what needs them is not examined.
MOST_BYTES = 200_000_000
#: Tensors of a role whose gradients and optimiser states are copied, and the most elements that each has.
NUM_TENSORS, MOST_ELEMENTS = 6, 1 << 18
#: Optimiser steps of an update that are copied.
NUM_STEPS = 2
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sources(config: PPOConfig, compute: Compute, policy: Artifact, rewards: Sequence[Artifact]) -> dict[str, Any]:
    """Return where the models of a run come from, as JSON: the registered artefacts, and what their manifests say of them."""
    manifest = policy.manifest
    return {
        "registry": str(Path(config.registry).absolute()),
        "policy": str(policy.path),
        "base": str(policy.path) if manifest.kind == "full" else resolve_model(manifest.base_model, config.registry),
        "revision": manifest.base_model_revision,
        "kind": manifest.kind,
        "pad": manifest.pad_token_id,
        "stops": manifest.stop_token_ids,
        "dtype": str(compute.dtype).removeprefix("torch."),
        "device": str(compute.device),
        "rewards": {
            name: {
                "path": str(reward.path),
                "kind": reward.manifest.kind,
                "mean": float(reward.manifest.reward_mean or 0.0),
                "std": float(reward.manifest.reward_std or 1.0),
                "same_tokens": (reward.manifest.tokenizer_hash, reward.manifest.chat_template_hash)
                == (manifest.tokenizer_hash, manifest.chat_template_hash),
            }
            for name, reward in zip([r for r in config.reward if r.startswith("reward/")], rewards, strict=True)
        },
    }


class SheetRecorder(Recorder):
    """Writes sheets of the first update that it sees and of every `audit_steps`-th.

    Args:
        folder: the stage's folder.
        origins: what `sources` returned.
        rows: the data row of each training prompt.
    """

    def __init__(
        self, config: PPOConfig, folder: Path, origins: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        self.config, self.folder, self.origins, self.rows = config, folder, origins, rows
        self.finished: Sheet | None = None
        """The sheet of the last update, if it has one."""
        self._sheet: Sheet | None = None
        self._state: TrainingState | None = None
        self._update = 0
        self._chosen: dict[str, nn.Parameter] = {}
        self._earlier: tuple[Tensor, Tensor] | None = None
        self._after: tuple[tuple[int, int], dict[str, int]] | None = None
        self._frozen: dict[str, int] = {}

    def take(self) -> Sheet | None:
        """Return the sheet of the update that has just ended, once."""
        sheet, self.finished = self.finished, None
        return sheet

    def rolled(self, state: TrainingState, rollout: Rollout, credit: Credit) -> None:
        update = state.updates_done
        is_first, self._state = self._state is None, state
        if is_first or update <= self._update:  # a run that resumes, starts anew or went back
            sheets.discard_after(self.folder, update)
            self._earlier = None
        self._sheet = self._begun(state, rollout, credit) if is_first or update % self.config.audit_steps == 0 else None
        self._update = update
        self._earlier = (rollout.prompt.cpu(), rollout.responses.cpu())

    def opened(self) -> None:
        if self._sheet is not None:
            gradients = [p.grad for p in self._trained() if p.grad is not None]
            self._sheet.facts["minibatches"].append({"leftover": _norm(gradients)})

    def accumulated(self, microbatches: Sequence[Tensor], losses: LossStatistics, texts: Sequence[Text]) -> None:
        if self._sheet is None:
            return
        entries, tensors = self._sheet.facts["minibatches"], self._sheet.tensors
        number, rows = len(entries) - 1, [part.tolist() for part in microbatches]
        entries[-1] |= {"rows": rows, "tokens": losses.tokens, "texts": [list(map(list, text)) for text in texts]}
        for name, parts in (("policy", losses.policy_tokens), ("value", losses.value_tokens)):
            for part, (loss, output) in enumerate(parts):
                tensors[f"loss/{number}/{name}/{part}"], tensors[f"output/{number}/{name}/{part}"] = loss, output
        if number < NUM_STEPS:
            self._copy_gradients(f"gradient/{number}")
            entries[-1]["norms"] = [self._role_norm(role) for role in TRAINED]

    def clipped(self) -> None:
        if self._sheet is None or self._state is None:
            return
        entries = self._sheet.facts["minibatches"]
        number = len(entries) - 1
        groups = self._state.optimizer.param_groups
        entries[-1]["rates"] = [float(group["lr"]) for group in groups]
        if number < NUM_STEPS:
            self._copy_gradients(f"clipped/{number}")
            self._copy_weights(f"before/{number}")

    def stepped(self) -> None:
        if self._sheet is not None and len(self._sheet.facts["minibatches"]) <= NUM_STEPS:
            self._copy_weights(f"after/{len(self._sheet.facts['minibatches']) - 1}")

    def updated(self) -> None:
        state = self._state
        if state is None:
            return
        if state.updates_done % self.config.audit_steps == 0:  # the next update has a sheet
            self._after = (state.updates_done, state.roll_backs), fingerprints(state.weights())
        if self._sheet is not None:
            self._sheet.facts |= {"kl_coef_after": state.kl_coef, "frozen_after": fingerprints(_frozen(state))}
            self.finished, self._sheet = self._sheet, None
            self._chosen = {}

    def _begun(self, state: TrainingState, rollout: Rollout, credit: Credit) -> Sheet:
        """Return a sheet with a rollout, its credit and the weights that made it."""
        sheet, config = Sheet(update=state.updates_done + 1), self.config
        for field in dataclasses.fields(rollout):
            if field.name not in ("entropy", "full_kl"):
                sheet.tensors[f"rollout/{field.name}"] = getattr(rollout, field.name)
        sheet.tensors["credit/whitened_advantages"] = credit.advantages
        if credit.returns is not None:
            sheet.tensors["credit/returns"] = credit.returns
        sheet.tensors |= {f"credit/{name}": part for name, part in credit.parts.items()}
        if self._earlier is not None:
            sheet.tensors["earlier/prompt"], sheet.tensors["earlier/responses"] = self._earlier
        weights = state.weights()
        if sum(p.numel() * p.element_size() for p in weights.values()) <= MOST_BYTES:
            sheet.tensors |= {f"weights/{name}": p.detach().cpu().clone() for name, p in weights.items()}
        frozen = fingerprints(_frozen(state))
        self._frozen = self._frozen or frozen
        is_next = self._after is not None and self._after[0] == (state.updates_done, state.roll_backs)
        before = self._after[1] if self._after is not None and is_next else None
        sheet.facts = {
            "stage": "ppo",
            "model_bytes": sum(p.numel() * p.element_size() for p in state.models.parameters()),
            "config": redact(dataclasses.asdict(config)),
            "sources": dict(self.origins),
            "rows": {str(number): dict(self.rows[number]) for number in sorted(set(rollout.prompt.tolist()))},
            "num_prompts": len(self.rows),
            "kl_coef": state.kl_coef,
            "learning_rate_scale": state.learning_rate_scale,
            "roll_backs": state.roll_backs,
            "minibatches": [],
            "frozen_first": self._frozen,
            "frozen_before": frozen,
            "changed_since": None if before is None else _differing(before, fingerprints(weights)),
        }
        self._chosen = {name: weights[name] for role in TRAINED for name in self._names(role)}
        return sheet

    def _names(self, role: TrainedRole) -> list[str]:
        """Return the names of a few tensors of a role, from its first layers to its head."""
        assert self._state is not None
        trainable = self._state.models.trainable(role)
        small = [name for name, p in trainable.items() if p.numel() <= MOST_ELEMENTS] or list(trainable)[:1]
        places = {round(i * (len(small) - 1) / (NUM_TENSORS - 1)) for i in range(NUM_TENSORS)}
        return [small[place] for place in sorted(places)]

    def _trained(self) -> list[nn.Parameter]:
        assert self._state is not None
        return [p for role in TRAINED for p in self._state.parameters(role)]

    def _role_norm(self, role: TrainedRole) -> float:
        assert self._state is not None
        return _norm([p.grad for p in self._state.parameters(role) if p.grad is not None])

    def _copy_gradients(self, place: str) -> None:
        assert self._sheet is not None
        for name, parameter in self._chosen.items():
            if parameter.grad is not None:
                self._sheet.tensors[f"{place}/{name}"] = parameter.grad.detach().cpu().clone()

    def _copy_weights(self, place: str) -> None:
        """Copy the chosen weights with their optimiser states."""
        assert self._sheet is not None and self._state is not None
        for name, parameter in self._chosen.items():
            self._sheet.tensors[f"{place}/weight/{name}"] = parameter.detach().cpu().clone()
            for key, value in self._state.optimizer.state.get(parameter, {}).items():
                tensor = torch.as_tensor(value)
                self._sheet.tensors[f"{place}/{key}/{name}"] = tensor.detach().cpu().clone()


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a number of each tensor that changes with any single bit of it."""
    sums = {}
    for name, tensor in tensors.items():
        bits = tensor.detach().contiguous().view(_WHOLE_NUMBERS[tensor.element_size()])
        sums[name] = bits.sum(dtype=torch.int64)
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}


def _differing(one: Mapping[str, int], other: Mapping[str, int]) -> list[str]:
    """Return the names under which two sets of fingerprints differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _frozen(state: TrainingState) -> dict[str, Tensor]:
    """Return the weights that must not change: the base and the other roles'."""
    trained = {id(p) for p in state.weights().values()}
    parameters = state.models.named_parameters()
    return {name: p for name, p in parameters if id(p) not in trained and not p.is_meta and p.numel()}


def _norm(gradients: Sequence[Tensor]) -> float:
    return (
        float(torch.stack([g.detach().double().square().sum() for g in gradients]).sum().sqrt()) if gradients else 0.0
    )
