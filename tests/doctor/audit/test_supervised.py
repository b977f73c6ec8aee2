"""The audit of SFT and reward modelling: each fault is located at its quantity, and sound runs of all kinds accuse nothing."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from rlhf.base.reading import FolderReader
from rlhf.config import RewardConfig, SFTConfig, build
from rlhf.doctor.audit import training, training_live, training_models
from rlhf.doctor.audit.sheet import Sheet, list_sheets, read_sheet
from rlhf.doctor.audit.training import Examination, examine
from rlhf.doctor.audit.training_live import examine_published
from rlhf.doctor.statements import Statement, read
from rlhf.models.compute import Compute
from rlhf.registry import Registry
from rlhf.reward import ranking
from rlhf.stages import reward as reward_stage
from rlhf.stages import sft as sft_stage
from rlhf.stages import trainer as stage_trainer
from rlhf.stages.data import describe_data
from rlhf.stages.run import open_run

Patch = Callable[[pytest.MonkeyPatch], None]
COMMON = {
    "trackers": ["none"], "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "eval_steps": 6, "save_steps": 6, "max_steps": 6,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "audit_steps": 2, "device": "cpu", "dtype": "float32",
    "preflight": False, "name": "toy", "max_eval_samples": 2, "warmup_steps": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def all_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy runs are too short for a share of their time."""
    monkeypatch.setattr(training_live, "SHARE", 1e9)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, toy_base: Callable[[str], Path], toy_data: Path) -> Path:
    """A registry with a policy; its audits agree."""
    folder = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_live, "SHARE", 1e9)
        results = run_sft(folder, toy_base("llama"), toy_data)
    assert wrong(results) == []
    return folder / "registry"


def run_sft(folder: Path, base: Path, data: Path, **options: Any) -> list[Statement]:
    """Run the stage; return the statements of its audits."""
    places = {"registry": str(folder / "registry"), "output_dir": str(folder / "out"), "dataset": str(data)}
    model = {"model_name_or_path": str(base), "chat_template": "chatml"}
    sft_stage.run(build(SFTConfig, {**COMMON, **places, **model, **options}, "test"))
    return audited(folder / "out" / "sft")


def run_reward(folder: Path, registry: Path, data: Path, **options: Any) -> list[Statement]:
    """Train a reward model as the stage does, without its card; return the statements of its audits."""
    places = {"registry": str(registry), "output_dir": str(folder / "out"), "dataset": str(data), "policy": "sft/toy"}
    config = build(RewardConfig, {**COMMON, "max_steps": 3, **places, **options}, "test")
    policy, sets = Registry(registry).get("sft/toy"), reward_stage.data_sets(config)
    with open_run("reward", config, [policy], describe_data(sets), "recipe", {}) as run:
        base = reward_stage.load_policy(policy, config, run.compute)
        prepared = reward_stage.prepare(run, base, reward_stage.load_tokenizer(str(policy.path)), sets)
        model = reward_stage.trainable_reward_model(base, config, int(prepared.tokenizer.pad_token_id))
        with reward_stage.fast_adapters(model, run.compute):
            stage_trainer.train(reward_stage.make_trainer(run, model, prepared), run)
    return audited(folder / "out" / "reward")


def audited(folder: Path) -> list[Statement]:
    """Statements that the audits of a stage's run left in its folder."""
    return [one for one in read(FolderReader(folder)) if one.part == "audit"]


def wrong(results: list[Statement]) -> list[str]:
    """Names of what was found wrong, causes only."""
    return [one.name for one in results if not one.passed and one.severity != "note"]


def examined(results: list[Statement]) -> set[str]:
    """Names of what was recomputed at least once."""
    return {one.name for one in results if not one.measured.startswith("not examined")}


EVERY = {
    "rows_drawn", "tokens", "padding", "dropout", "frozen_weights", "loss", "gradients_zeroed", "gradient",
    "gradient_clipping", "learning_rate", "optimizer_step",
}  # fmt: skip
SOUND: dict[str, tuple[dict[str, Any], set[str]]] = {
    "bf16": ({"dtype": "bfloat16"}, set()),
    "4 bits": ({"quantization": "4bit"}, set()),
    "8 bits": ({"quantization": "8bit"}, set()),
    "adamw_torch, decay": ({"optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 0.05}, set()),
    "peft's adapters": ({"fuse_adapters": False, "gradient_checkpointing": True, "use_rslora": True}, set()),
    "DoRA, eager": ({"use_dora": True, "attn_implementation": "eager", "gradient_accumulation_steps": 1}, set()),
    "dropout": ({"lora_dropout": 0.1, "lr_scheduler_type": "linear", "max_steps": -1}, {"loss", "gradient"}),
    "wide": ({"lora_r": 64, "lr_scheduler_type": "cosine", "max_steps": -1, "num_train_epochs": 2}, set()),
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_policy_accuses_nothing(
    kind: str, tmp_path: Path, toy_base: Callable[[str], Path], toy_data: Path
) -> None:
    """Catches: limits that are too narrow for a type, and quantities that are passed over where they can be recomputed."""
    options, unknown = SOUND[kind]
    results = run_sft(tmp_path, toy_base("llama"), toy_data, **options)
    assert [one for one in results if not one.passed] == []
    assert examined(results) == (EVERY | {"labels"}) - unknown


RANKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"dtype": "bfloat16"},
    "4 bits": {"quantization": "4bit"},
    "full": {"finetuning": "full", "learning_rate": 1e-3},
    "objective": {
        "margin_per_rating": 0.1, "label_smoothing": 0.1, "center_rewards_coefficient": 0.01, "min_rating_difference": 1.5,
        "per_device_eval_batch_size": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", RANKED)
def test_a_sound_reward_model_accuses_nothing(kind: str, tmp_path: Path, registry: Path, toy_data: Path) -> None:
    """Catches: limits that are too narrow, ties and margins that are counted otherwise."""
    results = run_reward(tmp_path, registry, toy_data, **RANKED[kind])
    assert [one for one in results if not one.passed] == []
    unknown = {"frozen_weights"} if kind == "full" else set()
    assert examined(results) == (EVERY | {"ratings", "scores"}) - unknown


# Faults


def relabelled(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Patch:
    """A fault of SFT's token rows."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        tokenize = sft_stage.tokenize

        def spoilt(*args: Any, **kwargs: Any) -> Any:
            rows, dropped = tokenize(*args, **kwargs)
            return Dataset.from_list([change(dict(row)) for row in rows]), dropped

        monkeypatch.setattr(sft_stage, "tokenize", spoilt)

    return patch


def lossy(change: Callable[..., Any]) -> Patch:
    """A fault of SFT's loss, which is called with the right function and its arguments."""
    return lambda monkeypatch: monkeypatch.setattr(sft_stage, "answer_loss", partial(change, sft_stage.answer_loss))


def argued(**others: Any) -> Patch:
    """Other arguments of the trainer than the options."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = stage_trainer.trainer_arguments
        for stage in (sft_stage, reward_stage):
            monkeypatch.setattr(stage, "trainer_arguments", lambda run: {**arguments(run), **others})

    return patch


def wrapped(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """A function in place of another, called with that one first."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(right, *args, **kwargs))

    return patch


def unshifted(right: Any, model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, count: Any) -> Any:
    moved = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, :-1]], dim=1)
    return right(model, ids, mask, moved, count)


def twice_shifted(
    right: Any, model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, count: Any
) -> Any:
    moved = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    return right(model, ids, mask, moved, count)


def by_row(right: Any, model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, count: Any) -> Any:
    parts = [right(model, *(x[i : i + 1] for x in (ids, mask, labels)), count) for i in range(len(ids))]
    tokens = sum(size for _, size in parts)
    return torch.stack([total / size for total, size in parts]).mean() * tokens, tokens


def backwards(right: Any, *args: Any) -> Any:
    total, tokens = right(*args)
    return 2 * total.detach() - total, tokens


def own_divisor(right: Any, trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    return right(trainer, model, inputs)


def padded_labels(right: Any, collator: Any, examples: Any) -> Any:
    batch = right(collator, examples)
    batch["labels"][batch["attention_mask"] == 0] = 0
    return batch


def mixed_up(right: Any, *args: Any, **kwargs: Any) -> Any:
    pairs, dropped = right(*args, **kwargs)
    answers = [answer for _, answer in pairs]
    return [(prompt, answer) for (prompt, _), answer in zip(pairs, [*answers[1:], answers[0]], strict=True)], dropped


def cut(right: Any, *args: Any, **kwargs: Any) -> Any:
    pairs, dropped = right(*args, **kwargs)
    return [(prompt[4:], answer) for prompt, answer in pairs], dropped


def moved_base(right: Any, trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).add_(1e-3)
    return right(trainer, model, *args, **kwargs)


def lost(right: Any, trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    def drop(parameter: Any) -> None:
        parameter.grad = None

    for parameter in [p for p in model.parameters() if p.requires_grad][::2]:
        if not parameter._post_accumulate_grad_hooks:
            parameter.register_post_accumulate_grad_hook(drop)
    return right(trainer, model, *args, **kwargs)


def frozen_order(sampler: Any) -> Iterator[int]:
    return iter([*range(8), *range(8), *range(16, len(sampler.lengths))])


def same_epochs(sampler: Any) -> Iterator[int]:
    return iter(range(len(sampler.lengths)))


def no_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "zero_grad", lambda self, set_to_none=True: None)


def prompt_too(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": row["input_ids"]}


def no_stop(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": [*row["labels"][:-1], -100]}


def begins_twice(row: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": row["input_ids"][:3] + row["input_ids"], "labels": [-100] * 3 + row["labels"]}


SFT_FAULTS: dict[str, tuple[str, Patch]] = {
    "labels not shifted": ("loss", lossy(unshifted)),
    "labels shifted twice": ("loss", lossy(twice_shifted)),
    "prompt in the loss": ("labels", relabelled(prompt_too)),
    "stop token masked out": ("labels", relabelled(no_stop)),
    "padding in the loss": (
        "labels",
        lambda m: wrapped(
            __import__("trl.trainer.sft_trainer", fromlist=["x"]).DataCollatorForLanguageModeling,
            "torch_call",
            padded_labels,
        )(m),
    ),
    "loss averaged by row": ("loss", lossy(by_row)),
    "gradient backwards": ("gradient", lossy(backwards)),
    "accumulation not divided": ("loss", wrapped(sft_stage.AnswerTrainer, "compute_loss", own_divisor)),
    "gradients that do not arrive": ("gradient", wrapped(sft_stage.AnswerTrainer, "compute_loss", lost)),
    "gradients stay": ("gradients_zeroed", no_zeros),
    "answers of other rows": ("tokens", wrapped(sft_stage, "encode_demonstrations", mixed_up)),
    "prompt cut": ("tokens", wrapped(sft_stage, "encode_demonstrations", cut)),
    "header twice": ("tokens", relabelled(begins_twice)),
    "another schedule": ("learning_rate", argued(lr_scheduler_type="constant_with_warmup", lr_scheduler_kwargs={})),
    "schedule that ends early": ("learning_rate", argued(warmup_steps=3)),
    "no clipping": ("gradient_clipping", argued(max_grad_norm=1e9)),
    "other betas": ("optimizer_step", argued(adam_beta1=0.5)),
    "decay": ("optimizer_step", argued(weight_decay=0.5)),
    "base that moves": ("frozen_weights", wrapped(sft_stage.AnswerTrainer, "compute_loss", moved_base)),
    "frozen sampler": (
        "rows_drawn",
        lambda m: m.setattr(stage_trainer.SortedStepSampler, "__iter__", frozen_order),
    ),
    "equal epochs": ("rows_drawn", lambda m: m.setattr(stage_trainer.SortedStepSampler, "__iter__", same_epochs)),
    "other dropout": (
        "dropout",
        wrapped(sft_stage, "lora_config", lambda right, *args, **kwargs: right(*args, **{**kwargs, "dropout": 0.3})),
    ),
}


@pytest.mark.parametrize("fault", SFT_FAULTS)
def test_faults_of_sft_are_located(
    fault: str,
    tmp_path: Path,
    toy_base: Callable[[str], Path],
    toy_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: a fault that is not seen, or put down to a quantity that is only its consequence."""
    name, patch = SFT_FAULTS[fault]
    patch(monkeypatch)
    batch = (
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1} if fault == "loss averaged by row" else {}
    )
    results = run_sft(tmp_path, toy_base("llama"), toy_data, max_grad_norm=0.05, **batch)
    assert wrong(results)[:1] == [name] and set(wrong(results)) == {name}


def by_swapped_pairs(right: Any, *args: Any, **kwargs: Any) -> Any:
    pairs = right(*args, **kwargs)
    return dataclasses.replace(pairs, better=pairs.worse, worse=pairs.better)


def earlier_token(right: Any, model: Any, ids: torch.Tensor, mask: torch.Tensor, batches: Any) -> Any:
    last = mask.sum(dim=1) - 1
    mask = mask.clone()
    mask[torch.arange(len(mask)), last] = False
    return right(model, ids, mask, batches)


def flipped(right: Any, *args: Any, **kwargs: Any) -> Any:
    encoded = right(*args, **kwargs)
    rows = [{**row, "ratings": [-rating for rating in row["ratings"]]} for row in encoded.rows]
    return dataclasses.replace(encoded, rows=Dataset.from_list(rows))


def rolled_ratings(right: Any, collator: Any, rows: Any) -> Any:
    batch = right(collator, rows)
    return {**batch, "ratings": batch["ratings"].roll(1)}


def without_adapter(right: Any, policy: Any, config: Any, compute: Any) -> Any:
    from rlhf.models.base import load_base

    return load_base(policy.manifest.base_model, config, compute).requires_grad_(False)


REWARD_FAULTS: dict[str, tuple[str, Patch]] = {
    "score before the last token": ("scores", wrapped(ranking, "score_rows", earlier_token)),
    "pairs swapped": ("loss", wrapped(ranking, "ordered_pairs", by_swapped_pairs)),
    "sign of the loss": ("loss", wrapped(ranking, "ranking_loss", lambda right, *args: -right(*args))),
    "not averaged over prompts": (
        "loss",
        wrapped(ranking, "ranking_loss", lambda right, s, p, n, o: right(s, p, 1, o)),
    ),
    "ratings of other responses": ("ratings", wrapped(ranking.RankingCollator, "__call__", rolled_ratings)),
    "ratings with the wrong sign": ("ratings", wrapped(reward_stage, "encode_rankings", flipped)),
    "base without its adapter": ("frozen_weights", wrapped(reward_stage, "load_policy", without_adapter)),
    "another schedule": ("learning_rate", argued(lr_scheduler_type="constant_with_warmup", lr_scheduler_kwargs={})),
}


@pytest.mark.parametrize("fault", REWARD_FAULTS)
def test_faults_of_reward_models_are_located(
    fault: str, tmp_path: Path, registry: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a fault that is not seen, or put down to a quantity that is only its consequence."""
    name, patch = REWARD_FAULTS[fault]
    patch(monkeypatch)
    results = run_reward(tmp_path, registry, toy_data)
    assert wrong(results)[:1] == [name] and set(wrong(results)) == {name}
    if fault == "pairs swapped":
        assert any("the other way round" in one.cause for one in results)


# The run


def test_an_audit_changes_no_byte(tmp_path: Path, toy_base: Callable[[str], Path], toy_data: Path) -> None:
    """Catches: random numbers that the audit draws, or weights and modes that it leaves otherwise; dropout needs the former."""
    weights = []
    for steps in (0, 2):
        folder = tmp_path / str(steps)
        run_sft(folder, toy_base("llama"), toy_data, audit_steps=steps, lora_dropout=0.2)
        artifact = Registry(folder / "registry").get("sft/toy")
        weights.append((artifact.path / "adapter_model.safetensors").read_bytes())
        assert list_sheets(folder / "out" / "sft") == [] or steps == 2
    assert weights[0] == weights[1]
    assert audited(tmp_path / "0" / "out" / "sft") == []


def test_written_sheets_are_examined_again(registry: Path) -> None:
    """Catches: a sheet that lacks what its examination needs, as after the run there is nothing else."""
    folder = registry.parent / "out" / "sft"
    results = examine(read_sheet(list_sheets(folder)[-1]))
    assert wrong(results) == [] and {"loss", "gradient", "labels"} <= examined(results)


def test_a_fault_stops_the_run(
    tmp_path: Path, toy_base: Callable[[str], Path], toy_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Catches: an audit that nobody hears of before the end of the training."""
    from rlhf.base.errors import UserError

    relabelled(no_stop)(monkeypatch)
    with pytest.raises(UserError, match="update 1: labels"):
        run_sft(tmp_path, toy_base("llama"), toy_data, doctor=["stop"])
    assert "labels" in capsys.readouterr().out


def test_the_published_reward_model(finished: tuple[Path, Path]) -> None:
    """Catches: a mean or spread that is not that of the scores, and a model that is saved otherwise than it was trained."""
    artifact = Registry(finished[0]).get("reward/toy")
    compute, rows = Compute(torch.device("cpu"), torch.float32), [[5, 6, 7], [8, 9, 10, 11], [20, 21, 22, 23, 24]]
    scores = training_live.load_reward(artifact.path, finished[0], torch.float32).raw(rows).detach()

    def results(mean: float, std: float, trained: torch.Tensor) -> list[bool]:
        manifest = dataclasses.replace(artifact.manifest, reward_mean=mean, reward_std=std)
        one = dataclasses.replace(artifact, manifest=manifest)
        return [s.passed for s in examine_published(one, compute, "none", (rows, trained), rows)]

    mean, std = float(scores.mean()), float(scores.std())
    assert results(mean, std, scores) == [True, True]
    assert results(mean + 0.1 * std, std, scores) == [True, False]
    assert results(mean, 1.1 * std, scores) == [True, False]
    assert results(mean, std, scores.roll(1)) == [False, True]


@pytest.mark.parametrize("module", [training, training_models])
def test_nothing_of_the_stages_recomputes(module: Any) -> None:
    """Catches: a recomputation by the code that it is to check."""
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    names = [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert [name for name in names if name.startswith(("rlhf.ppo", "rlhf.models", "rlhf.reward", "rlhf.stages"))] == []


@pytest.mark.parametrize(("kind", "stage", "rounding", "limit"), [
    ("bfloat16", "sft", 0.0, 0.15), ("bfloat16", "sft", 0.05, 0.4), ("bfloat16", "sft", 0.1, 0.5),
    ("bfloat16", "reward", 0.0, 0.35), ("float32", "sft", 0.05, 5e-3),
])  # fmt: skip
@pytest.mark.parametrize("side", [0.99, 1.01])
def test_limits_of_a_gradient(
    kind: str, stage: str, rounding: float, limit: float, side: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: sound gradients in bf16 accused that are differences of like numbers, and limits without an end."""
    plain = torch.ones(4)
    sheet = Sheet(1, {}, {"gradient/all/w": plain * (1 + side * limit)})
    examination = Examination.__new__(Examination)
    vars(examination).update(
        sheet=sheet, step=1, kind=kind, stage=stage, own_gradients={"w": plain}, _require_model=lambda: None
    )
    finer = Examination.__new__(Examination)
    vars(finer).update(own_gradients={"w": plain * (1 + rounding)})
    monkeypatch.setattr(examination, "_in_fp32", lambda: finer)
    assert examination.gradient().passed == (side < 1)
