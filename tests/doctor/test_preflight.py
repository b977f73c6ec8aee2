"""Preflight: each check passes on a sound run and fails on the fault it is there for; a run ends in the same bytes without it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft.tuners.lora import Linear as LoraLinear
from toys import Call
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.config import PPOConfig, RewardConfig, SFTConfig
from rlhf.data_prep.load import joint_fingerprint, load_rows
from rlhf.doctor.preflight import data as data_checks
from rlhf.doctor.preflight import room, supervised, text
from rlhf.doctor.preflight.check import Check, require_all
from rlhf.doctor.preflight.command import parse
from rlhf.doctor.preflight.context import pick_short_rows
from rlhf.doctor.preflight.models import check_optimizer, noise_in_zeros, preserve_state
from rlhf.models import adapters, drawing, reward_model, sampling
from rlhf.models.compute import Compute
from rlhf.models.heads import ScalarHead
from rlhf.models.roles import SharedModels
from rlhf.models.tokenization import load_tokenizer
from rlhf.ppo import forward
from rlhf.ppo.trainer import RATIO_TOLERANCE
from rlhf.registry import Registry
from rlhf.run.optim import build_optimizer
from rlhf.stages import ppo, reward, sft
from rlhf.stages import run as stage_run

CONFIGS = Path(__file__).parents[2] / "configs"
TYPES: dict[str, Any] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
STAGES: dict[str, Any] = {"sft": sft, "reward": reward, "ppo": ppo}
#: Checks of each stage, in order.
ALL = {
    "sft": [
        "tokenizer, template, pad and stop tokens",
        "template applied once",
        "no leak",
        "loss mask",
        "trainable parameters",
        "gradients",
        "adapter and head reload",
        "merged equals unmerged",
        "optimiser states",
        "disk",
        "memory",
    ],
    "reward": [
        "tokenizer, template, pad and stop tokens",
        "template applied once",
        "no leak",
        "data as registered",
        "sft model loads as it was trained",
        "loss mask",
        "trainable parameters",
        "gradients",
        "score independent of batch and padding",
        "adapter and head reload",
        "merged equals unmerged",
        "optimiser states",
        "disk",
        "memory",
    ],
    "ppo": [
        "tokenizer, template, pad and stop tokens",
        "template applied once",
        "no leak",
        "data as registered",
        "sft model loads as it was trained",
        "reward model loads as it was trained",
        "loss mask",
        "score independent of batch and padding",
        "adapter and head reload",
        "merged equals unmerged",
        "policy is the reference at step 0",
        "first ratio is 1",
        "the sampler's distribution is the scored one",
        "trainable parameters",
        "gradients",
        "optimiser states",
        "disk",
        "memory",
    ],
}

Examine = Callable[..., list[Check]]


@pytest.fixture
def examine(finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """`examine("ppo", option=value)`: the checks of a toy stage on the finished pipeline, failed ones among them."""
    got: list[Check] = []
    monkeypatch.setattr(stage_run, "require_all", lambda checks, what: got.extend(checks))

    def run(stage: str, **options: Any) -> list[Check]:
        values = yaml.safe_load((toy_config / f"{stage}.yaml").read_text())
        values |= {"learning_rate": 0.01, "registry": str(finished[0]), "output_dir": str(tmp_path / "out")}
        values |= {"wandb_mode": "disabled", "device": "cpu"} | options
        if isinstance(values.get("reward"), str):
            values["reward"] = [values["reward"]]
        got.clear()
        STAGES[stage].run(TYPES[stage](**values), only_preflight=True)
        return list(got)

    return run


def failed(checks: list[Check]) -> dict[str, str]:
    """What was measured, by the names of the checks that failed."""
    return {check.name: check.measured for check in checks if not check.passed}


@pytest.fixture
def tokenizer(toy_base: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(toy_base("llama")), chat_template="chatml")


# ---- sound runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", TYPES)
def test_a_sound_run_passes_every_check(examine: Examine, stage: str) -> None:
    """A check that cries on good runs is switched off, and one that is not called protects nobody."""
    checks = examine(stage)
    assert failed(checks) == {}
    assert [check.name for check in checks] == ALL[stage]
    assert all(check.measured and check.cause and check.fix for check in checks)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", {"dtype": "float32", "gradient_checkpointing": True, "lora_target_modules": ["q_proj", "down_proj"]}),
        ("sft", {"use_dora": True, "optim": "adamw_torch"}),
        ("reward", {"finetuning": "full", "dtype": "float64", "optim": "adamw_torch"}),
        ("ppo", {"finetuning": "full", "dtype": "float32"}),
        ("ppo", {"value_model": "shared_trunk", "sampler": "generate", "gradient_checkpointing": True}),
        (
            "ppo",
            {"reward": ["rlhf.evaluation.gold:vader"], "value_warmup_updates": 1, "temperature": 0.7, "ptx_coef": 0.1},
        ),
        (
            "ppo",
            {"use_rslora": True, "dtype": "float64", "optim": "adamw_torch", "whiten_rewards": True, "kl_coef": 0.0},
        ),
    ],
)
def test_sound_runs_of_other_kinds_pass(examine: Examine, stage: str, options: dict[str, Any]) -> None:
    """Catches: what holds for a LoRA in bf16 only. Whole models have heads without use, fresh values have no gradient."""
    assert failed(examine(stage, **options)) == {}


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["template", "pad"])
def test_another_tokenizer_than_the_parents(examine: Examine, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The reward model scores texts in a format it never saw; padding that ends responses."""
    name = "tokenizer, template, pad and stop tokens"

    def load(folder: str, **options: Any) -> PreTrainedTokenizerBase:
        loaded = load_tokenizer(folder, **options)
        if fault == "template":
            loaded.chat_template = loaded.chat_template.replace("assistant", "helper")
        else:
            loaded.pad_token = loaded.eos_token
        return loaded

    monkeypatch.setattr(ppo, "load_tokenizer", load)
    told = failed(examine("ppo"))[name]
    assert ("chat_template of sft/toy@1" in told and "reward/toy@1" in told) if fault == "template" else "both" in told


def test_a_vocabulary_larger_than_the_embeddings(tokenizer: PreTrainedTokenizerBase) -> None:
    """An index error in the middle of the first epoch, when the added token comes up."""
    largest = max(tokenizer.get_vocab().values())
    assert text.check_tokenizers(tokenizer, [], largest + 1).passed
    assert f"token {largest} has no embedding" in text.check_tokenizers(tokenizer, [], largest).measured


def test_texts_that_hold_the_template_already(tokenizer: PreTrainedTokenizerBase) -> None:
    """Data exported with its marks: every prompt begins with two headers, and nothing crashes."""
    plain = [{"role": "user", "content": "Write one sentence"}]
    once = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert text.check_template(tokenizer, [plain]).passed
    check = text.check_template(tokenizer, [plain, [{"role": "user", "content": once}]])
    assert not check.passed and "prompt 2" in check.measured and "2 times" in check.measured


def test_a_template_applied_to_its_own_output(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same by code: rendered twice on the way to the tokens."""
    from rlhf.models import tokenization

    render = tokenization._render

    def twice(tok: Any, messages: Any, *, answer_header: bool) -> str:
        inner = render(tok, messages, answer_header=False)
        return render(tok, [{"role": "user", "content": inner}], answer_header=answer_header)

    monkeypatch.setattr(tokenization, "_render", twice)
    assert not text.check_template(tokenizer, [[{"role": "user", "content": "a film"}]]).passed


def test_a_conversation_and_a_template_without_marks_pass(tokenizer: PreTrainedTokenizerBase) -> None:
    """Several turns have several headers; a template that joins texts has none to count."""
    turns = [{"role": r, "content": "a film"} for r in ("system", "user", "assistant", "user")]
    assert text.check_template(tokenizer, [turns]).passed
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert text.check_template(tokenizer, [turns]).passed


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda ids, labels: [-100 if label != -100 else i for i, label in zip(ids, labels, strict=True)], "prompt"),
        (lambda ids, labels: ids, "prompt or padding is trained on"),
        (lambda ids, labels: [-100] * len(ids), "no token is trained on"),
        (lambda ids, labels: [*labels[:-1], -100], "tokens are trained on"),
    ],
    ids=["inverted", "everything", "nothing", "without the stop token"],
)
def test_sft_labels_that_are_not_the_answer(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., list[int]], told: str
) -> None:
    """A loss on prompts teaches to ask; one without the stop token teaches never to end. The loss falls all the same."""
    made = sft.tokenize

    def tokenize(*args: Any, **options: Any) -> Any:
        rows, dropped = made(*args, **options)
        return rows.map(lambda row: {"labels": spoil(row["input_ids"], row["labels"])}), dropped

    monkeypatch.setattr(sft, "tokenize", tokenize)
    assert told in failed(examine("sft"))["loss mask"]


def test_a_row_beyond_the_context_is_no_fault(examine: Examine, toy_data: Path, tmp_path: Path) -> None:
    """The stage leaves it out, whatever max_length is; labels that are read against the rows before that are all wrong."""
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    file = data / "demonstrations" / "train.jsonl"
    rows = file.read_text()
    long = {**json.loads(rows.splitlines()[0]), "completion": [{"role": "assistant", "content": "film " * 300}]}
    file.write_text(json.dumps(long) + "\n" + rows)
    assert failed(examine("sft", dataset=str(data), max_length=1024)) == {}


def test_rankings_that_are_scored_before_their_end(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model trained on cut responses reads its score where PPO never will."""
    from rlhf.reward import rankings

    encode = rankings.encode_response
    monkeypatch.setattr(rankings, "encode_response", lambda *args: encode(*args)[:-1])
    assert "no stop token" in failed(examine("reward"))["loss mask"]


def test_a_rollout_whose_mask_covers_padding(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that is trained on: the policy learns to say nothing."""
    finish = sampling.ResponseBuffer.finished

    def all_true(self: Any) -> sampling.Sampled:
        done = finish(self)
        object.__setattr__(done, "mask", torch.ones_like(done.mask))
        return done

    monkeypatch.setattr(sampling.ResponseBuffer, "finished", all_true)
    draw = drawing.draw_tokens

    def stop_soon(logits: torch.Tensor, *rest: Any, **named: Any) -> Any:
        logits = logits.clone()
        logits[: len(logits) // 2, 2] += 100.0  # half of the responses end at once, so there is padding
        return draw(logits, *rest, **named)

    monkeypatch.setattr(drawing, "draw_tokens", stop_soon)
    assert "loss mask" in failed(examine("ppo"))


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_score_that_depends_on_its_neighbours(examine: Examine, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """A padding or packing bug: the same response is worth more in one batch than in another."""
    answer = ScalarHead.forward
    monkeypatch.setattr(
        ScalarHead, "forward", lambda self, x: answer(self, x) + 0.5 * (len(x) > 1) * (not self.weight.requires_grad)
    )
    if stage == "reward":
        monkeypatch.setattr(ScalarHead, "forward", lambda self, x: answer(self, x) + 0.5 * (len(x) > 1))
    assert "alone" in failed(examine(stage))["score independent of batch and padding"]


@pytest.mark.parametrize(("off", "passed"), [(1e-4, True), (1e-2, False)])
def test_a_fresh_head_whose_scores_are_near_0_by_chance(off: float, passed: bool) -> None:
    """Rounding that is a large share of scores that are next to nothing: the untuned SmolLM2 was refused for it in bf16."""
    head = ScalarHead(4, bias=False, dtype=torch.float32)
    head.weight.data = torch.tensor([[1.0, -1.0, 1.0, -1.0]])

    def raw(rows: list[list[int]]) -> torch.Tensor:
        return head(torch.ones(len(rows), 4)).detach().squeeze(-1)  # all 0

    scorer: Any = SimpleNamespace(
        model=torch.nn.Sequential(head),
        compute=Compute(torch.device("cpu"), torch.float32),
        raw=raw,
        raw_padded=lambda rows, left, right: raw(rows) + off,
    )
    check = supervised.check_batch_independence(scorer, [[1], [2]])
    assert check.passed == passed and f"{off / 2:.2g} of the scores' size" in check.measured


@pytest.mark.parametrize(("stage", "lost"), [("sft", "lora_B"), ("reward", "score"), ("ppo", "q_proj.lora_A")])
def test_a_tensor_that_is_not_saved(examine: Examine, monkeypatch: pytest.MonkeyPatch, stage: str, lost: str) -> None:
    """It comes back at random or as zero in the next stage, with a warning that nobody reads."""
    save = adapters.save_file
    monkeypatch.setattr(
        "rlhf.models.adapters.save_file",
        lambda state, file: save({k: v for k, v in state.items() if lost not in k}, file),
    )
    assert list(failed(examine(stage))) == ["adapter and head reload"]


def test_a_folder_that_takes_no_file(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only place is found at the first checkpoint; before, it is a traceback out of safetensors."""

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("rlhf.models.adapters.save_file", refuse)
    told = failed(examine("sft"))
    assert list(told) == ["adapter and head reload"] and "Read-only file system" in told["adapter and head reload"]


@pytest.mark.parametrize(("stage", "factor"), [("sft", 2.0), ("reward", 0.0), ("ppo", 0.0), ("ppo", 2.0)])
def test_an_adapter_merged_twice_or_not_at_all(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, stage: str, factor: float
) -> None:
    """What is sampled or loaded is another model than the one that is trained; both look well."""
    delta = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda self, adapter: factor * delta(self, adapter))
    wrong = failed(examine(stage))
    assert "merged equals unmerged" in wrong
    if stage != "sft":
        assert "sft model loads as it was trained" in wrong, "the parent was merged so, too"


def test_a_policy_that_is_loaded_without_its_adapter(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO from the base model: reference and policy agree, all shapes fit, and SFT was for nothing."""
    from rlhf.models.base import load_base

    def without(artifact: Any, config: Any, compute: Any) -> Any:
        return load_base(artifact.manifest.base_model, config, compute).requires_grad_(False)

    monkeypatch.setattr(ppo, "load_policy", without)
    assert "sft model loads as it was trained" in failed(examine("ppo"))


def test_a_reward_head_of_the_wrong_sign(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward model that PPO asks is not the one that was judged; scores look well, and answers get worse."""
    read = reward_model.read_reward_adapter

    def turned(folder: Path) -> Any:
        state, head = read(folder)
        return state, -head

    monkeypatch.setattr("rlhf.models.roles.read_reward_adapter", turned)
    assert list(failed(examine("ppo"))) == ["reward model loads as it was trained"]


def test_a_reference_that_is_another_model(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL penalty pulls to something else than the SFT model."""
    answer = SharedModels._switch
    monkeypatch.setattr(
        SharedModels, "_switch", lambda self, role: answer(self, "reward" if role == "reference" else role)
    )
    assert "policy is the reference at step 0" in failed(examine("ppo"))


@pytest.mark.parametrize(("share", "passed"), [(0.95, True), (1.05, False)])
def test_old_log_probabilities_that_are_stale(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, share: float, passed: bool
) -> None:
    """Every ratio of the run is off, and clipping acts before anything was learned. The limit is the trainer's own."""
    compared = forward.compared_logprobs
    shift = math.log1p(share * RATIO_TOLERANCE[torch.float32])

    def stale(*args: Any) -> torch.Tensor:
        planes = compared(*args).clone()
        planes[:2] -= shift * (planes[:2] != 0)
        return planes

    monkeypatch.setattr(forward, "compared_logprobs", stale)
    wrong = failed(examine("ppo", dtype="float32"))
    assert ("first ratio is 1" not in wrong) == passed and "policy is the reference at step 0" not in wrong


def test_a_sampler_that_keeps_the_likeliest_tokens(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-k whose log-probabilities are those of the whole softmax: no gap shows it, the ratios are 1, and PPO is biased."""

    def top_k(
        logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
        kept = logprobs.topk(5, dim=-1)
        cdf = kept.values.exp().cumsum(dim=-1)
        drawn = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp_max(4)
        return kept.indices.gather(1, drawn).squeeze(1), kept.values.gather(1, drawn).squeeze(1)

    monkeypatch.setattr(drawing, "draw_tokens", top_k)
    assert list(failed(examine("ppo", response_length=16))) == ["the sampler's distribution is the scored one"]


def test_a_sampler_of_another_temperature(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sampled is not what is scored."""
    draw = drawing.draw_tokens
    monkeypatch.setattr(drawing, "draw_tokens", lambda logits, u, temperature, top_p: draw(logits, u, 0.5))
    assert list(failed(examine("ppo", response_length=16))) == ["the sampler's distribution is the scored one"]


def thawed(make: Callable[..., Any]) -> Callable[..., Any]:
    """A maker of adapted models that leaves a weight of the base trainable."""

    def made(*args: Any, **options: Any) -> Any:
        result = make(*args, **options)
        model = result[0] if isinstance(result, tuple) else result
        next(p for n, p in model.named_parameters() if "q_proj.base_layer.weight" in n).requires_grad_(True)
        return result

    return made


@pytest.mark.parametrize(
    ("stage", "name"), [("sft", "with_adapter"), ("reward", "trainable_reward_model"), ("ppo", "build_models")]
)
def test_a_frozen_weight_that_trains(examine: Examine, monkeypatch: pytest.MonkeyPatch, stage: str, name: str) -> None:
    """It moves, is not saved, and the model of the next stage is another one."""
    module = STAGES[stage]
    monkeypatch.setattr(module, name, thawed(getattr(module, name)))
    wrong = failed(examine(stage))
    assert "q_proj.base_layer.weight" in wrong["trainable parameters"]
    assert "which is frozen" in wrong["gradients"]


def test_a_value_head_that_is_frozen(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages are returns less a constant, for the whole run."""
    build = ppo.build_models

    def frozen(*args: Any) -> Any:
        models, source = build(*args)
        models.value_head.requires_grad_(False)
        return models, source

    monkeypatch.setattr(ppo, "build_models", frozen)
    wrong = failed(examine("ppo"))
    assert "value_head.bias, value_head.weight frozen" in wrong["trainable parameters"]
    assert "value_head" in wrong["gradients"]


def test_a_target_that_names_no_layer(examine: Examine) -> None:
    """peft is content when one of the names fits."""
    told = failed(examine("sft", lora_target_modules=["q_proj", "v_prj"]))
    assert told == {"trainable parameters": "lora_target_modules v_prj names no layer"}


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_head_that_is_cut_off_from_its_trunk(examine: Examine, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Only the head learns: the loss falls a little, and the adapter stays as it was."""
    answer = ScalarHead.forward
    monkeypatch.setattr(ScalarHead, "forward", lambda self, x: answer(self, x.detach()))
    assert "none at" in failed(examine(stage))["gradients"]


def test_states_in_32_bits_that_were_to_be_in_8() -> None:
    """Three times the memory that was planned, or a head whose scale is rounded."""
    shapes = [(64, 256), (16, 8), (1, 8192)]
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    config = PPOConfig(name="n", dataset="d", policy="sft/a", reward=["reward/a"])

    def check(make: Callable[..., Any], smallest: int | None) -> Check:
        return check_optimizer(parameters, make, smallest=smallest)

    def ours(copies: list[Any]) -> Any:
        return build_optimizer([{"params": copies}], config)

    import bitsandbytes

    assert check(ours, 8193).passed and "at 1 of 3 shapes" in check(ours, 8193).measured
    assert check(torch.optim.AdamW, None).passed
    assert "(64, 256) in float32" in check(torch.optim.AdamW, 4096).measured
    assert "(64, 256) in uint8" in check(ours, None).measured
    assert "(1, 8192) in uint8" in check(bitsandbytes.optim.AdamW8bit, 8193).measured
    assert check(bitsandbytes.optim.AdamW8bit, 4096).passed
    assert all(bool((p == 1).all()) for p in parameters), "the run's own weights took the step"


# ---- data, room -----------------------------------------------------------------------------------------------------


def test_a_held_out_prompt_that_was_trained_on(examine: Examine, toy_data: Path, tmp_path: Path) -> None:
    """Trained on in SFT and the reward model, judged in PPO: the figures measure memory."""
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    file = data / "prompts" / "validation.jsonl"
    trained = json.loads((data / "prompts" / "train.jsonl").read_text().splitlines()[0])
    trained["prompt"][0]["content"] = "  " + trained["prompt"][0]["content"].upper()  # the same, to a reader
    with file.open("a") as lines:
        lines.write(json.dumps(trained) + "\n")
    told = failed(examine("ppo", dataset=str(data)))
    assert list(told) == ["no leak"]
    assert "1 of 2 held-out prompts are in train," in told["no leak"]
    assert "sft/toy@1" in told["no leak"] and "reward/toy@1" in told["no leak"]


def test_a_row_in_both_splits_of_a_supervised_stage(toy_data: Path, tmp_path: Path) -> None:
    """A prompt may come again with another answer; the same answer measures memory."""
    sets = {split: load_rows(toy_data, split, kind="demonstrations") for split in ("train", "validation")}
    same = data_checks.check_leaks(str(toy_data), sets["train"], {"train": sets["train"]}, by="row")
    assert not same.passed and "held-out rows are in train" in same.measured
    assert data_checks.check_leaks(str(toy_data), sets["validation"], {"train": sets["train"]}, by="row").passed


def test_a_leak_that_the_card_knows_passes(toy_data: Path, tmp_path: Path) -> None:
    """`split_by: rater` holds out raters, not prompts: the gate of data preparation has looked at that."""
    rows = load_rows(toy_data, "train", kind="comparisons")
    card = {"leaks": {"overlaps": {"comparisons/train / comparisons/validation": {"exact": 1, "allowed": True}}}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    training = {"train (comparisons)": rows}
    assert data_checks.check_leaks(str(tmp_path), rows, training, by="row").passed
    assert not data_checks.check_leaks(str(toy_data), rows, training, by="row").passed


def test_data_that_changed_after_a_parent_was_trained_on_it(toy_data: Path, tmp_path: Path) -> None:
    """The manifest says what the parent learned from; the folder says something else by now."""
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    sets = {split: load_rows(data, split, kind="demonstrations") for split in ("train", "validation")}
    manifest = SimpleNamespace(
        stage="sft", config={"dataset": str(data)}, data={"fingerprint": joint_fingerprint(sets)}
    )
    parent: Any = SimpleNamespace(reference="sft/a@1", stage="sft", manifest=manifest)

    def check() -> Check:
        return data_checks.check_fingerprints([parent], data_checks.load_parents_data([parent]))

    assert check().passed
    file = data / "demonstrations" / "train.jsonl"
    file.write_text(file.read_text().replace("film", "book", 1))
    assert not check().passed and "sft/a@1 was trained on it" in check().measured
    file.write_text("{}\n")
    assert not check().passed and "cannot be read any more" in check().measured
    shutil.rmtree(data)
    assert check().passed and "not here" in check().measured


def test_a_disk_that_is_too_small(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found at the first checkpoint, an hour later."""
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: SimpleNamespace(free=1_000_000))
    assert list(failed(examine("sft"))) == ["disk"]


def test_memory_that_is_too_small(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest rows come late, and the process is killed without a word."""
    monkeypatch.setattr(room.memory, "free_bytes", lambda device: 100_000)
    told = failed(examine("ppo"))
    assert list(told) == ["memory"] and "are free" in told["memory"]


def test_kept_bytes_are_those_of_the_graph() -> None:
    """Counts double what two operations share, or weights as activations; counts on after the backward pass."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Tanh(), torch.nn.Linear(8, 1, bias=False))
    kept = room.ActivationMeter(model)
    with kept.counted():
        for rows in (5, 3):
            model(torch.ones(rows, 8)).sum().backward()
    # The first layer keeps its input, the tanh its output, which is the second layer's input: one tensor.
    assert kept.peak == 2 * 5 * 8 * 4
    assert kept.now == 0


# ---- nothing is left behind -----------------------------------------------------------------------------------------


def test_stirring_and_looking_leave_nothing(tmp_path: Path) -> None:
    """A fresh adapter that is not zero any more; random numbers that the run would have drawn."""
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.weight)
    before, random = model.weight.data, torch.get_rng_state()
    model.train()
    with preserve_state(model, torch.device("cpu")), noise_in_zeros(dict(model.named_parameters())):
        assert bool(model.weight.any())
        model.eval()(torch.randn(1, 3)).sum().backward()
    assert model.weight.data.data_ptr() == before.data_ptr() and not bool(model.weight.any())
    assert model.training and model.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("stage", TYPES)
def test_a_run_without_it_ends_in_the_same_bytes(
    finished: tuple[Path, Path],
    toy_config: Path,
    tmp_path: Path,
    call: Callable[..., Call],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """Weights, gradients, optimiser states, random numbers or running figures that the preflight has touched."""

    def refuse(**_: Any) -> None:
        raise AssertionError("--preflight false")

    monkeypatch.setattr(stage_run, "PreflightContext", refuse)
    for parent in ("sft", "reward"):
        if parent != stage:
            shutil.copytree(finished[0] / parent, tmp_path / "registry" / parent)
    places = ["--registry", tmp_path / "registry", "--output_dir", tmp_path / "out", "--wandb_mode", "disabled"]
    done = call(f"rlhf.stages.{stage}", "--config", toy_config / f"{stage}.yaml", *places, "--preflight", "false")
    assert done.code == 0, done.err[-3000:]
    ours, theirs = (Registry(root).get(f"{stage}/toy") for root in (tmp_path / "registry", finished[0]))
    assert ours.manifest.recipe == theirs.manifest.recipe, "it is no part of what a run computes"
    for name in ("adapter_model.safetensors", *(["probe.json"] if stage != "ppo" else [])):
        assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes()

    def figures(out: Path) -> list[dict[str, float]]:
        lines = map(json.loads, (out / stage / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if "time" not in k and "second" not in k} for line in lines]

    assert figures(tmp_path / "out") == figures(finished[1])


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_found_and_writes_nothing(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """A rehearsal that moves the logs and checkpoints of the last run aside, or registers something."""
    before = {p: p.stat().st_mtime_ns for p in (*finished[0].rglob("*"), *finished[1].rglob("*")) if p.is_file()}
    done = call(
        "rlhf.doctor.__main__", "preflight", "--config", toy_config / "ppo.yaml",
        "--registry", finished[0], "--output_dir", finished[1],
    )  # fmt: skip
    assert done.code == 0, done.err[-3000:]
    told = [line.removeprefix("preflight ok   ") for line in done.out.splitlines() if line.startswith("preflight ok")]
    assert [line.split(":")[0] for line in told] == ALL["ppo"]
    assert "preflight passed: ppo/toy can start" in done.out
    after = {p: p.stat().st_mtime_ns for p in (*finished[0].rglob("*"), *finished[1].rglob("*")) if p.is_file()}
    assert {p for p in before.keys() ^ after.keys() if p.name != ".lock"} == set()
    assert all(after[p] == time for p, time in before.items() if p in after)


def test_a_failed_check_ends_the_run_with_one_line(
    toy_config: Path, tmp_path: Path, call: Callable[..., Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback, a run that goes on, or a complaint that does not say what to do."""
    monkeypatch.setattr(room.memory, "free_bytes", lambda device: 100_000)
    places = ["--registry", tmp_path / "registry", "--output_dir", tmp_path / "out", "--wandb_mode", "disabled"]
    done = call("rlhf.stages.sft", "--config", toy_config / "sft.yaml", *places)
    assert f"preflight failed, 1 of {len(ALL['sft'])} checks: memory (training takes" in done.complaint
    assert "gradient_checkpointing" in done.complaint
    assert "FAIL memory: training takes" in done.out and "Cause: " in done.out and "Fix: " in done.out
    assert not (tmp_path / "registry").exists() and not list((tmp_path / "out").glob("sft/checkpoints/checkpoint-*"))


def test_every_failed_check_is_listed() -> None:
    """Mending one fault only to hear of the next."""
    checks = [
        Check(name=name, passed=name == "b", measured=f"m{name}", cause=f"c{name}", fix=f"f{name}") for name in "abc"
    ]
    with pytest.raises(UserError) as error:
        require_all(checks, "preflight")
    assert str(error.value) == "preflight failed, 2 of 3 checks: a (ma; fa); c (mc; fc)"
    require_all(checks[1:2], "preflight")


@pytest.mark.parametrize("stage", TYPES)
def test_the_stage_is_known_by_its_config(stage: str) -> None:
    """A PPO file that is read as a reward model's: its first option would be unknown."""
    name, config = parse(["--config", str(CONFIGS / "demo" / f"{stage}.yaml"), "--seed", "5"])
    assert name == stage and type(config) is TYPES[stage] and config.seed == 5


def test_pretraining_is_known_without_a_vocabulary_size(tmp_path: Path) -> None:
    """A file that takes the default size of the vocabulary, read as a reward model's."""
    file = tmp_path / "pretrain.yaml"
    file.write_text("dataset: text.txt\nhidden_size: 64\n")
    assert parse(["--config", str(file)])[0] == "pretrain"


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_file_that_names_no_policy_is_known_by_its_own_name(tmp_path: Path, stage: str) -> None:
    """Policy and reward come from the run's name, so their options do not show the stage; the file's name wins over them."""
    file = tmp_path / f"{stage}.yaml"
    file.write_text("dataset: data\nname: mine\n")
    name, config = parse(["--config", str(file), "--policy", "sft/other"])
    assert name == stage and config.name == "mine"
    (tmp_path / "mine.yaml").write_text("dataset: data\nreward: reward/mine\n")
    assert parse(["--config", str(tmp_path / "mine.yaml")])[0] == "ppo"


def test_the_command_without_a_file(call: Callable[..., Call]) -> None:
    """What to write has to be said."""
    assert "--config FILE" in call("rlhf.doctor.__main__", "preflight").complaint
    assert "did you mean 'preflight'" in call("rlhf.doctor.__main__", "prefligth").complaint


def test_few_rows_are_short_and_of_different_lengths() -> None:
    """The longest row of the data, on a CPU, is not under a minute; rows of one length have no padding."""
    lengths = [50, 10, 40, 20, 30, 60, 70, 80]
    assert [lengths[i] for i in pick_short_rows(lengths, 2)] == [10, 30]
    assert pick_short_rows([5], 4) == [0]


def test_the_page_has_every_check() -> None:
    """A check that was added or renamed without a word about it."""
    page = (CONFIGS.parent / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = [
        line.split("|")
        for line in page.split("## Preflight")[1].split("\n## ")[0].splitlines()
        if line.startswith("| ")
    ]
    named = {row[1].strip(): row[2] for row in rows[1:]}
    assert named.keys() == {name for names in ALL.values() for name in names}
    for name, stages in named.items():
        listed = {stage for stage in ALL if stage.lower() in stages.lower() or "all" in stages}
        assert listed == {stage for stage, names in ALL.items() if name in names}, name
