"""The phases of each stage as rehearsals: the run's own passes over a batch, on models without weights.

Legend: B rows, P padded prompt, R response tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from rlhf.config import PPOConfig, RewardConfig, SFTConfig, TrainingConfig
from rlhf.doctor.plan.rehearsal import Count, Rehearsal
from rlhf.doctor.plan.twin import twin
from rlhf.doctor.plan.work import Row, Work
from rlhf.models.adapters import fast_adapters, fitted, lora_config, with_adapter
from rlhf.models.anatomy import assume_usual
from rlhf.models.compute import Compute
from rlhf.models.decoding import last_logits, ordered_bytes, parts, prefill
from rlhf.models.drawing import draw_tokens
from rlhf.models.likelihood import answer_loss
from rlhf.models.reward_model import trainable_reward_model
from rlhf.models.roles import RoleModels, SharedModels
from rlhf.models.sampling import SAMPLED_AT_ONCE
from rlhf.models.separate import SeparateModels
from rlhf.models.sequences import pad, prompt_batches
from rlhf.ppo import forward
from rlhf.ppo.credit import Credit
from rlhf.ppo.gradients import accumulate
from rlhf.ppo.types import Rollout
from rlhf.reward.ranking import Objective, ordered_pairs, ranking_loss, score_rows
from rlhf.run.optim import build_optimizer, optimizer_bytes


class Stage:
    """A stage's models without weights, and the counts of its phases."""

    def __init__(
        self, config: TrainingConfig, shape: PreTrainedConfig, dtype: torch.dtype, work: Work, *, on_cpu: bool
    ) -> None:
        self.config, self.work, self.on_cpu = config, work, on_cpu
        self.compute = Compute(torch.device("cpu"), dtype)
        self.rehearsal = Rehearsal()
        self.base = twin(shape, config, dtype)
        self.counts: dict[str, Count] = {}
        self.trained: list[nn.Parameter] = []
        self.states = 0
        """Bytes of the optimiser's states."""

    def count(self, name: str, rehearse: Callable[[], Any]) -> None:
        """Count what a phase holds and calls, optimiser states included."""
        gradients = sum(p.grad.nbytes for p in self.trained if p.grad is not None)
        with self.rehearsal.phase() as count:
            rehearse()
        count.peak += self.states
        count.lasting = self.states + gradients
        self.counts[name] = count

    def place(self, model: nn.Module) -> None:
        """Put all that a stage has loaded in its place, on the device."""
        self.rehearsal.placeholders(model)
        self.count("load", lambda: None)

    def train(self, model: nn.Module, phase: str) -> None:
        """Give a model's trained weights gradients and optimiser states, as from the second update on; count an update."""
        self.trained = [p for p in model.parameters() if p.requires_grad]
        with self.rehearsal.phase():
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
        optimizer = build_optimizer([{"params": self.trained}], self.config)
        with self.rehearsal.phase():
            optimizer.step()  # makes the states

        def update() -> None:
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()

        self.count(f"{phase}: update", update)
        self.states = optimizer_bytes(self.trained, self.config)
        self.counts[
            f"{phase}: update"
        ].lasting += self.states  # which the optimiser held there; from here on, their bytes count

    def forget_gradients(self) -> None:
        """Drop the gradients, as an update does at its end."""
        for parameter in self.trained:
            parameter.grad = None

    def sample(self, name: str, model: PreTrainedModel, prompts: Sequence[Sequence[int]], length: int) -> None:
        """Count the sampling of `length` tokens: its prompts, a step at half of the length, and all that is held at the end."""
        ids, mask = pad(prompts, 0, side="left")
        cache = DynamicCache(config=model.config)
        extra = ordered_bytes(model) if self.on_cpu else 0
        self.rehearsal.ordered = extra > 0

        def step() -> None:
            columns = cast(Any, cache.layers[0]).keys.shape[2] + 1
            attention = torch.ones(len(ids), columns, dtype=torch.long)
            position = mask.sum(dim=1, keepdim=True) + columns - ids.shape[1] - 1
            draw_tokens(
                last_logits(parts(model), ids[:, -1:], attention, position, cache), torch.rand(len(ids), 1), 1.0
            )

        with torch.no_grad():
            self.count(f"{name}: prompts", lambda: prefill(model, ids, mask, cache, share=True))
            with self.rehearsal.phase():
                _widen(cache, length // 2)
            self.count(f"{name}: a token", step)
            with self.rehearsal.phase():
                _widen(cache, length - length // 2 - 2)
            self.count(f"{name}: last token", step)
        self.rehearsal.ordered = False
        for part in ("prompts", "a token", "last token"):
            self.counts[f"{name}: {part}"].peak += extra


def _widen(cache: DynamicCache, columns: int) -> None:
    """Add columns to a cache, as steps would."""
    for layer in cast(list[Any], cache.layers):
        room = layer.sliding_window - layer.keys.shape[2] if getattr(layer, "is_sliding", False) else columns
        shape = (*layer.keys.shape[:2], max(min(columns, room), 0))
        layer.keys = torch.cat([layer.keys, layer.keys.new_empty(*shape, layer.keys.shape[3])], dim=2)
        layer.values = torch.cat([layer.values, layer.values.new_empty(*shape, layer.values.shape[3])], dim=2)


def rehearse_sft(stage: Stage) -> None:
    """Count the phases of supervised fine-tuning."""
    config, work = cast(SFTConfig, stage.config), stage.work
    model = with_adapter(stage.base, fitted(stage.base, lora_config(config, "CAUSAL_LM")))
    causal = cast(PreTrainedModel, model.get_base_model())
    stage.place(model)

    def loss(rows: Sequence[Row], *, train: bool) -> None:
        ids, mask, labels = _labelled(rows)
        with torch.set_grad_enabled(train), fast_adapters(model, stage.compute):
            with stage.compute.autocast():
                total, _ = answer_loss(causal, ids, mask, labels, lambda logits, tokens: logits.amax(dim=-1))
            if train:
                (total / len(rows)).backward()

    stage.count("evaluate", lambda: loss(work.largest(config.per_device_eval_batch_size), train=False))
    _checkpointed(model, config)
    stage.train(model, "train")
    stage.count("train", lambda: loss(work.largest(config.per_device_train_batch_size), train=True))
    stage.forget_gradients()


def rehearse_reward(stage: Stage) -> None:
    """Count the phases of reward modelling: the policy's own figures, training, and the report card."""
    config, work = cast(RewardConfig, stage.config), stage.work
    whole = copy.deepcopy(stage.base) if config.finetuning == "full" else None  # its type changes
    stage.place(stage.base)
    prompts = [prompt for prompt, _ in work.largest(SAMPLED_AT_ONCE)]
    stage.sample("evaluate", stage.base, prompts, config.response_length)
    if whole is not None:
        assume_usual(whole)
        stage.base = whole
    model: Any = trainable_reward_model(stage.base, config, 0)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            assume_usual(module)
    stage.rehearsal.placeholders(model)

    def scores(groups: Sequence[Sequence[Row]], *, train: bool) -> None:
        rows = [prompt + answer for group in groups for prompt, answer in group]
        ids, mask = pad(rows, 0, side="right")
        prompt = torch.tensor([number for number, group in enumerate(groups) for _ in group])
        batches = prompt_batches(prompt, config.per_device_eval_batch_size)
        with torch.set_grad_enabled(train), fast_adapters(model, stage.compute):
            with stage.compute.autocast():
                values = score_rows(model, ids, mask.long(), batches)
                ratings = torch.arange(len(rows), dtype=torch.float64)
                loss = ranking_loss(values, ordered_pairs(ratings, prompt), len(groups), Objective())
            if train:
                loss.backward()

    stage.count(
        "evaluate: scores", lambda: scores(work.largest_groups(1, config.per_device_eval_batch_size), train=False)
    )
    _checkpointed(model, config)
    stage.train(model, "train")
    stage.count("train", lambda: scores(work.largest_groups(config.per_device_train_batch_size), train=True))
    stage.forget_gradients()


def rehearse_ppo(stage: Stage) -> None:
    """Count the phases of PPO: sampling, scoring, and the gradients of policy and value model."""
    config, work = cast(PPOConfig, stage.config), stage.work
    models = _ppo_models(stage, config)
    stage.place(models)
    stage.states = optimizer_bytes([p for p in models.parameters() if p.requires_grad], config)
    stage.count("load", lambda: None)
    prompts = [prompt for prompt, _ in work.largest(config.rollout_batch_size)]
    with stage.rehearsal.phase():
        merged = models.merged_policy() if config.merge_adapter else nullcontext(models.causal)
        model = merged.__enter__()
    stage.sample("rollout", cast(PreTrainedModel, model), prompts, config.response_length)
    with stage.rehearsal.phase():
        merged.__exit__(None, None, None)
    batch = _rollout(work.largest(config.microbatch))
    stage.count("score", lambda: _score(models, batch, config))
    models.train(config.gradient_checkpointing)
    stage.states = 0
    stage.train(models, "optimise")
    zeros = torch.zeros(batch.mask.shape)
    credit = Credit(advantages=zeros, returns=zeros, metrics={})
    rows = [torch.arange(len(batch))]
    stage.count("optimise", lambda: accumulate(models, config, batch, credit, rows, train_policy=True))
    stage.forget_gradients()


def _ppo_models(stage: Stage, config: PPOConfig) -> RoleModels:
    """Return the roles of a run whose reward, if it is registered, has an adapter like the policy's."""
    lora, shared = lora_config(config, "CAUSAL_LM", dropout=0.0), config.value_model == "shared_trunk"
    meta = Compute(torch.device("meta"), stage.compute.dtype)
    if config.gradient_checkpointing:
        stage.base.gradient_checkpointing_enable({"use_reentrant": False})
    models: RoleModels
    if config.finetuning == "full":
        models = SeparateModels(stage.base, meta, shared_trunk=shared)
        for module in models.modules():
            if isinstance(module, PreTrainedModel):
                assume_usual(module)
        if any(reward.startswith("reward/") for reward in config.reward):
            models.models["reward"] = copy.deepcopy(models.models["reference"])
    else:
        models = SharedModels(stage.base, lora, meta, shared_trunk=shared)
        if any(reward.startswith("reward/") for reward in config.reward):
            models.peft.add_adapter("reward", fitted(stage.base, copy.deepcopy(lora)))
    models.fresh_value(lora)
    for module in models.modules():
        if isinstance(module, PreTrainedModel):
            assume_usual(module)
    models.compute = stage.compute
    return models


@torch.no_grad()
def _score(models: RoleModels, batch: Rollout, config: PPOConfig) -> None:
    """Make the passes of a rollout's scoring: reward, policy, reference, values."""
    if any(reward.startswith("reward/") for reward in config.reward):
        with models.role("reward"):
            models.scores(models.hidden(batch.input_ids, batch.attention_mask)[:, -1])
    forward.compared_logprobs(models, batch, config.temperature)
    forward.token_values(models, batch)


def _rollout(rows: Sequence[Row]) -> Rollout:
    prompts, prompt_mask = pad([prompt for prompt, _ in rows], 0, side="left")
    responses, mask = pad([answer for _, answer in rows], 0, side="right")
    zeros, ends = torch.zeros(mask.shape), torch.zeros(len(rows))
    planes = dict.fromkeys(("sampler_logprobs", "logprobs", "ref_logprobs", "entropy", "full_kl", "values"), zeros)
    return Rollout(
        prompts=prompts,
        prompt_mask=prompt_mask,
        responses=responses,
        mask=mask,
        prompt=torch.arange(len(rows)),
        stopped=torch.ones(len(rows), dtype=torch.bool),
        raw_scores=ends,
        scores=ends,
        **planes,
    )


def _labelled(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    ids, mask = pad([prompt + answer for prompt, answer in rows], 0, side="right")
    labels, _ = pad([[-100] * len(prompt) + answer for prompt, answer in rows], -100, side="right")
    return ids, mask.long(), labels


def _checkpointed(model: Any, config: TrainingConfig) -> None:
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


REHEARSALS: Mapping[type[TrainingConfig], Callable[[Stage], None]] = {
    SFTConfig: rehearse_sft,
    RewardConfig: rehearse_reward,
    PPOConfig: rehearse_ppo,
}
