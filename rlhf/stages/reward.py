"""Stage 2: a reward model on the SFT policy. `python -m rlhf.stages.reward --config FILE --policy sft/NAME`

An adapter and a score head on the merged SFT policy (or all of its weights), trained on rankings of K responses a prompt.
What was saved is loaded again, has to score as it did in memory, gets its zero and unit and its report card, and is
registered as reward/NAME.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig as TrlRewardConfig

from rlhf.base import storage
from rlhf.base.errors import require, run_command
from rlhf.base.functions import load_function
from rlhf.config import RewardConfig, parse_config
from rlhf.data_prep.formats.rows import prompt_key
from rlhf.data_prep.load import Loaded, NoneOfKind, load_rows
from rlhf.doctor.preflight.supervised import reward as check_reward
from rlhf.doctor.probe import Probe
from rlhf.evaluation.card.report_card import (
    PolicyEvidence,
    figures,
    log_card,
    make_card,
    policy_evidence,
    print_card,
    save_card,
)
from rlhf.models.adapters import direct_casting
from rlhf.models.base import context_length, load_policy
from rlhf.models.responses import answerable, own_responses
from rlhf.models.reward_model import load_reward_model, save_reward_model, trainable_reward_model
from rlhf.models.tokenization import encode_prompt, encode_response, load_tokenizer
from rlhf.registry import Artifact, Registry
from rlhf.reward.parity import PARITY_TEXTS, require_parity
from rlhf.reward.ranking import Objective, RankingCollator, RankingTrainer
from rlhf.reward.rankings import Encoded, encode_rankings
from rlhf.reward.scorer import Scorer
from rlhf.run import checkpoint
from rlhf.stages.data import add_dropped, describe_data, overlap
from rlhf.stages.run import Run, finished_already, open_run, preflight, require_one_process, stage_recipe
from rlhf.stages.trainer import train, trainer_arguments

#: How the folder begins in which the trained model waits until it is registered.
SCRATCH = ".trained-"
#: Responses whose scores set the zero and the unit of the reward.
NORMALIZATION_SAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class Zero:
    """Responses whose scores become 0 on average."""

    kind: str
    """What they are, in words."""
    rows: list[list[int]]
    """Token rows, prompt and response."""
    too_long: int
    """How many were left out, because the model is trained on nothing so long."""


@dataclass(frozen=True, kw_only=True)
class Beforehand:
    """What only the SFT policy can tell, which the training uses up."""

    evidence: PolicyEvidence
    zero: Zero


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is known before the training."""

    tokenizer: PreTrainedTokenizerBase
    training: Encoded
    validation: Encoded
    limit: int
    """Longest prompt and response together, tokens."""
    seen: set[str]
    """Keys of the training comparisons' prompts."""

    @property
    def texts(self) -> list[list[int]]:
        """Held-out token rows by which the saved model is compared with the trained one."""
        rows = self.validation.rows.select(range(min(PARITY_TEXTS, len(self.validation.rows))))
        return [ids for row in rows["input_ids"] for ids in row][:PARITY_TEXTS]


def run(config: RewardConfig, *, reuse: bool = False, only_preflight: bool = False) -> Artifact | None:
    """Trains and registers; with `reuse`, an artefact of the same recipe is returned instead of trained again; with
    `only_preflight`, it ends before the training, without an artefact."""
    policy = Registry(config.registry).get(config.policy, expect_stage="sft")
    sets, given = data_sets(config), normalizing_data(config)
    data = describe_data(sets)
    recipe = stage_recipe(config, [policy], describe_data(sets | ({"normalization": given} if given else {})))
    if reuse and (artifact := finished_already("reward", config, recipe)):
        return artifact
    if config.gold:
        load_function(config.gold)  # a slip in its name must not show after the training

    require_one_process("reward")
    for left in Path(config.output_dir, "reward").glob(f"{SCRATCH}*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    data["overlap"] = overlap(sets, [policy], Registry(config.registry))
    with (
        open_run("reward", config, [policy], data, recipe) as run,
        tempfile.TemporaryDirectory(dir=run.folder, prefix=SCRATCH) as place,
    ):
        base = load_policy(policy, config, run.compute)
        prepared = prepare(run, config, base, policy, sets["train"], sets["validation"])
        before = None if only_preflight else ask_policy(run, config, base, prepared, given)
        model = trainable_reward_model(base, config, int(prepared.tokenizer.pad_token_id))
        trainer = make_trainer(run, config, model, prepared)
        examine = partial(check_reward, trainer=trainer, policy=base)
        preflight(run, examine, prepared.tokenizer, sets)
        if before is None:
            return None
        trained, steps = train_and_save(run, config, model, trainer, policy, prepared, Path(place))
        del base, model, trainer, examine  # what was saved takes their place
        gc.collect()
        return finish(run, config, policy, prepared, before, Path(place), trained, steps)


def data_sets(config: RewardConfig) -> dict[str, Loaded]:
    """What the stage trains on and is judged on, by split."""
    return {split: load_rows(config.dataset, split, kind="comparisons") for split in ("train", "validation")}


def normalizing_data(config: RewardConfig) -> Loaded | None:
    """The rows that `normalize_on` asks for: demonstrations, or the prompts that the policy answers. None where the data has
    no demonstrations at all; those that cannot be read are an error, or the zero would be another one unnoticed."""
    if config.normalize_on == "policy":
        return load_rows(config.dataset, "train", kind="prompts")
    try:
        return load_rows(config.dataset, "train", kind="demonstrations")
    except NoneOfKind:
        return None


def prepare(
    run: Run, config: RewardConfig, base: PreTrainedModel, policy: Artifact, comparisons: Loaded, held_out: Loaded
) -> Prepared:
    """Token rows."""
    tokenizer = load_tokenizer(str(policy.path))
    limit = min(config.max_length, context_length(base))
    training = encode_rankings(
        comparisons,
        tokenizer,
        limit,
        min_responses=config.min_responses,
        min_rating_difference=config.min_rating_difference,
    )
    validation = encode_rankings(held_out, tokenizer, limit)
    for name, encoded in (("train", training), ("validation", validation)):
        add_dropped(run.data, name, encoded.dropped)
        complete = "rater_ratings" in encoded.rows.column_names and None not in list(encoded.rows["rater_ratings"])
        require(
            complete or not config.weight_by_agreement,
            f"weight_by_agreement needs 'rater_ratings' in every row of {config.dataset} ({name}): for each response, "
            "the numbers of its raters",
        )
    seen = {prompt_key(prompt) for prompt in comparisons.rows["prompt"]}
    return Prepared(tokenizer=tokenizer, training=training, validation=validation, limit=limit, seen=seen)


def ask_policy(
    run: Run, config: RewardConfig, base: PreTrainedModel, prepared: Prepared, given: Loaded | None
) -> Beforehand:
    """What only the SFT policy can tell, before it is trained into a reward model; notes what the zero will be."""
    tokenizer, training, validation = prepared.tokenizer, prepared.training, prepared.validation
    with run.timer.phase("evaluate"):
        zero = normalizing_rows(config, base, prepared, given)
        evidence = policy_evidence(base, tokenizer, run.compute, config, training, validation)
    run.data["normalization"] = {
        "kind": zero.kind,
        "responses": len(zero.rows),
        "dropped": {f"prompt and response of more than {prepared.limit} tokens": zero.too_long}
        if zero.too_long
        else {},
        "fingerprint": given.fingerprint if given else None,
    }
    longer = f"; {zero.too_long} of more than {prepared.limit} tokens are left out" if zero.too_long else ""
    print(f"reward: {len(zero.rows)} {zero.kind} score 0 on average{longer}", flush=True)
    return Beforehand(evidence=evidence, zero=zero)


def train_and_save(
    run: Run,
    config: RewardConfig,
    model: Any,
    trainer: RankingTrainer,
    policy: Artifact,
    prepared: Prepared,
    folder: Path,
) -> tuple[Tensor, int]:
    """Trains the policy into a reward model and saves it; its raw scores of `prepared.texts`, and the updates made."""
    with direct_casting(model, run.compute):
        train(trainer, run)
    scorer = Scorer(model, prepared.tokenizer, run.compute, config.per_device_eval_batch_size)
    try:
        save_reward_model(model, folder, base_model=policy.manifest.base_model)
    except Exception as error:
        if storage.is_failure(error):
            raise checkpoint.not_written(folder, error) from error
        raise
    return scorer.raw(prepared.texts), trainer.state.global_step


def finish(
    run: Run,
    config: RewardConfig,
    policy: Artifact,
    prepared: Prepared,
    before: Beforehand,
    saved: Path,
    trained: Tensor,
    steps: int,
) -> Artifact:
    """Loads what was saved, compares it with what was trained, normalises and judges it, and registers those files."""
    with run.timer.phase("evaluate"):
        model = load_reward_model(saved, policy, config, run.compute, int(prepared.tokenizer.pad_token_id))
        scorer = Scorer(model, prepared.tokenizer, run.compute, config.per_device_eval_batch_size)
        difference = require_parity(trained, scorer, prepared.texts)
        scorer.mean, scorer.std = normalization(config, scorer, before.zero.rows)
        card, rows = make_card(
            scorer,
            f"reward/{config.name}",
            prepared.training,
            prepared.validation,
            before.evidence,
            config,
            prepared.limit,
            prepared.seen,
        )
    save_card(card, rows, run.folder)
    log_card(card, run.tracker, steps)
    print_card(card)

    def write(folder: Path) -> None:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        shutil.copy(run.folder / "card.json", folder)
        Probe.of(prepared.texts, trained, run.compute.dtype).save(folder)

    return run.publish(
        write,
        base_model=policy.manifest.base_model,
        base_model_revision=policy.manifest.base_model_revision,
        tokenizer=prepared.tokenizer,
        metrics={**figures(card), "steps": steps, "reload_difference": difference},
        kind="full" if config.finetuning == "full" else "adapter",
        reward_mean=scorer.mean,
        reward_std=scorer.std,
    )


def make_trainer(run: Run, config: RewardConfig, model: Any, prepared: Prepared) -> RankingTrainer:
    """TRL's reward trainer on rankings."""
    pad_token_id, held_out = int(prepared.tokenizer.pad_token_id), prepared.validation.rows
    return RankingTrainer(
        model=model,
        args=TrlRewardConfig(**trainer_arguments(run, config), prediction_loss_only=True),
        data_collator=RankingCollator(pad_token_id, weight_by_agreement=config.weight_by_agreement),
        train_dataset=prepared.training.rows,
        eval_dataset=held_out.select(range(min(len(held_out), config.max_eval_samples))),
        processing_class=prepared.tokenizer,
        objective=Objective(
            min_difference=config.min_rating_difference,
            margin_per_rating=config.margin_per_rating,
            label_smoothing=config.label_smoothing,
            center_rewards_coefficient=config.center_rewards_coefficient,
        ),
        forward_batch_size=config.per_device_eval_batch_size,
    )


def normalization(config: RewardConfig, scorer: Scorer, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Mean and spread of raw scores on these token rows."""
    scores = scorer.raw(rows)
    std = float(scores.std()) if config.normalize_std and len(scores) > 1 else 1.0
    require(std > 0, "the reward model gives every response the same score; it has learned nothing")
    return float(scores.mean()), std


def normalizing_rows(config: RewardConfig, base: PreTrainedModel, prepared: Prepared, given: Loaded | None) -> Zero:
    """The responses that `normalize_on` names, as long as the model is trained on at most: the SFT policy's own; or
    demonstrations, and where there are none, the best response of each training ranking.

    Raises:
        UserError: all are too long.
    """
    if given is None:
        kind, rows = "best responses of the comparisons (there are no demonstrations)", _best(prepared.training)
    elif config.normalize_on == "policy":
        kind, rows = "responses of the SFT policy", _answers(config, base, prepared.tokenizer, given)
    else:
        kind, rows = "demonstrations", _demonstrations(prepared.tokenizer, given)
    kept: list[list[int]] = []
    too_long = 0
    for ids in rows:
        if len(ids) > prepared.limit:
            too_long += 1
        else:
            kept.append(ids)
        if len(kept) == NORMALIZATION_SAMPLES:
            break
    require(
        bool(kept),
        f"normalize_on {config.normalize_on}: none of the {too_long} {kind} fits into max_length={prepared.limit} tokens, so "
        "nothing can score 0; raise max_length, or normalise on something else",
    )
    return Zero(kind=kind, rows=kept, too_long=too_long)


def _best(training: Encoded) -> Iterator[list[int]]:
    for row in training.rows:
        yield row["input_ids"][row["ratings"].index(max(row["ratings"]))]


def _demonstrations(tokenizer: PreTrainedTokenizerBase, given: Loaded) -> Iterator[list[int]]:
    for row in given.rows:
        prompt = row["prompt"]
        yield encode_prompt(tokenizer, prompt) + encode_response(tokenizer, prompt, row["completion"])


def _answers(
    config: RewardConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: Loaded
) -> Iterator[list[int]]:
    """As many as are needed, to each prompt in turn."""
    first = given.rows.select(range(min(len(given.rows), NORMALIZATION_SAMPLES)))["prompt"]
    prompts = answerable(first, tokenizer, context_length(base), config.response_length)
    prompts = [prompts[i % len(prompts)] for i in range(NORMALIZATION_SAMPLES)]
    answers = own_responses(base, tokenizer, prompts, response_length=config.response_length, seed=config.seed)
    return iter([prompt + response for prompt, response in answers])


def main() -> None:
    """Command line."""
    run(parse_config(RewardConfig))


if __name__ == "__main__":
    run_command(main)
