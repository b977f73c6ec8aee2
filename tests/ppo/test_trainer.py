"""The PPO loop: against a naive second implementation, and its invariances."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import pytest
import torch
from ppo import naive
from ppo.conftest import PROMPTS, STOPS, Make
from safetensors.torch import load_file
from test_models import ALL_MODES, MODES, REWARD_MEAN, REWARD_STD, VOCAB, float64_norm, ppo_config
from torch import Tensor
from toys import FAMILIES, build_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.base.errors import UserError
from rlhf.models.roles import RoleModels, SharedModels
from rlhf.models.separate import SeparateModels
from rlhf.models.sequences import Sequences, pad
from rlhf.ppo import forward
from rlhf.ppo import functional as F
from rlhf.ppo.credit import Credit
from rlhf.ppo.draws import prompt_rows
from rlhf.ppo.trainer import RATIO_TOLERANCE, PPOTrainer
from rlhf.ppo.types import Rollout
from rlhf.reward import sources
from rlhf.reward.sources import Responses
from rlhf.run import checkpoint
from rlhf.run.metrics import of_stage


@pytest.fixture(autouse=True)
def _true_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)


def spy(trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Records rewards, what the optimiser is given, and the gradients of each update before they are clipped."""
    seen: dict[str, list[Any]] = {"rewards": [], "optimise": [], "gradients": []}
    token_rewards, optimise, update = F.token_rewards, trainer.optimise, trainer._update

    def record_rewards(*args: Any, **kwargs: Any) -> Tensor:
        seen["rewards"].append(token_rewards(*args, **kwargs))
        return seen["rewards"][-1]

    def record_optimise(rollout: Rollout, credit: Credit) -> dict[str, float]:
        seen["optimise"].append((rollout, credit.advantages, credit.returns))
        return optimise(rollout, credit)

    def record_update(totals: Any) -> None:
        named = {**trainer.models.trainable("policy"), **trainer.models.trainable("value")}
        seen["gradients"].append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        update(totals)

    monkeypatch.setattr(F, "token_rewards", record_rewards)
    monkeypatch.setattr(trainer, "optimise", record_optimise)
    monkeypatch.setattr(trainer, "_update", record_update)
    return seen


def weights(models: RoleModels) -> dict[str, Tensor]:
    """A copy of all that is trained."""
    return {n: p.detach().clone() for n, p in {**models.trainable("policy"), **models.trainable("value")}.items()}


def real(x: Tensor, mask: Tensor) -> list[list[Any]]:
    return [row[m].tolist() for row, m in zip(x, mask, strict=True)]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor.detach(), rtol=0, atol=atol, msg=name)


# ---- against the naive implementation -------------------------------------------------------------------------------


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def lora_of(models: SharedModels, role: str) -> naive.Lora:
    """A copy of a role's adapter, as leaves, by the path of the layer in the plain model."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in models.peft.named_parameters():
        if f".{role}." in name:
            path, kind = name.removeprefix("base_model.model.").removesuffix(f".{role}.weight").rsplit(".", 1)
            found.setdefault(path, {})[kind] = leaf(parameter)
    return {path: (pair["lora_A"], pair["lora_B"]) for path, pair in found.items()}


def by_name(lora: naive.Lora, role: str) -> dict[str, Tensor]:
    prefix = "base_model.model."
    return {
        f"{prefix}{path}.{kind}.{role}.weight": tensor
        for path, pair in lora.items()
        for kind, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def naive_copy(trainer: PPOTrainer, family: str) -> tuple[naive.Models, dict[str, dict[str, Tensor]]]:
    """The models of the naive implementation with copies of the trainer's weights, and those that `policy` and `value` train,
    by the trainer's names."""
    models, config = trainer.models, trainer.config
    plain = build_model(family, VOCAB, dtype=torch.float64).requires_grad_(False)
    roles = ("policy", "reward") if models.shared_trunk else ("policy", "reward", "value")
    weights: dict[str, Any] = {"reference": dict}  # none of its own
    if isinstance(models, SharedModels):
        adapters = {role: lora_of(models, role) for role in roles}
        scale = config.lora_alpha / config.lora_r
        weights |= {role: partial(naive.merged_weights, plain, adapters[role], scale) for role in roles}
        trained = {role: by_name(adapters[role], role) for role in roles}
    else:
        assert isinstance(models, SeparateModels)
        copies = {role: {n: leaf(p) for n, p in models.models[role].named_parameters()} for role in roles}
        weights |= {role: partial(dict, copies[role]) for role in roles}
        trained = {role: {f"{role}.{n}": p for n, p in copies[role].items()} for role in roles}
    weights.setdefault("value", weights["policy"])
    head = {n: leaf(p) for n, p in models.value_head.named_parameters()}
    named_head = {f"value_head.{n}": p for n, p in head.items()}
    return (
        naive.Models(plain, weights, head, models.reward_head.weight.detach().clone()[0]),
        {"policy": trained["policy"], "value": trained.get("value", {}) | named_head},
    )


#: Far from the defaults, and such that clips and norms bite.
NAIVE: dict[str, Any] = {
    "temperature": 0.7,
    "kl_coef": 0.2,
    "gamma": 0.98,
    "lam": 0.9,
    "clip_range": 0.05,
    "clip_range_value": 0.03,
    "vf_coef": 0.3,
    "learning_rate": 2e-3,
    "value_learning_rate": 3e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.01,
    "adam_epsilon": 1e-3,  # so large that the scale of a gradient matters, not only its sign
    "missing_eos_penalty": 0.5,
    "min_response_length": 3,
    "short_response_penalty": 0.25,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_update_is_that_of_a_naive_implementation(
    family: str, mode: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: an off-by-one of score, value or log-probability, a wrong mask, mean, sign, clip, detach, temperature,
    adapter or position anywhere between the sampled tokens and the changed weights."""
    c, close = NAIVE, {"abs": 1e-10, "rel": 0}
    # Two epochs: in the second the ratios are off 1, and the clips bite.
    options = {**c, **MODES[mode], "num_ppo_epochs": 2, "lr_scheduler_type": "constant_with_warmup"}
    trainer = make(family, **options)
    models, trained = naive_copy(trainer, family)
    seen = spy(trainer, monkeypatch)
    metrics = trainer.step()
    ((rollout, advantages, returns),) = seen["optimise"]

    # Nothing but the first weights and the sampled tokens is taken from the trainer.
    pairs = list(zip(real(rollout.prompts, rollout.prompt_mask), real(rollout.responses, rollout.mask), strict=True))
    assert [p for p, _ in pairs] == [PROMPTS[i] for i in rollout.prompt]
    assert all(len({len(row[side]) for row in pairs}) > 2 for side in (0, 1)), "the toy must be ragged"
    old = naive.evaluate(models, pairs, STOPS, REWARD_MEAN, REWARD_STD, c)
    for name, got in (
        ("logprobs", rollout.logprobs),
        ("ref_logprobs", rollout.ref_logprobs),
        ("values", rollout.values),
        ("rewards", seen["rewards"][0]),
        ("returns", returns),
        ("advantages", advantages),
    ):
        for row, expected in zip(real(got, rollout.mask), old[name], strict=True):
            assert row == pytest.approx(expected, **close), name
    assert rollout.scores.tolist() == pytest.approx(old["scores"], **close)

    rates = {"policy": c["learning_rate"], "value": c["value_learning_rate"]}
    optimisers = {n: naive.AdamW(lr, 0.9, 0.95, c["adam_epsilon"], c["weight_decay"]) for n, lr in rates.items()}
    steps = [naive.step(models, trained, optimisers, pairs, old, c) for _ in range(2)]
    for step, gradients in zip(steps, seen["gradients"], strict=True):
        assert min(step.norms.values()) > c["max_grad_norm"], "the toy must exceed the norm"
        assert_close(gradients, step.gradients["policy"] | step.gradients["value"])
    count = 2 * sum(len(answer) for _, answer in pairs)
    for role, share in (("policy", "ppo/clipfrac"), ("value", "ppo/value_clipfrac")):
        clipped = sum(step.clipped[role] for step in steps)
        assert clipped > 0, "the toy must clip"
        assert metrics[share] == pytest.approx(clipped / count)
        assert metrics[f"ppo/{role}_loss"] == pytest.approx(sum(step.losses[role] for step in steps) / 2, **close)
    assert_close(weights(trainer.models), trained["policy"] | trained["value"])


# ---- invariances ----------------------------------------------------------------------------------------------------


def assert_same_bytes(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [n for n in one if not torch.equal(one[n], two[n])] == []


def fixed_sequences() -> Sequences:
    prompts, prompt_mask = pad([[5, 6, 7], [8, 9, 10, 11, 12]], 0, side="left")
    responses, mask = pad([[20, 21, 22, 23], [30, 2]], 0, side="right")
    return Sequences(prompts=prompts, prompt_mask=prompt_mask, responses=responses, mask=mask)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_does_not_depend_on_microbatches_row_order_or_padding(
    family: str, mode: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a mean of microbatch means (rows differ in length), a microbatch whose gradient is lost or counted twice, rows
    that are paired with another row's advantages, padding that adds to a loss or to its denominator."""
    trainer = make(family, num_ppo_epochs=2, **MODES[mode])
    seen = spy(trainer, monkeypatch)
    rollout, _ = trainer.collect()
    noise = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages, returns = noise * rollout.mask, (rollout.values + noise.flip(0)) * rollout.mask
    assert len(set(rollout.lengths.tolist())) > 3, "the toy must be ragged"
    trainer.state.save()
    ends = []
    backwards, wider = torch.arange(len(rollout)).flip(0), torch.nn.functional.pad
    for size, batch, targets in (
        (2, rollout, (advantages, returns)),
        (1, rollout, (advantages, returns)),
        (8, rollout, (advantages, returns)),
        (2, permuted(rollout, backwards), (advantages[backwards], returns[backwards])),
        (2, padded(rollout), (wider(advantages, (0, 2)), wider(returns, (0, 2)))),
    ):
        trainer.config.microbatch_size = size
        trainer.optimise(batch, credit(*targets))
        ends.append(weights(trainer.models))
        trainer.state.resume()
    first, *others = zip(seen["gradients"][::2], seen["gradients"][1::2], ends, strict=True)
    assert len(others) == 4
    for other in others:
        for got, expected, atol in zip(other, first, (1e-10, 1e-7, 1e-7), strict=True):
            assert_close(got, expected, atol=atol)


def credit(advantages: Tensor, returns: Tensor) -> Credit:
    return Credit(advantages=advantages, returns=returns, metrics={})


def permuted(rollout: Rollout, order: Tensor) -> Rollout:
    return Rollout(**{f.name: getattr(rollout, f.name)[order] for f in dataclasses.fields(rollout)})


def padded(rollout: Rollout) -> Rollout:
    """With three columns more before the prompts and two after the responses, of numbers that must not be read."""

    def widen(name: str) -> Tensor:
        x = getattr(rollout, name)
        if x.dim() == 1:
            return x
        fill: float = torch.nan if x.is_floating_point() else 0 if x.dtype == torch.bool else 41
        return torch.nn.functional.pad(x, (3, 0) if name.startswith("prompt") else (0, 2), value=fill)

    return Rollout(**{f.name: widen(f.name) for f in dataclasses.fields(rollout)})


def trainer_of(mode: str, make: Make, **options: Any) -> PPOTrainer:
    """A trainer of any mode on a Llama, where no weights are tied: each has a name of its own."""
    return make("llama", **ALL_MODES[mode], **options)


def rounding(mode: str) -> float:
    """How far a first ratio may be from 1. Of float64 more is asked here than at run time."""
    return 1e-12 if mode in MODES else RATIO_TOLERANCE[torch.float32]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_first_ratio_is_one(mode: str, make: Make) -> None:
    """Catches: old log-probabilities from the sampler, or from a forward pass in another mode, type or temperature."""
    near = rounding(mode)
    metrics = trainer_of(mode, make, temperature=0.7, clip_range=2 * near).step()
    assert metrics["ppo/first_ratio_error"] < near
    assert metrics["ppo/clipfrac"] == 0.0
    assert metrics["ppo/approx_kl"] < near**2
    assert metrics["ppo/ratio_mean"] == pytest.approx(1.0, abs=near)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_nothing_moves_at_learning_rate_zero(mode: str, make: Make) -> None:
    """Catches: ratios that drift from 1 without a change of weights (rows mixed up between rollout and optimiser), and an
    optimiser that changes weights by anything but its step size."""
    epochs = (
        1 if mode == "8bit" else 2
    )  # a second one has other neighbours, and LLM.int8 rounds by the whole microbatch
    trainer = trainer_of(mode, make, learning_rate=0.0, num_ppo_epochs=epochs, minibatch_size=4, total_episodes=24)
    before, near = weights(trainer.models), rounding(mode)
    for _ in range(3):
        metrics = trainer.step()
        assert metrics["ppo/clipfrac"] == 0.0 and metrics["ppo/value_clipfrac"] == 0.0
        assert metrics["ppo/approx_kl"] < near**2 and metrics["ppo/ratio_max"] == pytest.approx(1.0, abs=near)
        assert metrics["ppo/grad_norm"] > 0 and metrics["ppo/value_grad_norm"] > 0
    assert_same_bytes(weights(trainer.models), before)


@pytest.mark.parametrize(
    ("mode", "family"), [(mode, family) for mode in ALL_MODES for family in (FAMILIES if mode in MODES else ["llama"])]
)
def test_kl_of_a_fresh_policy_is_exactly_zero(mode: str, family: str, make: Make) -> None:
    """Catches: a reference that is not the SFT policy, e.g. a base model without the merged SFT adapter, or another type."""
    trainer = make(family, fresh=True, **ALL_MODES[mode])
    rollout, metrics = trainer.collect()
    assert metrics["objective/kl"] == metrics["objective/kl_k3"] == metrics["objective/kl_full"] == 0.0
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    assert metrics["objective/rlhf_reward"] == metrics["objective/score"]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_training_changes_policy_and_value_and_nothing_else(mode: str, make: Make) -> None:
    """Catches: a reference, base or reward model that trains along, a parameter that the optimiser forgot, weights shared
    between copies, a merge that is undone by subtraction, and a quantised base that is quantised again."""
    trainer = trainer_of(mode, make, fresh=True, num_ppo_epochs=2)  # a fresh A has its first gradient once B has moved
    models, batch = trainer.models, fixed_sequences()

    @torch.no_grad()
    def answers() -> tuple[Tensor, ...]:
        logprobs = [forward.token_logprobs(models, role, batch, 1.0) for role in ("reference", "policy")]
        return sources.sequence_scores(models, batch), *logprobs

    before = {n: t.clone() for n, t in models.state_dict().items()}
    held = {"8bit": torch.int8, "4bit": torch.uint8}.get(mode)
    assert held is None or [t.dtype for n, t in before.items() if n.endswith("base_layer.weight")] == [held] * 14
    score, reference, policy = answers()
    assert torch.equal(policy, reference)
    metrics = trainer.step()
    assert metrics["ppo/first_ratio_error"] < rounding(mode) and metrics["objective/kl"] == 0.0
    new_score, new_reference, new_policy = answers()
    assert torch.equal(new_score, score) and torch.equal(new_reference, reference)
    assert not torch.equal(new_policy, policy)
    names = {n: n.removeprefix("peft.").removeprefix("models.") for n in before}
    changed = {names[n] for n, t in models.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == weights(models).keys() - {"value.lm_head.weight"}  # the value model's own is never read
    assert models.shared_trunk != any(".value." in n for n in before), "a shared trunk has no value model of its own"


def test_stale_log_probabilities_are_refused(make: Make) -> None:
    """Catches: the run-time guard compared nothing, or only after the first optimiser step."""
    trainer = make()
    rollout, _ = trainer.collect()
    zeros = torch.zeros_like(rollout.logprobs)
    before = weights(trainer.models)
    stale = dataclasses.replace(rollout, logprobs=rollout.logprobs - 1e-3 * rollout.mask)
    with pytest.raises(RuntimeError, match="first probability ratio"):
        trainer.optimise(stale, credit(zeros, rollout.values))
    assert_same_bytes(weights(trainer.models), before)
    trainer.state.optimizer.zero_grad()
    trainer.optimise(rollout, credit(zeros, rollout.values))


def test_every_pass_over_the_prompts_is_another_permutation() -> None:
    """Catches: prompts left out or repeated within a pass, one order for all passes, and an order that depends on history."""
    config = ppo_config(rollout_batch_size=4, minibatch_size=4, total_episodes=48)
    rows = [row for update in range(12) for row in prompt_rows(config, 6, update)]  # 8 passes over 6 prompts
    passes = [tuple(rows[i : i + 6]) for i in range(0, 48, 6)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert len(set(passes)) > 5
    assert prompt_rows(config, 6, 3) == rows[12:16]
    config.seed = 1
    assert [row for update in range(12) for row in prompt_rows(config, 6, update)] != rows


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_rewarded_token_becomes_likelier_and_a_punished_one_rarer(sign: float, make: Make) -> None:
    """Catches: a wrong sign, or an advantage that lands on other tokens than those it was earned by."""
    token = 20

    def share(responses: Responses) -> tuple[Tensor, dict[str, Tensor]]:
        sequences = responses.sequences
        counted = ((sequences.responses == token) & sequences.mask).sum(dim=1)
        return sign * 4 * counted.to(torch.float32) / sequences.mask.sum(dim=1), {}

    trainer = make(
        "llama",
        fresh=True,
        dtype="float32",
        rollout_batch_size=32,
        minibatch_size=16,
        microbatch_size=16,
        total_episodes=320,
        response_length=4,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        learning_rate=2e-2,
        lr_scheduler_type="constant_with_warmup",
    )
    trainer.environment.reward = share  # type: ignore[assignment]
    ids, mask = pad(PROMPTS, 0, side="left")
    ones = Sequences(
        prompts=ids, prompt_mask=mask, responses=torch.full((6, 1), token), mask=torch.ones(6, 1, dtype=torch.bool)
    )

    def chance() -> float:
        with torch.no_grad():
            return float(forward.token_logprobs(trainer.models, "policy", ones, 1.0).exp().mean())

    before = chance()
    for _ in range(10):
        trainer.step()
    assert chance() > 5 * before if sign > 0 else chance() < before / 2


@pytest.mark.parametrize("where", ["policy", "value"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights(where: str, make: Make) -> None:
    """Catches: NaN written into the adapters, from where the next checkpoint would take it."""
    trainer = make()
    rollout, _ = trainer.collect()
    advantages, returns = torch.ones_like(rollout.values), rollout.values.clone()
    (advantages if where == "policy" else returns)[3, 0] = torch.nan
    before = weights(trainer.models)
    with pytest.raises(UserError, match="gradient is not finite at update 1"):
        trainer.optimise(rollout, credit(advantages, returns))
    assert_same_bytes(weights(trainer.models), before)


# ---- save and resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "optim"),
    [
        ("lora", "adamw_8bit"),
        ("lora", "adamw_torch"),
        ("shared_trunk", "adamw_torch"),
        ("full", "adamw_torch"),
        ("4bit", "adamw_torch"),
    ],
)
def test_a_resumed_run_ends_in_the_same_bytes(mode: str, optim: str, make: Make) -> None:
    """Catches: anything a checkpoint forgets: weights, heads, moments (8-bit ones too), the schedule, the update count, or a
    random draw that depends on how often a generator was used before."""
    # Rank 128 on width 32 makes 4096 elements: enough for 8-bit states.
    options = {
        "lora_r": 128,
        "lora_alpha": 16,
        "learning_rate": 1e-3,
        **ALL_MODES[mode],
        "optim": optim,
        "dtype": "float32",
    }
    straight = make("llama", folder="straight", **options)
    figures = [straight.step() for _ in range(4)]
    types = {t.dtype for s in straight.state.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)}
    assert (torch.uint8 in types) == (optim == "adamw_8bit")

    first = make("llama", folder="broken", **options)
    for _ in range(2):
        first.step()
    first.state.save()
    second = make("llama", folder="broken", seed=99, **options)  # starts elsewhere: all must come from the checkpoint
    assert second.state.resume() == 2
    again = [second.step() for _ in range(2)]
    assert_same_bytes(weights(second.models), weights(straight.models))
    for one, two in zip(figures[2:], again, strict=True):
        timeless = [n for n in one if not n.startswith("time/") and n != "rollout/tokens_per_second"]
        assert [n for n in timeless if one[n] != two[n]] == []


def test_resuming_takes_back_log_lines_after_the_checkpoint(make: Make) -> None:
    """Catches: updates that were run twice, before and after a crash, and so appear twice in the report."""
    trainer = make()
    trainer.step()
    trainer.state.save()
    trainer.step()
    trainer.state.resume()
    trainer.step()
    lines = (trainer.outputs.tracker.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_train_runs_all_updates_and_keeps_the_last_checkpoint(make: Make) -> None:
    """Catches: a last update that is not saved because it falls between two checkpoints."""
    trainer = make(total_episodes=24, save_steps=2)
    trainer.train()
    assert trainer.state.updates_done == 3
    assert sorted(p.name for p in trainer.outputs.folder.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_snapshots_hold_the_policy_of_their_update(make: Make) -> None:
    """Catches: snapshots that are all the last policy, that miss the last update, or that need more than a plain adapter."""
    trainer = make(total_episodes=40, save_steps=5, snapshot_steps=2)
    seen: dict[int, Tensor] = {}
    step = trainer.step

    def remember() -> dict[str, float]:
        metrics = step()
        seen[trainer.state.updates_done] = next(iter(trainer.models.trainable("policy").values())).detach().clone()
        return metrics

    trainer.step = remember  # type: ignore[method-assign]
    trainer.train()
    found = checkpoint.snapshots(trainer.outputs.folder)
    assert (
        list(found) == [2, 4, 5]
        and checkpoint.latest(trainer.outputs.folder) == trainer.outputs.folder / "checkpoint-5"
    )
    name = next(iter(trainer.models.trainable("policy"))).replace(".policy.", ".")
    for update, folder in found.items():
        assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        assert torch.equal(load_file(folder / "adapter_model.safetensors")[name], seen[update])


def test_every_documented_metric_is_logged_and_no_other(make: Make) -> None:
    """Catches: a figure that was renamed in one place, dropped, or added without saying what it means."""
    trainer = make(minibatch_size=4, num_logged_samples=3)
    trainer.step()
    (line,) = (trainer.outputs.tracker.run_dir / "metrics.jsonl").read_text().splitlines()
    logged = json.loads(line)
    judged = {"objective/gold", "objective/gold_correlation"}
    of_rollouts = {metric.name for metric in of_stage("ppo") if not metric.name.startswith("eval/")} - judged
    assert logged.keys() - {"step", "time"} == of_rollouts | {"episodes"}
    assert logged["episodes"] == 8 and logged["step"] == 1
    assert all(isinstance(value, (int, float)) for value in logged.values())
    samples = [json.loads(x) for x in (trainer.outputs.tracker.run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and samples[0].keys() == {"step", "prompt", "response", "score", "kl"}
