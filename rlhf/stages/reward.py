"""Stage 2: a reward model on the SFT policy. `rlhf reward --config FILE --policy sft/NAME`

An adapter and a score head on the merged SFT policy (or all of its weights) learn from rankings of K responses a prompt.
The saved model is loaded again and must score as it did in memory; it gets its zero, its unit and its report card, and is
registered as reward/NAME.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Sequence
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
from rlhf.data_prep.load import Loaded
from rlhf.doctor.audit.training_live import examine_published
from rlhf.doctor.preflight.supervised import reward as check_reward
from rlhf.doctor.probe import Probe
from rlhf.evaluation.card.evidence import PolicyEvidence, policy_evidence
from rlhf.evaluation.card.output import figures, log_card, print_card, save_card
from rlhf.evaluation.card.report_card import make_card
from rlhf.models.adapters import fast_adapters
from rlhf.models.base import context_length, load_policy
from rlhf.models.inputs import function_inputs
from rlhf.models.reward_model import load_reward_model, save_reward_model, trainable_reward_model
from rlhf.models.tokenization import load_tokenizer
from rlhf.registry import Artifact, Registry
from rlhf.reward.parity import PARITY_TEXTS, digests, require_parity, require_same_tensors
from rlhf.reward.ranking import Objective, RankingCollator, RankingTrainer
from rlhf.reward.rankings import Encoded, encode_rankings
from rlhf.reward.scorer import Scorer
from rlhf.run import checkpoint
from rlhf.stages.callbacks import Callback
from rlhf.stages.data import add_dropped, describe_data, load_splits, overlap, writable_sets
from rlhf.stages.next_steps import print_next
from rlhf.stages.normalization import NormalizingRows, normalization, normalizing_data, normalizing_rows
from rlhf.stages.review import review
from rlhf.stages.run import Run, announce, find_finished, open_run, preflight, require_one_process, stage_recipe
from rlhf.stages.trainer import audit_published, on_one_device, train, trainer_arguments

#: Beginning of the name of the folder that holds the trained model until it is registered.
SCRATCH = ".trained-"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The tokenised rankings of a run."""

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


def run(
    config: RewardConfig, *, reuse: bool = False, only_preflight: bool = False, callbacks: Sequence[Callback] = ()
) -> Artifact | None:
    """Train and register; `reuse` returns an artefact of the same recipe, `only_preflight` ends before the training."""
    registry = Registry(config.registry)
    policy = registry.get(config.policy, expect_stage="sft")
    sets, zero_data = data_sets(config), normalizing_data(config)
    data = describe_data(sets)
    recipe = stage_recipe(config, [policy], describe_data(sets | ({"normalization": zero_data} if zero_data else {})))
    inputs = function_inputs("gold", [config.gold])
    if reuse and (artifact := find_finished("reward", config, recipe, inputs)):
        return artifact
    if config.gold:
        load_function(config.gold)  # raises now and not after the training

    require_one_process("reward")
    for folder in Path(config.output_dir, "reward").glob(f"{SCRATCH}*"):  # of a run that was killed
        shutil.rmtree(folder, ignore_errors=True)
    data["overlap"] = overlap(sets, [policy], registry)
    with (
        open_run("reward", config, [policy], data, recipe, inputs, callbacks) as run,
        tempfile.TemporaryDirectory(dir=run.folder, prefix=SCRATCH) as scratch,
    ):
        base = load_policy(policy, config, run.compute)
        tokenizer = load_tokenizer(str(policy.path))
        sets = writable_sets(sets, tokenizer, run.data)
        announce(run, policy.manifest.base_model, sets, tokenizer)
        review(run, policy.manifest.base_model, sets, tokenizer)
        prepared = prepare(run, base, tokenizer, sets)
        # Training uses the policy up, so its own figures come first.
        figures_of_policy = None if only_preflight else measure_policy(run, base, prepared, zero_data)
        model = trainable_reward_model(base, config, int(prepared.tokenizer.pad_token_id))
        trainer = make_trainer(run, model, prepared)
        examine = partial(check_reward, trainer=trainer, policy=base)
        preflight(run, examine, tokenizer, sets)
        if figures_of_policy is None:
            return None
        raw_scores, tensors = train_and_save(run, model, trainer, policy, prepared, Path(scratch))
        steps = trainer.state.global_step
        del base, model, trainer, examine  # the saved model takes their place in memory
        gc.collect()
        return judge_and_publish(run, policy, prepared, figures_of_policy, Path(scratch), raw_scores, tensors, steps)


def data_sets(config: RewardConfig) -> dict[str, Loaded]:
    """Return the comparisons that the stage trains on and is judged on, by split."""
    return load_splits(config.dataset, "comparisons")


def prepare(
    run: Run[RewardConfig], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: dict[str, Loaded]
) -> Prepared:
    """Tokenise the rankings, and record in the run's data what was left out."""
    config = run.config
    limit = min(config.max_length, context_length(base))
    training = encode_rankings(
        sets["train"],
        tokenizer,
        limit,
        min_responses=config.min_responses,
        min_rating_difference=config.min_rating_difference,
    )
    validation = encode_rankings(sets["validation"], tokenizer, limit)
    for name, encoded in (("train", training), ("validation", validation)):
        add_dropped(run.data, name, encoded.dropped, "min_responses, min_rating_difference, max_length")
        complete = "rater_ratings" in encoded.rows.column_names and None not in list(encoded.rows["rater_ratings"])
        require(
            complete or not config.weight_by_agreement,
            f"weight_by_agreement needs 'rater_ratings' in every row of {config.dataset} ({name}): for each response, "
            "the numbers of its raters",
        )
    seen = {prompt_key(prompt) for prompt in sets["train"].rows["prompt"]}
    return Prepared(tokenizer=tokenizer, training=training, validation=validation, limit=limit, seen=seen)


def measure_policy(
    run: Run[RewardConfig], base: PreTrainedModel, prepared: Prepared, zero_data: Loaded | None
) -> tuple[PolicyEvidence, NormalizingRows]:
    """Return the SFT policy's evidence for the report card, and the responses that will score 0 on average.

    The latter are recorded in the run's data.
    """
    tokenizer, training, validation = prepared.tokenizer, prepared.training, prepared.validation
    with run.timer.phase("evaluate"):
        zero = normalizing_rows(run.config, base, tokenizer, training, zero_data, prepared.limit)
        evidence = policy_evidence(base, tokenizer, run.compute, run.config, training, validation)
    reason = f"prompt and response of more than {prepared.limit} tokens"
    run.data["normalization"] = {
        "kind": zero.kind,
        "responses": len(zero.rows),
        "dropped": {reason: zero.too_long} if zero.too_long else {},
        "fingerprint": zero_data.fingerprint if zero_data else None,
    }
    longer = f"; {zero.too_long} of more than {prepared.limit} tokens are left out" if zero.too_long else ""
    print(f"reward: {len(zero.rows)} {zero.kind} score 0 on average{longer}", flush=True)
    return evidence, zero


def make_trainer(run: Run[RewardConfig], model: Any, prepared: Prepared) -> RankingTrainer:
    """Return TRL's reward trainer on the tokenised rankings."""
    config = run.config
    pad_token_id, held_out = int(prepared.tokenizer.pad_token_id), prepared.validation.rows
    return RankingTrainer(
        model=model,
        args=on_one_device(TrlRewardConfig(**trainer_arguments(run), prediction_loss_only=True)),
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


def train_and_save(
    run: Run[RewardConfig], model: Any, trainer: RankingTrainer, policy: Artifact, prepared: Prepared, folder: Path
) -> tuple[Tensor, dict[str, str]]:
    """Train the model and save it; return its raw scores of `prepared.texts`, and the digests of its tensors."""
    with fast_adapters(model, run.compute):
        train(trainer, run)
    scorer = Scorer(model, prepared.tokenizer, run.compute, run.config.per_device_eval_batch_size)
    try:
        save_reward_model(model, folder, base_model=policy.manifest.base_model)
    except Exception as error:
        if storage.is_failure(error):
            raise checkpoint.not_written(folder, error) from error
        raise
    return scorer.raw(prepared.texts), digests(model)


def judge_and_publish(
    run: Run[RewardConfig],
    policy: Artifact,
    prepared: Prepared,
    figures_of_policy: tuple[PolicyEvidence, NormalizingRows],
    saved: Path,
    raw_scores: Tensor,
    tensors: dict[str, str],
    steps: int,
) -> Artifact:
    """Load the saved model, compare it with the trained one, normalise and judge it, and register its files."""
    config, (evidence, zero) = run.config, figures_of_policy
    with run.timer.phase("evaluate"):
        model = load_reward_model(saved, policy, config, run.compute, int(prepared.tokenizer.pad_token_id))
        scorer = Scorer(model, prepared.tokenizer, run.compute, config.per_device_eval_batch_size)
        require_same_tensors(tensors, model)
        difference = require_parity(raw_scores, scorer, prepared.texts)
        scorer.mean, scorer.std = normalization(config, scorer, zero.rows)
        card, rows = make_card(
            scorer,
            f"reward/{config.name}",
            prepared.training,
            prepared.validation,
            evidence,
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
        Probe.of(prepared.texts, raw_scores, run.compute.dtype).save(folder)

    artifact = run.publish(
        write,
        base_model=policy.manifest.base_model,
        base_model_revision=policy.manifest.base_model_revision,
        tokenizer=prepared.tokenizer,
        metrics={**figures(card), "steps": steps, "reload_difference": difference},
        kind="full" if config.finetuning == "full" else "adapter",
        reward_mean=scorer.mean,
        reward_std=scorer.std,
    )
    if config.audit_steps:
        trained = prepared.texts, raw_scores
        audit_published(run, examine_published(artifact, run.compute, config.quantization, trained, zero.rows))
    return artifact


def main() -> None:
    """Run the stage by its command line."""
    config = parse_config(RewardConfig)
    print_next(run(config), config)


if __name__ == "__main__":
    run_command(main)
