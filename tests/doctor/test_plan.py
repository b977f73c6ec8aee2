"""Plans: what a rehearsal counts against real passes, the largest microbatch, and the command."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rlhf.base.errors import UserError
from rlhf.config import PPOConfig, RewardConfig, SFTConfig
from rlhf.doctor.plan import __main__ as command
from rlhf.doctor.plan import estimate
from rlhf.doctor.plan.estimate import MARGIN, Phase, make_plan, parameters, rehearse
from rlhf.doctor.plan.rates import GPUS, find_gpu
from rlhf.doctor.plan.show import lines
from rlhf.doctor.plan.twin import shortened
from rlhf.doctor.plan.work import Work, assumed_work
from rlhf.models.compute import Compute
from tests.toys import build_model

SHAPE = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
SFT = SFTConfig(
    name="x", dataset="none", model_name_or_path="none", per_device_train_batch_size=4, gradient_accumulation_steps=1
)
REWARD = RewardConfig(name="x", dataset="none", policy="sft/x", per_device_train_batch_size=2)
PPO = PPOConfig(
    name="x", dataset="none", policy="sft/x", reward=["reward/x"], total_episodes=16, rollout_batch_size=8, minibatch_size=8,
    microbatch_size=4, response_length=8,
)  # fmt: skip
CPU = Compute(torch.device("cpu"), torch.float32)


def work(config: Any, tokens: int = 8, rows: int = 16) -> Work:
    """Rows of one length."""
    return assumed_work(config, prompt_tokens=tokens, answer_tokens=tokens, rows=rows)


def counts(config: Any, shape: LlamaConfig = SHAPE, **sizes: int) -> dict[str, estimate.Count]:
    """The counts of a stage."""
    return rehearse(config, shape, torch.float32, work(config, **sizes), on_cpu=True).counts


class Flops(TorchDispatchMode):
    """Counts the products of a pass; torch's own mode fails where a forward pass takes a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def test_matrix_products_are_those_of_a_real_pass() -> None:
    """Catches: operators of the rehearsal that the run does not call, or layers left out."""
    from rlhf.doctor.plan.phases import _labelled
    from rlhf.models.adapters import fitted, lora_config, with_adapter
    from rlhf.models.likelihood import answer_loss

    model = build_model("llama", 1 << 15)
    shape = model.config
    planned = rehearse(SFT, shape, torch.float32, work(SFT), on_cpu=True).counts["train"].operators
    adapted = with_adapter(model, fitted(model, lora_config(SFT, "CAUSAL_LM")))
    rows = work(SFT).largest(4)
    with Flops() as real:
        answer_loss(adapted.get_base_model(), *_labelled(rows))[0].backward()
    total = sum(operator.flops * calls for operator, calls in planned.items())
    assert total == pytest.approx(real.total, rel=0.02)  # not packed, so attention's differ a little


@pytest.mark.parametrize("config", [SFT, REWARD, PPO], ids=["sft", "reward", "ppo"])
def test_two_depths_give_the_whole_depth(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a count that is no straight line of the depth."""
    short = counts(config)
    monkeypatch.setattr(estimate, "DEPTHS", (6, 6))
    whole = counts(config)
    for name, count in whole.items():
        assert short[name].peak == pytest.approx(count.peak, rel=0.1 if "evaluate" in name else 0.02), name
        flops = [sum(o.flops * n for o, n in one.operators.items()) for one in (short[name], count)]
        assert flops[0] == flops[1], name


def test_activations_grow_with_the_rows_and_shrink_by_recomputing() -> None:
    """Catches: rows that are not counted, or checkpointing that is not done."""
    loaded = counts(SFT)["load"].peak

    def activations(**options: Any) -> int:
        return counts(SFTConfig(**{**vars(SFT), **options}))["train"].peak - loaded

    few, many = activations(), activations(per_device_train_batch_size=8)
    assert 1.5 * few < many < 2.1 * few
    assert activations(gradient_checkpointing=True) < 0.7 * few


def test_an_update_reaches_every_trained_tensor() -> None:
    """Catches: the optimiser's time left out, or its first update, which makes the states, taken for the usual one."""
    update = counts(SFT)["train: update"].operators
    calls = {
        name: sum(n for o, n in update.items() if name in str(o.function))
        for name in ("optimizer_update", "zeros_like")
    }
    assert calls == {
        "optimizer_update": 2 * 7 * 6,
        "zeros_like": 0,
    }  # two matrices a linear layer, seven layers a block
    assert min(update.values()) >= 0


def test_a_quantised_base_is_sampled_from_a_plain_copy() -> None:
    """Catches: the copy left out of the rollout's memory, or counted in the phases after it, when it is gone."""
    plain = 4 * 6 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # fp32, six layers: q and o, k and v, gate, up and down
    options = {**vars(PPO), "quantization": "4bit"}
    kept, copied = (counts(PPOConfig(**{**options, "merge_adapter": merge})) for merge in (False, True))
    more = {name: copied[name].peak - kept[name].peak for name in copied}
    assert (
        plain - 3 * 4 * 32 * 64 <= more["rollout: last token"] <= plain
    )  # without the copy a step expands each weight
    assert more["load"] == more["score"] == more["optimise"] == 0


@pytest.mark.parametrize(("on_gpu", "beside"), [(True, 1e9), (False, 3e9)])
def test_what_lasts_takes_its_bytes_and_passes_the_allocators(
    on_gpu: bool, beside: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: gradients and optimiser states of full fine-tuning that are multiplied as activations are."""
    monkeypatch.setattr(estimate, "libraries", lambda: 3e9 - estimate.LATE - estimate.KERNELS[SFTConfig])
    size = {"load": estimate.Count(peak=100), "train": estimate.Count(peak=400, lasting=200)}
    size["train: update"] = estimate.Count(peak=310, lasting=200)
    factor = estimate.GPU_HELD if on_gpu else estimate.HELD
    assert estimate.process_bytes("train", size, SFT, on_gpu=on_gpu) == pytest.approx(
        beside + 300 + factor * 100, abs=0.01
    )


@pytest.mark.parametrize(("short", "rows"), [(0, 8), (1, 7)])
def test_most_rows_leave_room_for_what_lasts(short: float, rows: int) -> None:
    phases = [Phase("load", 100.0, 0.0), Phase("train", 500.0, 0.0)]  # 200 of it last, so a row takes 50
    assert estimate._fitting(4, phases, MARGIN * (300 + 8 * 50) - short, lasting=200) == rows


def test_four_bit_weights_take_about_half_a_byte() -> None:
    """Catches: quantised layers counted in full, or the embedding counted as quantised."""
    plain, small = (counts(SFTConfig(**{**vars(SFT), "quantization": kind}))["load"].peak for kind in ("none", "4bit"))
    layers = sum(p.numel() for p in build_layers() if p.dim() == 2)
    assert plain - small == pytest.approx(layers * (4 - 0.5 - 1 / 64), rel=0.01)


def build_layers() -> list[torch.nn.Parameter]:
    """The parameters of the layers of `SHAPE`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return list(AutoModelForCausalLM.from_config(SHAPE).model.layers.parameters())


def test_plan_of_ppo_says_phases_tokens_and_disk() -> None:
    plan = make_plan(PPO, SHAPE, CPU, work(PPO), budget=0.2)
    assert [phase.name for phase in plan.phases] == ["load", "rollout", "score", "optimise"]
    assert plan.tokens == 16 * 16
    assert plan.parameters == parameters(SHAPE)
    assert plan.fits and plan.seconds > 0
    assert plan.disk > 3 * plan.checkpoint > 0
    (first, second, third) = lines(plan, PPO, "a machine")
    assert "256 tokens" in first and "assumed" in first
    assert "rollout" in second and "fits" in third and "microbatch_size" in third


@pytest.mark.parametrize(("available", "fits"), [(MARGIN * 1e9 + 1, True), (MARGIN * 1e9 - 1, False)])
def test_fits_has_a_margin(available: float, fits: bool) -> None:
    plan = make_plan(SFT, SHAPE, CPU, work(SFT), budget=0.0)
    plan = estimate.dataclasses.replace(plan, phases=[Phase("train", 1e9, 0.0)], available=available, fitting=3)
    assert plan.fits == fits
    last = lines(plan, SFT, "a machine")[-1]
    assert ("does NOT fit" in last) != fits
    assert fits or "set per_device_train_batch_size to 2, or set gradient_checkpointing" in last


def test_largest_microbatch_is_one_whose_plan_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a microbatch that init or auto chooses and that does not fit."""
    shape = shortened(SHAPE, 2)
    peak = make_plan(SFT, shape, CPU, work(SFT), gpu=GPUS["t4"]).peak
    room = estimate.CONTEXT + (peak - estimate.CONTEXT) * 6
    gpu = estimate.Gpu(MARGIN * room, 1e12, 1e14)
    largest = make_plan(SFT, shape, CPU, work(SFT), gpu=gpu).largest
    assert largest >= 8
    bigger = SFTConfig(**{**vars(SFT), "per_device_train_batch_size": largest})
    assert make_plan(bigger, shape, CPU, work(bigger), gpu=gpu).peak <= room


def test_unknown_gpu_is_one_line() -> None:
    with pytest.raises(UserError, match=r"no GPU 'h10' is known .*did you mean 'h100'"):
        find_gpu("h10")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Configs of a chain whose model is a config alone."""
    SHAPE.save_pretrained(tmp_path / "model")
    common = {"dataset": str(tmp_path / "nowhere"), "output_dir": str(tmp_path / "out")}
    few = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2}
    sizes = {"rollout_batch_size": 8, "minibatch_size": 8, "microbatch_size": 4, "response_length": 8}
    (tmp_path / "sft.yaml").write_text(json.dumps({**common, **few, "model_name_or_path": str(tmp_path / "model")}))
    (tmp_path / "reward.yaml").write_text(json.dumps({**common, **few, "policy": "sft/demo", "response_length": 8}))
    (tmp_path / "ppo.yaml").write_text(json.dumps({**common, **sizes, "policy": "sft/demo", "reward": ["reward/demo"]}))
    return tmp_path


def test_command_plans_a_folder_from_config_json_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--config", str(folder), "--gpu", "h100", "--json", "--registry", str(folder / "registry")])
    plans = json.loads(capsys.readouterr().out)
    assert [plan["stage"] for plan in plans] == ["sft", "reward", "ppo"]
    assert all(plan["fits"] and plan["seconds"] > 0 and "not read" in plan["source"] for plan in plans)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "no GPU 'h1000' is known"),
        (["--model", "nowhere/at-all"], "cannot read the config of 'nowhere/at-all'"),
        (["--respons_length", "3"], "unknown option --respons_length.*response_length"),
    ],
)
def test_mistakes_are_one_line(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        command.main(["--config", str(folder / "ppo.yaml"), "--registry", str(folder / "registry"), *words])
    assert "\n" not in str(error.value)


def test_command_makes_the_data_of_the_folder_and_reads_its_lengths(
    folder: Path, toy_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: lengths that are assumed although data.yaml says where the rows are, and a plan that training cannot reuse."""
    toy_tokenizer.save_pretrained(folder / "model")
    words = [a + b + c for a in "bdkmt" for b in "aeiou" for c in "lnrst"]
    rows = [{"prompt": f"{a} {b}?", "completion": f"{b} {a} {b}."} for a, b in pairwise(words)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "data.yaml").write_text(
        json.dumps({"sources": [{"path": str(folder / "rows.jsonl")}], "output_dir": str(folder / "data")})
    )
    (folder / "reward.yaml").unlink()
    (folder / "ppo.yaml").unlink()
    command.main(
        ["--config", str(folder), "--json", "--chat_template", "plain", "--registry", str(folder / "registry")]
    )
    (plan,) = json.loads(capsys.readouterr().out)
    assert str(folder / "data/demonstrations") in plan["source"] and (folder / "data/card.json").is_file()
