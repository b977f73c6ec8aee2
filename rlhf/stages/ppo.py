"""Stage 3: PPO against the reward model. `rlhf ppo --config FILE --policy sft/NAME --reward reward/NAME`

One frozen base (the SFT policy) with policy, reward and value adapters; the reference is the base with adapters off.
Registers the policy adapter as ppo/NAME.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base import distributed
from rlhf.base.errors import UserError, require, run_command
from rlhf.base.functions import GoldFunction
from rlhf.config import PPOConfig, is_registered_reward, parse_config
from rlhf.data_prep.corpus import Blocks, load_text
from rlhf.data_prep.load import Loaded, load_rows
from rlhf.doctor.audit.live import PPOAudit
from rlhf.doctor.live import LiveDoctor
from rlhf.doctor.plan.microbatch import with_microbatch
from rlhf.doctor.preflight.ppo import ppo as check_ppo
from rlhf.doctor.review.facts import Facts
from rlhf.evaluation.policy import PolicyEvaluation
from rlhf.models.adapters import lora_config
from rlhf.models.base import context_length, load_policy
from rlhf.models.compute import Compute
from rlhf.models.graphs import has_room, records
from rlhf.models.inputs import function_inputs
from rlhf.models.roles import RoleModels, SharedModels
from rlhf.models.sampling import fits_loop
from rlhf.models.separate import SeparateModels
from rlhf.models.tokenization import encode_prompt, load_tokenizer
from rlhf.ppo.metrics import sample_rows
from rlhf.ppo.rollout import Environment
from rlhf.ppo.state import Order, Outputs
from rlhf.ppo.trainer import PPOTrainer
from rlhf.registry import IMPORTED, Artifact, Registry
from rlhf.reward.functions import load_gold
from rlhf.reward.scorer import open_scorer
from rlhf.reward.sources import AdapterReward, ModelReward, Reward, kind_of, open_sources, same_tokens, source_inputs
from rlhf.run.memory import check_rollout_fits
from rlhf.run.tracker import RUN_FILE
from rlhf.stages.callbacks import Callback, Update, call_back
from rlhf.stages.data import add_dropped, describe_data, encode_demonstrations, load_splits, overlap, writable_sets
from rlhf.stages.held_out import HeldOut, before_and_after
from rlhf.stages.next_steps import print_next
from rlhf.stages.review import review, review_answers
from rlhf.stages.run import Run, announce, find_finished, open_run, preflight, stage_recipe


def run(
    config: PPOConfig, *, reuse: bool = False, only_preflight: bool = False, callbacks: Sequence[Callback] = ()
) -> Artifact | None:
    """Train and register; `reuse` returns an artefact of the same recipe, `only_preflight` ends before the training."""
    registry = Registry(config.registry)
    policy = registry.get(config.policy, expect_stage="sft")
    rewards = [registry.get(r, expect_stage="reward") for r in config.reward if is_registered_reward(r)]
    for reward in rewards:
        check_same_policy(policy, reward)
    sets = data_sets(config)
    data = describe_data(sets)
    recipe = stage_recipe(config, [policy, *rewards], data)
    inputs = source_inputs(config) | function_inputs("gold", [config.gold])
    if reuse and (artifact := find_finished("ppo", config, recipe, inputs)):
        return artifact

    data["overlap"] = overlap(sets, [policy, *rewards], registry)
    gold = load_gold(config.gold) if config.gold else None  # raises now and not after the training
    tokenizer = load_tokenizer(str(policy.path))
    config = with_microbatch(
        config, policy.manifest.base_model, sets, tokenizer, Path(config.output_dir) / "ppo" / RUN_FILE
    )
    with open_run("ppo", config, [policy, *rewards], data, recipe, inputs, callbacks) as run:
        sets = writable_sets(sets, tokenizer, run.data)
        announce(run, policy.manifest.base_model, sets, tokenizer)
        facts = review(run, policy.manifest.base_model, sets, tokenizer)
        trainer, evaluation, doctor = make_trainer(run, policy, rewards, sets, tokenizer, gold)
        preflight(run, partial(check_ppo, trainer=trainer), tokenizer, sets)
        return None if only_preflight else _train(trainer, evaluation, doctor, policy, facts)


def make_trainer(
    run: Run[PPOConfig],
    policy: Artifact,
    rewards: list[Artifact],
    sets: dict[str, Loaded],
    tokenizer: PreTrainedTokenizerBase,
    gold: GoldFunction | None,
) -> tuple[PPOTrainer, HeldOut, LiveDoctor]:
    """Return the trainer of a run, with what looks at its updates: the evaluation of held-out prompts and the doctor."""
    config, prompts, held_out = run.config, sets["train"], sets["validation"]
    train_ids = encode_prompts(prompts, tokenizer, config.max_prompt_length)
    held_out_ids = encode_prompts(held_out, tokenizer, config.max_prompt_length)
    models, reward_sum = build_models(config, run.compute, policy, rewards)
    context = check_lengths(config, models, train_ids, held_out_ids)
    texts: Sequence[tuple[list[int], list[int]]] = ()
    if "ptx" in sets:
        texts, too_long = encode_texts(sets["ptx"], tokenizer, config, context, run.folder)
        add_dropped(run.data, "ptx", too_long, "max_prompt_length, response_length")
    own_unit = any(IMPORTED in reward.manifest.config for reward in rewards)
    doctor = LiveDoctor("ppo", config.doctor, run.tracker, {**dataclasses.asdict(config), "own_unit": own_unit})
    evaluation = HeldOut(
        run=run,
        models=models,
        tokenizer=tokenizer,
        data=held_out,
        prompts=held_out_ids,
        reward=reward_sum,
        gold=gold,
    )

    audit = PPOAudit(config, run.folder, run.compute, policy, rewards, prompts.rows, run.timer)

    def observe(update: int, metrics: Mapping[str, float]) -> Order | None:
        """Evaluate the policy where that is due, and have the doctor and the callbacks look at the update."""
        evaluation.watch(update)
        order = doctor.observe(update, metrics)
        order = doctor.examine_statements(audit.statements()) or order
        return _called_back(run, trainer, update, metrics) or order

    trainer = PPOTrainer(
        models,
        tokenizer,
        config,
        Environment(prompts=train_ids, rows=prompts.rows, reward=reward_sum, gold=gold),
        Outputs(tracker=run.tracker, folder=run.folder / "checkpoints", timer=run.timer),
        texts=texts,
        observe=observe,
        recorder=audit.recorder,
    )
    return trainer, evaluation, doctor


def _train(
    trainer: PPOTrainer, evaluation: HeldOut, doctor: LiveDoctor, policy: Artifact, facts: Facts | None
) -> Artifact:
    """Train the policy, between an evaluation of the SFT model and one of its own, and register it."""
    run, config = evaluation.run, evaluation.run.config
    if config.resume:
        trainer.state.resume()
        doctor.read_log()
    sft_answers = evaluation.evaluate(reference=True)
    review_answers(run, facts, sft_answers)
    if not run.tracker.logged():
        evaluation.log(0, sft_answers)
    if (doctor.may_roll_back or run.callbacks) and trainer.state.updates_done == 0:
        trainer.state.save()  # a state to go back to
    trainer.train()
    run.tracker.log_frontier()
    publish = partial(_publish, trainer, evaluation, policy, sft_answers)
    if config.ema_decay is not None:
        with trainer.state.averaged_policy():
            publish(f"{config.name}-ema")
    return publish(config.name)


def _publish(
    trainer: PPOTrainer, evaluation: HeldOut, policy: Artifact, sft_answers: PolicyEvaluation, name: str
) -> Artifact:
    """Evaluate and register the policy with its current weights, under this name."""
    run = evaluation.run
    answers = evaluation.evaluate(reference=False)
    if name == run.config.name:
        evaluation.log_comparison(sft_answers, answers)
    base_model = policy.manifest.base_model
    return run.publish(
        lambda folder: evaluation.models.save_policy(folder, base_model=base_model),
        base_model=base_model,
        base_model_revision=policy.manifest.base_model_revision,
        tokenizer=evaluation.tokenizer,
        metrics=_figures(run, trainer, sft_answers, answers),
        name=name,
        kind="full" if run.config.finetuning == "full" else "adapter",
    )


def _called_back(run: Run[PPOConfig], trainer: PPOTrainer, update: int, metrics: Mapping[str, float]) -> Order | None:
    """Call the callbacks of a run after an update; return an order, if there is one."""
    rollout = trainer.rollout
    if not run.callbacks or rollout is None:
        return None
    samples = sample_rows(rollout, trainer.tokenizer, len(rollout))
    seen = Update(stage="ppo", step=update, metrics=dict(metrics), rollout=rollout, samples=samples)
    return call_back(run.callbacks, seen)


def data_sets(config: PPOConfig) -> dict[str, Loaded]:
    """Return everything that the stage reads: prompts (`train`, `validation`) and the texts of PPO-ptx (`ptx`), if any."""
    sets = load_splits(config.dataset, "prompts")
    if config.ptx_coef > 0 and config.ptx_text:
        sets["ptx"] = load_text(config.ptx_text, config)["train"]
    elif config.ptx_coef > 0:
        sets["ptx"] = load_rows(config.ptx_dataset or config.dataset, "train", kind="demonstrations")
    return sets


def build_models(
    config: PPOConfig, compute: Compute, policy: Artifact, rewards: list[Artifact]
) -> tuple[RoleModels, Reward]:
    """Return the models of the run, which start from the SFT policy, and the reward that scores responses."""
    sources = open_sources(config, compute)
    lora = lora_config(config, "CAUSAL_LM", dropout=0.0)
    base = load_policy(policy, config, Compute(torch.device("cpu"), compute.dtype) if config.offload_base else compute)
    check_sampler(config, base)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    shared = config.value_model == "shared_trunk"
    models: RoleModels
    if config.finetuning == "full":
        models = SeparateModels(base, compute, shared_trunk=shared)
    else:
        models = SharedModels(base, lora, compute, shared_trunk=shared, offload=config.offload_base)
    alike = not rewards or same_tokens(rewards[0].manifest, policy.manifest)
    if rewards and rewards[0].manifest.kind == "full" and (config.finetuning == "lora" or not alike):
        # It has a backbone of its own, so there is no adapter from which values could start.
        scorer = open_scorer(rewards[0], Registry(config.registry), config, compute, config.microbatch)
        sources[rewards[0].name] = ModelReward(scorer, reads_texts=not alike)
        models.fresh_value(lora)
    elif rewards:
        manifest = rewards[0].manifest
        models.load_reward(rewards[0].path, float(manifest.reward_mean or 0.0), float(manifest.reward_std or 1.0))
        sources[rewards[0].name] = AdapterReward(models)
    else:
        models.fresh_value(lora)
    names = [kind_of(reference).label(reference) for reference in config.reward]
    require(len(set(names)) == len(names), f"two rewards have one name: {', '.join(names)}")
    return models, Reward({name: sources[name] for name in names}, config.reward_weights)


def check_sampler(config: PPOConfig, base: PreTrainedModel) -> None:
    """Raise `UserError` for a sampler that does not fit the model, or the place of its weights."""
    require(
        config.sampler in ("auto", "generate") or fits_loop(base, compiled=config.sampler == "compiled"),
        f"sampler {config.sampler} does not fit {type(base).__name__}, which keeps more than keys and values of its tokens in "
        "their places, or changes its logits after the output embedding; use sampler auto",
    )
    require(
        not (config.sampler == "compiled" and config.offload_base),
        "sampler compiled needs all weights in their places, and offload_base brings a layer's in while it computes; use "
        "sampler auto, or leave out offload_base",
    )


def check_same_policy(policy: Artifact, reward: Artifact) -> None:
    """Raise `UserError` for a reward model on another policy than PPO's: its adapter would sit on other weights."""
    parent = next(p for p in reward.manifest.parents if p.stage == "sft")
    if parent.hash != policy.hash:
        raise UserError(
            f"{reward.reference} was trained on {parent.stage}/{parent.name}@{parent.version}, not on {policy.reference}; "
            f"use --policy {parent.stage}/{parent.name}@{parent.version}, or train a reward model on {policy.reference}: "
            f"rlhf reward --policy {policy.reference}"
        )


def encode_prompts(data: Loaded, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Return token ids of prompts.

    Raises:
        UserError: a prompt is too long; a cut prompt would ask something else.
    """
    encoded = [encode_prompt(tokenizer, row["prompt"]) for row in data.rows]
    for number, ids in enumerate(encoded):
        if len(ids) > max_length:
            raise UserError(
                f"prompt {number + 1} has {len(ids)} tokens, more than max_prompt_length={max_length}; "
                "raise it or drop the prompt"
            )
    return encoded


def check_lengths(config: PPOConfig, models: RoleModels, train: list[list[int]], held_out: list[list[int]]) -> int:
    """Return the model's context in tokens.

    Raises:
        UserError: a prompt leaves no room in it for a whole response, or a rollout does not fit into memory.
    """
    context, longest = context_length(models.causal), max(map(len, [*train, *held_out]))
    require(
        longest + config.response_length <= context,
        f"a prompt of {longest} tokens with response_length={config.response_length} does not fit into the model's context "
        f"of {context} tokens; lower response_length or drop such prompts",
    )
    responses, prompt = config.rollout_batch_size // distributed.size(), max(map(len, train))
    device = models.compute.device
    check_rollout_fits(
        models,
        models.causal,
        device,
        responses=responses,
        prompt=prompt,
        response=config.response_length,
        merged=config.merge_adapter and config.quantization == "none" and not (config.offload_base or config.use_dora),
        recorded=records(device) and has_room(models.causal, responses, prompt + config.response_length),
    )
    return context


def encode_texts(
    data: Loaded, tokenizer: PreTrainedTokenizerBase, config: PPOConfig, context: int, folder: Path
) -> tuple[Sequence[tuple[list[int], list[int]]], dict[str, list[int]]]:
    """Return token ids (prompt, answer) of PPO-ptx texts, and those left out: reason -> line or row numbers.

    Demonstrations longer than the longest episode are left out. Plain text is packed into blocks as long as it; the answer
    is all of a block but its first token.

    Args:
        folder: holds the tokens of plain text while the process lives.
    """
    longest = min(config.max_prompt_length + config.response_length, context)
    if config.ptx_text:
        return _BlocksAsPairs(Blocks.of(data.rows["text"], tokenizer, longest - 1, folder)), {}
    pairs, dropped = encode_demonstrations(data, tokenizer, longest)
    require(bool(pairs), f"no text of ptx_dataset fits into an episode of at most {longest} tokens")
    return pairs, dropped


class _BlocksAsPairs(Sequence[tuple[list[int], list[int]]]):
    """Blocks of text as pairs: the first token, and the others."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: Any) -> Any:
        block = self.blocks[i]
        return block[:1], block[1:]


def _figures(run: Run[PPOConfig], trainer: PPOTrainer, sft: PolicyEvaluation, ppo: PolicyEvaluation) -> dict[str, Any]:
    """Return the manifest's figures: length and pace of the run, KL, and held-out figures before and after."""
    seconds, updates = {p["phase"]: p["seconds"] for p in run.timer.summary()}, trainer.state.updates_done
    training = sum(seconds.get(phase, 0.0) for phase in ("rollout", "score", "optimise"))
    return {
        "episodes": updates * run.config.rollout_batch_size,
        "updates": updates,
        "seconds_per_update": round(training / max(updates, 1), 2),
        **before_and_after(sft, ppo),
    }


def main() -> None:
    """Run the stage by its command line."""
    config = parse_config(PPOConfig)
    print_next(run(config), config)


if __name__ == "__main__":
    run_command(main)
