"""Preflight of PPO: a small rollout of the run's own trainer, its gradients, and checks of reward, reference and sampler.

Legend: B responses, R padded response, N real response tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from rlhf.base import distributed
from rlhf.config import PPOConfig
from rlhf.doctor.preflight.check import Check
from rlhf.doctor.preflight.context import PreflightContext, check_data, check_policy, pick_short_rows
from rlhf.doctor.preflight.models import (
    check_gradients,
    check_merged,
    check_optimizer,
    check_probe,
    check_reload,
    check_trainable,
    layers_without_adapter,
    merging_limit,
    noise_in_zeros,
    parameters_matching,
    preserve_state,
)
from rlhf.doctor.preflight.room import ActivationMeter, check_disk, check_memory
from rlhf.doctor.preflight.supervised import batch_independence_check
from rlhf.doctor.preflight.text import check_rollout
from rlhf.doctor.probe import read_probe
from rlhf.models.adapters import read_adapter
from rlhf.models.anatomy import anatomy, backbone, head_parameters
from rlhf.models.roles import RoleModels, SharedModels
from rlhf.models.separate import SeparateModels
from rlhf.models.sequences import Sequences, pad
from rlhf.ppo import draws, forward
from rlhf.ppo.gradients import accumulate
from rlhf.ppo.rollout import Environment, response_texts
from rlhf.ppo.trainer import RATIO_TOLERANCE, PPOTrainer
from rlhf.ppo.types import Rollout
from rlhf.reward.parity import PADDINGS, REORDERED, deviation
from rlhf.reward.sources import AdapterReward, ModelReward, ModelSource, Responses, Reward, Source
from rlhf.run import memory
from rlhf.run.optim import build_optimizer, smallest_8bit
from rlhf.run.timing import PhaseTimer

#: Responses that are sampled, and tokens of the longest.
ROWS, LENGTH = 8, 16
#: Responses that are scored in other batches, and computed again after saving.
SCORED = 4
#: Largest log-ratio of policy and reference before the first update, nats a token: they are one model.
STEP_0 = 1e-3
#: Standard deviations by which the mean surprise of sampled tokens may be off: one run in a million is by chance.
SURPRISE = 5.0
_LORA = r"\.lora_\w+\.(policy|value)(\.|$)|^value_head\."
_FULL = r"^models\.(policy|value)\.|^value_head\."


def ppo(context: PreflightContext, trainer: PPOTrainer) -> list[Check]:
    """Return every check of a PPO run; `trainer` is its trainer before the first update, and before it resumes."""
    models = trainer.models
    full = cast(PPOConfig, context.config).finetuning == "full"
    intended = parameters_matching(models, _FULL if full else _LORA, without=anatomy(models.causal).cut_off)
    with preserve_state(models, context.compute.device):
        with models.role("reference"):
            policy_checks = check_policy(context, models.causal)
        small = rehearsal(trainer)
        with noise_in_zeros(intended):
            rollout, ratio, gradients, activations = rehearse(small, intended)
            merged, sampler = _check_sampler(context, models, rollout, small.config.temperature)
            reloads = _check_reload(context, models, intended, rollout, small.config.temperature)
        checks = [
            *check_data(context, models.causal, by="prompt"),
            *policy_checks,
            *_check_rewards(context, trainer),
            check_rollout(rollout, context.pad_token_id, small.sampling.stop_token_ids),
            *_check_batches(context, small, trainer.environment.reward.sources, rollout),
            *reloads,
            merged,
            _check_reference(models, rollout, small.config.temperature),
            ratio,
            sampler,
            _check_trainable(trainer, intended),
            gradients,
            check_optimizer(
                intended.values(),
                lambda parameters: build_optimizer([{"params": parameters}], trainer.config),
                smallest=smallest_8bit(intended.values()) if trainer.config.optim == "adamw_8bit" else None,
            ),
        ]
    return checks + _check_room(context, trainer, intended, activations)


def rehearsal(trainer: PPOTrainer) -> PPOTrainer:
    """Return a copy of the trainer with a few short prompts, short responses, and made-up scores, no two equal."""
    small, c, environment = copy.copy(trainer), trainer.config, trainer.environment
    numbers = pick_short_rows([len(prompt) for prompt in environment.prompts], ROWS)
    small.environment = Environment(
        prompts=[environment.prompts[i] for i in numbers],
        rows=[environment.rows[i] for i in numbers],
        reward=Reward({"made up": lambda responses: torch.linspace(-1.0, 1.0, len(responses.texts))}),
        gold=environment.gold,
    )
    small.config = dataclasses.replace(
        c,
        total_episodes=ROWS,
        rollout_batch_size=ROWS,
        minibatch_size=ROWS,
        microbatch_size=ROWS // 2,
        microbatch_tokens=None,
        num_responses_per_prompt=1,
        num_ppo_epochs=1,
        ptx_coef=0.0,
        ptx_text=None,
        ptx_dataset=None,
    )
    small.sampling = dataclasses.replace(
        trainer.sampling,
        max_new_tokens=min(c.response_length, LENGTH),
        # Compiling for another size would take longer than all the rest.
        sampler="loop" if c.sampler == "compiled" else c.sampler,
    )
    small.outputs = dataclasses.replace(trainer.outputs, timer=PhaseTimer())
    return small


def rehearse(small: PPOTrainer, intended: Mapping[str, nn.Parameter]) -> tuple[Rollout, Check, Check, float]:
    """Make one rollout and its gradients, without an update.

    Returns: the rollout, the checks of its first ratios and of its gradients, and the bytes of activations a token.
    """
    c, models = small.config, small.models
    rollout, _ = small.collect()
    credit = small.estimator(rollout, kl_coef=small.state.kl_coef)
    (microbatches,) = draws.minibatches(c, rollout.lengths, small.state.updates_done, epoch=0)
    meter = ActivationMeter(models)
    models.train(c.gradient_checkpointing)
    with meter.counted():
        losses = accumulate(models, c, rollout, credit, microbatches, train_policy=True)
    models.eval()
    if distributed.size() > 1:
        for parameter in intended.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        distributed.add_up(cast(Tensor, p.grad) for p in intended.values())
    unused = _without_gradient(small)
    gradients = check_gradients(models, {name: p for name, p in intended.items() if id(p) not in unused})
    for parameter in models.parameters():
        parameter.grad = None
    error, limit = distributed.largest(losses.ratio_error), RATIO_TOLERANCE[models.compute.dtype]
    ratio = Check(
        name="first ratio is 1",
        passed=error <= limit,
        measured=f"off by {error:.2g} at most (limit {limit:g})",
        cause="old log-probabilities come from another forward pass: stale weights, dropout, another temperature or padding",
        fix="compute them with rlhf.ppo.forward in the microbatches that are trained, dropout off",
    )
    largest = max(int(rollout.lengths[part].sum()) for part in microbatches)
    return rollout, ratio, gradients, distributed.largest(meter.peak / largest)


def _without_gradient(trainer: PPOTrainer) -> set[int]:
    """Return the ids of parameters that are held but have no part in a loss.

    Those are the language-model head of a whole value model, unless it is the embedding, and all of a value model that the
    advantage estimator does not need.
    """
    models = trainer.models
    if not trainer.estimator.needs_values:
        return {id(p) for p in models.trainable("value").values()}
    if isinstance(models, SharedModels) or models.shared_trunk:
        return set()
    with models.role("value"):
        return {id(p) for p in head_parameters(models.causal)} - {id(p) for p in backbone(models.causal).parameters()}


@torch.no_grad()
def _check_sampler(
    context: PreflightContext, models: RoleModels, rollout: Rollout, temperature: float
) -> tuple[Check, Check]:
    """Check that merging changes nothing, and that the sampler draws from the whole distribution that is scored.

    -log p of a token drawn from p has the entropy of p for its mean, and a variance that follows from p. Tokens cut to
    the likeliest, or drawn at a lower temperature, surprise less.
    """
    mask, tokens = rollout.mask, rollout.responses[rollout.mask][:, None]
    with models.merged_policy():
        merged = _distributions(models, rollout, temperature).gather(1, tokens).squeeze(1)
    policy, reference = rollout.logprobs[mask], rollout.ref_logprobs[mask]
    gap = float((rollout.sampler_logprobs[mask] - merged).abs().mean())
    limit = merging_limit(policy, reference, context.compute)
    with models.role("policy"):
        logprobs = _distributions(models, rollout, temperature)
    surprise = -logprobs.gather(1, tokens).squeeze(1)
    weighted = logprobs.exp() * -logprobs.nan_to_num(neginf=0.0)
    entropy = weighted.sum(dim=1)
    variance = (weighted * -logprobs.nan_to_num(neginf=0.0)).sum(dim=1) - entropy.square()
    off = float((surprise - entropy).sum() / variance.sum().clamp_min(1e-12).sqrt())
    sampled = Check(
        name="the sampler's distribution is the scored one",
        passed=abs(off) <= SURPRISE and gap <= limit,
        measured=f"{len(surprise)} tokens surprise by {float(surprise.mean()):.3g} nats, entropy {float(entropy.mean()):.3g}, "
        f"{off:+.1f} standard deviations off (limit {SURPRISE:g}); the sampler's own are {gap:.2g} nats off (limit {limit:.2g})",
        cause="top-k, top-p, a penalty or another temperature in the sampler: what is trained on is not what is scored",
        fix="sample through rlhf.models.sampling with the run's temperature; no generation config is read",
    )
    return check_merged(policy, merged, reference, context.compute, "log-probabilities, nats,"), sampled


def _distributions(models: RoleModels, rollout: Rollout, temperature: float) -> Tensor:
    """Return log-probabilities (N, V) of all tokens, at each of the N response tokens, in the current role."""
    first = rollout.prompts.shape[1] - 1
    states = models.hidden(rollout.input_ids, rollout.attention_mask)[:, first:-1][rollout.mask]
    return torch.log_softmax(models.logits(states).double() / temperature, dim=-1)


@torch.no_grad()
def _check_reference(models: RoleModels, rollout: Rollout, temperature: float) -> Check:
    """Check that the fresh policy is the reference."""
    policy, reference, _, full_kl = forward.compared_logprobs(models, rollout, temperature)
    difference = float((policy - reference)[rollout.mask].abs().nan_to_num(nan=torch.inf).max())
    kl = float(full_kl.sum() / len(rollout))
    return Check(
        name="policy is the reference at step 0",
        passed=difference <= STEP_0,
        measured=f"log-probabilities differ by {difference:.2g} nats at most (limit {STEP_0:g}), KL {kl:.2g} nats a response",
        cause="the reference is not the model that the policy starts from, or the fresh adapter is not zero",
        fix="give --policy the SFT artefact that the policy starts from, and let rlhf.models make the reference",
    )


def _check_trainable(trainer: PPOTrainer, intended: Mapping[str, nn.Parameter]) -> Check:
    models, c = trainer.models, trainer.config
    problems: list[str] = []
    if isinstance(models, SharedModels):
        problems += layers_without_adapter(models.peft, c.lora_target_modules, [models.causal.get_output_embeddings()])
    optimised = {id(p) for group in trainer.state.optimizer.param_groups for p in group["params"]}
    trainable = {id(p) for p in intended.values()}
    if optimised != trainable:
        lacks, others = len(trainable - optimised), len(optimised - trainable)
        problems.append(f"the optimiser lacks {lacks} tensors and holds {others} others")
    return check_trainable(models, intended, problems)


@torch.no_grad()
def _check_batches(
    context: PreflightContext, small: PPOTrainer, sources: Mapping[str, Source], rollout: Rollout
) -> list[Check]:
    """Check that scores do not depend on other rows or padding; only sources that are models are called."""
    numbers = torch.arange(SCORED, device=rollout.mask.device)
    batch = rollout.select(numbers)
    rows = [small.environment.rows[i] for i in batch.prompt.tolist()]
    texts = response_texts(small.tokenizer, batch)

    def scores(source: Source, sequences: Sequences, part: slice = slice(None)) -> Tensor:
        batches = [torch.arange(len(sequences), device=sequences.mask.device)]
        return source(Responses(sequences=sequences, batches=batches, texts=texts[part], rows=rows[part])).float()

    checks: list[Check] = []
    for source in sources.values():
        if not isinstance(source, ModelSource):
            continue
        together = scores(source, batch)
        alone = [scores(source, batch.select(numbers[i : i + 1]), slice(i, i + 1)) for i in range(SCORED)]
        scale = max(float(together.square().mean().sqrt()), 1.0)  # normalised scores are of size 1
        deviations = {"alone": deviation(torch.cat(alone), together, scale)}
        for left, right in PADDINGS:
            wide = scores(source, _padded(batch, left, right, context.pad_token_id))
            deviations[f"with {left} padding tokens before and {right} after"] = deviation(wide, together, scale)
        worst = max(deviations, key=lambda name: deviations[name])
        checks.append(batch_independence_check(deviations[worst], worst, REORDERED[context.compute.dtype]))
    return checks


def _padded(sequences: Sequences, left: int, right: int, pad_token_id: int) -> Sequences:
    """Return sequences with `left` more padding tokens before the prompts and `right` more after the responses."""
    widen = torch.nn.functional.pad
    return Sequences(
        prompts=widen(sequences.prompts, (left, 0), value=pad_token_id),
        prompt_mask=widen(sequences.prompt_mask, (left, 0)),
        responses=widen(sequences.responses, (0, right), value=pad_token_id),
        mask=widen(sequences.mask, (0, right)),
    )


@torch.no_grad()
def _check_rewards(context: PreflightContext, trainer: PPOTrainer) -> list[Check]:
    """Check that the reward model scores its probe as it did when it was trained, if it has one."""
    checks: list[Check] = []
    for artifact in context.parents:
        probe = read_probe(artifact) if artifact.manifest.stage == "reward" else None
        source = trainer.environment.reward.sources.get(artifact.name)
        if probe is None or context.quantized or not isinstance(source, (AdapterReward, ModelReward)):
            continue
        mean, std = float(artifact.manifest.reward_mean or 0.0), float(artifact.manifest.reward_std or 1.0)
        raw = source(_responses(context, trainer, probe.rows)) * std + mean
        merged = isinstance(trainer.models, SeparateModels) and artifact.manifest.kind == "adapter"
        checks.append(check_probe(artifact.reference, raw, probe.values, probe.dtype, context.compute, merged=merged))
    return checks


def _responses(context: PreflightContext, trainer: PPOTrainer, rows: Sequence[Sequence[int]]) -> Responses:
    """Return token rows as responses of one token, the last, where the score is read."""
    prompts, prompt_mask = pad([row[:-1] for row in rows], context.pad_token_id, side="left")
    last = torch.tensor([[row[-1]] for row in rows])
    sequences = Sequences(
        prompts=prompts, prompt_mask=prompt_mask, responses=last, mask=torch.ones_like(last, dtype=torch.bool)
    ).to(trainer.models.compute.device)
    batches = [torch.arange(len(rows), device=sequences.mask.device)]
    return Responses(sequences=sequences, batches=batches, texts=[""] * len(rows), rows=[{}] * len(rows))


@torch.no_grad()
def _check_reload(
    context: PreflightContext,
    models: RoleModels,
    intended: Mapping[str, nn.Parameter],
    rollout: Rollout,
    temperature: float,
) -> list[Check]:
    """Check that the policy's adapter survives saving and loading; whole models are not copied."""
    if not isinstance(models, SharedModels):
        return []
    batch = rollout.select(torch.arange(SCORED, device=rollout.mask.device))

    def save(folder: Path) -> None:
        models.save_policy(folder, base_model="preflight")

    def load(folder: Path) -> None:
        read_adapter(models.peft, folder, adapter="policy")

    policy = {name: p for name, p in intended.items() if id(p) in {id(q) for q in models.trainable("policy").values()}}
    logprobs = partial(forward.token_logprobs, models, "policy", batch, temperature)
    return [check_reload(policy, save, load, logprobs, context.folder)]


def _check_room(
    context: PreflightContext, trainer: PPOTrainer, intended: Mapping[str, nn.Parameter], activations: float
) -> list[Check]:
    c, parameters = trainer.config, list(intended.values())
    longest = sorted(map(len, trainer.environment.prompts))[-c.microbatch :]
    tokens = sum(longest) + c.microbatch * c.response_length
    tokens = min(tokens, c.microbatch_tokens or tokens)
    rollout = c.rollout_batch_size // distributed.size() * (longest[-1] + c.response_length)
    return [
        check_disk(parameters, c, context.folder, context.registry),
        check_memory(
            parameters,
            c,
            context.compute.device,
            activations=activations,
            tokens=tokens,
            cache=memory.cache_bytes(trainer.models.causal, rollout),
        ),
    ]
