"""The PPO loop: against a naive second implementation, and its invariances."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from ppo import naive
from ppo.conftest import PROMPTS, STOPS, Make
from test_models import REWARD_MEAN, REWARD_STD, VOCAB, float64_norm
from torch import Tensor
from toys import FAMILIES, build_model
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.errors import UserError
from rlhf.models import SharedModels
from rlhf.ppo import forward
from rlhf.ppo import trainer as trainer_module
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ppo.types import METRICS, Rollout, Sequences
from rlhf.reward.sources import Responses
from rlhf.tokenization import pad


def spy(trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Records rewards, what the optimiser is given, and the gradients of each update before they are clipped."""
    seen: dict[str, list[Any]] = {"rewards": [], "optimise": [], "gradients": []}
    token_rewards, optimise, update = trainer_module.F.token_rewards, trainer.optimise, trainer._update

    def record_rewards(*args: Any, **kwargs: Any) -> Tensor:
        seen["rewards"].append(token_rewards(*args, **kwargs))
        return seen["rewards"][-1]

    def record_optimise(rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        seen["optimise"].append((rollout, advantages, returns))
        return optimise(rollout, advantages, returns)

    def record_update(totals: Any) -> None:
        named = {**trainer.models.trainable("policy"), **trainer.models.trainable("value")}
        seen["gradients"].append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        update(totals)

    monkeypatch.setattr(trainer_module.F, "token_rewards", record_rewards)
    monkeypatch.setattr(trainer, "optimise", record_optimise)
    monkeypatch.setattr(trainer, "_update", record_update)
    return seen


def weights(models: SharedModels) -> dict[str, Tensor]:
    """A copy of all that is trained."""
    return {n: p.detach().clone() for n, p in {**models.trainable("policy"), **models.trainable("value")}.items()}


def real(x: Tensor, mask: Tensor) -> list[list[float]]:
    return [row[m].tolist() for row, m in zip(x, mask, strict=True)]


# ---- against the naive implementation -------------------------------------------------------------------------------


def lora_of(models: SharedModels, role: str) -> naive.Lora:
    """A copy of a role's adapter, as leaves, by the path of the layer in the plain model."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in models.peft.named_parameters():
        if f".{role}." in name:
            path, kind = name.removeprefix("base_model.model.").removesuffix(f".{role}.weight").rsplit(".", 1)
            found.setdefault(path, {})[kind] = parameter.detach().clone().requires_grad_()
    return {path: (pair["lora_A"], pair["lora_B"]) for path, pair in found.items()}


def by_name(lora: naive.Lora, role: str) -> dict[str, Tensor]:
    prefix = "base_model.model."
    return {
        f"{prefix}{path}.{kind}.{role}.weight": tensor
        for path, pair in lora.items()
        for kind, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def number(x: Tensor | float) -> float:
    return x.item() if isinstance(x, Tensor) else x  # a clipped loss is a plain number: it has no gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_one_update_is_that_of_a_naive_implementation(family: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an off-by-one of score, value or log-probability, a wrong mask, mean, sign, clip, detach, temperature,
    adapter or position anywhere between the sampled tokens and the changed weights."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)
    c = {
        "temperature": 0.7,
        "kl_coef": 0.2,
        "gamma": 0.98,
        "lam": 0.9,
        "clip_range": 0.02,
        "clip_range_value": 0.03,
        "vf_coef": 0.3,
    }
    trainer = make(
        family,
        **c,
        num_ppo_epochs=2,
        microbatch_size=2,
        learning_rate=2e-3,
        value_learning_rate=3e-3,
        weight_decay=0.1,
        lr_scheduler_type="constant_with_warmup",
        max_grad_norm=0.02,
        adam_epsilon=1e-3,  # so large that the scale of a gradient matters, not only its sign
        missing_eos_penalty=0.5,
        min_response_length=3,
        short_response_penalty=0.25,
    )
    models = trainer.models
    lora = {role: lora_of(models, role) for role in ("policy", "value", "reward")}
    head = {f"value_head.{n}": p.detach().clone().requires_grad_() for n, p in models.value_head.named_parameters()}
    reward_weight = models.reward_head.weight.detach().clone()[0]
    seen = spy(trainer, monkeypatch)
    metrics = trainer.step()
    ((rollout, got_advantages, got_returns),) = seen["optimise"]
    (got_rewards,) = seen["rewards"]

    # Nothing but the sampled tokens is taken from the trainer.
    plain = build_model(family, VOCAB, dtype=torch.float64)
    plain.requires_grad_(False)
    scale = trainer.config.lora_alpha / trainer.config.lora_r
    prompts = [row[m].tolist() for row, m in zip(rollout.prompts, rollout.prompt_mask, strict=True)]
    answers = [row[m].tolist() for row, m in zip(rollout.responses, rollout.mask, strict=True)]
    assert prompts == [PROMPTS[i] for i in trainer.prompt_rows(0)]
    assert len(set(map(len, prompts))) > 2 and len(set(map(len, answers))) > 2, "the toy must be ragged"
    pairs = list(zip(prompts, answers, strict=True))

    def new_logprobs() -> list[list[Tensor]]:
        merged = naive.merged_weights(plain, lora["policy"], scale)
        return [naive.logprobs(naive.run(plain, merged, p + a)[0], p, a, c["temperature"]) for p, a in pairs]

    def new_values() -> list[list[Tensor]]:
        merged = naive.merged_weights(plain, lora["value"], scale)
        weight, bias = head["value_head.weight"][0], head["value_head.bias"][0]
        return [naive.values(naive.run(plain, merged, p + a)[1], p, a, weight, bias) for p, a in pairs]

    def floats(rows: list[list[Tensor]]) -> list[list[float]]:
        return [[number(x) for x in row] for row in rows]

    old, old_values = floats(new_logprobs()), floats(new_values())
    reference = floats([naive.logprobs(naive.run(plain, {}, p + a)[0], p, a, c["temperature"]) for p, a in pairs])
    merged = naive.merged_weights(plain, lora["reward"], scale)
    scores = []
    for p, a in pairs:
        raw = float((naive.run(plain, merged, p + a)[1][-1] @ reward_weight).detach())
        penalty = 0.5 * (a[-1] not in STOPS) + 0.25 * max(0, 3 - len(a))
        scores.append((raw - REWARD_MEAN) / REWARD_STD - penalty)
    rewards = [naive.token_rewards(o, r, s, c["kl_coef"]) for o, r, s in zip(old, reference, scores, strict=True)]
    raw_advantages = [naive.advantages(v, r, c["gamma"], c["lam"]) for v, r in zip(old_values, rewards, strict=True)]
    returns = [
        [a + v for a, v in zip(row, vs, strict=True)] for row, vs in zip(raw_advantages, old_values, strict=True)
    ]
    advantages = naive.whiten(raw_advantages)

    mask = rollout.mask
    close = {"abs": 1e-10, "rel": 0}
    for name, got, expected in (
        ("logprobs", rollout.logprobs, old),
        ("ref_logprobs", rollout.ref_logprobs, reference),
        ("values", rollout.values, old_values),
        ("rewards", got_rewards, rewards),
        ("returns", got_returns, returns),
        ("advantages", got_advantages, advantages),
    ):
        for row, expected_row in zip(real(got, mask), expected, strict=True):
            assert row == pytest.approx(expected_row, **close), name
    assert rollout.scores.tolist() == pytest.approx(scores, **close)

    # Two epochs: in the second the ratios are off 1, and the clips bite.
    optimisers = {role: naive.AdamW(lr, 0.9, 0.95, 1e-3, 0.1) for role, lr in (("policy", 2e-3), ("value", 3e-3))}
    parameters = {
        "policy": by_name(lora["policy"], "policy"),
        "value": by_name(lora["value"], "value") | head,
    }
    losses: dict[str, list[float]] = {"policy": [], "value": []}
    clipped = {"policy": 0, "value": 0}
    for epoch in range(2):
        news = {"policy": new_logprobs(), "value": new_values()}
        old_of, target_of = {"policy": old, "value": old_values}, {"policy": advantages, "value": returns}
        for role, rule, limit, factor in (
            ("policy", naive.policy_loss, c["clip_range"], 1.0),
            ("value", naive.value_loss, c["clip_range_value"], c["vf_coef"]),
        ):
            rows = [
                [rule(n, o, x, limit) for n, o, x in zip(ns, os_, xs, strict=True)]
                for ns, os_, xs in zip(news[role], old_of[role], target_of[role], strict=True)
            ]
            free = [
                [rule(number(n), o, x, 1e9) for n, o, x in zip(ns, os_, xs, strict=True)]
                for ns, os_, xs in zip(news[role], old_of[role], target_of[role], strict=True)
            ]
            clipped[role] += sum(
                number(a) > b + 1e-12 for r, f in zip(rows, free, strict=True) for a, b in zip(r, f, strict=True)
            )
            loss = naive.mean_over_tokens(rows)
            losses[role].append(number(loss))
            for parameter in parameters[role].values():
                parameter.grad = None
            (factor * loss).backward()
            gradients = {name: p.grad for name, p in parameters[role].items()}
            for name, gradient in gradients.items():
                torch.testing.assert_close(seen["gradients"][epoch][name], gradient, rtol=0, atol=1e-10, msg=name)
            limited, norm = naive.clip(gradients, 0.02)
            assert norm > 0.02, "the toy must exceed the norm"
            optimisers[role].step(parameters[role], limited)
    count = 2 * sum(map(len, answers))
    assert min(clipped.values()) > 0, "the toy must clip"
    assert metrics["ppo/policy_loss"] == pytest.approx(sum(losses["policy"]) / 2, **close)
    assert metrics["ppo/value_loss"] == pytest.approx(sum(losses["value"]) / 2, **close)
    assert metrics["ppo/clipfrac"] == pytest.approx(clipped["policy"] / count)
    assert metrics["ppo/value_clipfrac"] == pytest.approx(clipped["value"] / count)
    after = weights(models)
    for name, parameter in (parameters["policy"] | parameters["value"]).items():
        torch.testing.assert_close(after[name], parameter.detach(), rtol=0, atol=1e-10, msg=name)
    assert set(after) == set(parameters["policy"] | parameters["value"])


# ---- invariances ----------------------------------------------------------------------------------------------------


def assert_same_bytes(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [n for n in one if not torch.equal(one[n], two[n])] == []


def fixed_sequences() -> Sequences:
    prompts, prompt_mask = pad([[5, 6, 7], [8, 9, 10, 11, 12]], 0, side="left")
    responses, mask = pad([[20, 21, 22, 23], [30, 2]], 0, side="right")
    return Sequences(prompts=prompts, prompt_mask=prompt_mask, responses=responses, mask=mask)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_gradients_and_weights_do_not_depend_on_the_microbatch_size(
    family: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a mean of microbatch means (rows differ in length), or a microbatch whose gradient is lost or counted twice."""
    results = []
    for size in (1, 2, 4):
        trainer = make(family, folder=f"micro{size}", minibatch_size=4, microbatch_size=size)
        seen = spy(trainer, monkeypatch)
        trainer.step()
        results.append((seen["gradients"], weights(trainer.models)))
    for gradients, after in results[1:]:
        assert len(gradients) == 2  # two minibatches of four
        for one, two in zip(results[0][0], gradients, strict=True):
            for name in one:
                torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-10, msg=name)
        for name, weight in results[0][1].items():
            torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-7, msg=name)


def test_first_ratio_is_one(make: Make) -> None:
    """Catches: old log-probabilities from the sampler, or from a forward pass in another mode, type or temperature."""
    trainer = make(temperature=0.7, clip_range=1e-9)
    metrics = trainer.step()
    assert metrics["ppo/first_ratio_error"] < 1e-12
    assert metrics["ppo/clipfrac"] == 0.0
    assert metrics["ppo/approx_kl"] < 1e-24
    assert metrics["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-12)


def test_nothing_moves_at_learning_rate_zero(make: Make) -> None:
    """Catches: ratios that drift from 1 without a change of weights (rows mixed up between rollout and optimiser), and an
    optimiser that changes weights by anything but its step size."""
    trainer = make(learning_rate=0.0, num_ppo_epochs=2, minibatch_size=4, total_episodes=24)
    before = weights(trainer.models)
    for _ in range(3):
        metrics = trainer.step()
        assert metrics["ppo/clipfrac"] == 0.0 and metrics["ppo/value_clipfrac"] == 0.0
        assert metrics["ppo/approx_kl"] < 1e-24 and metrics["ppo/ratio_max"] == pytest.approx(1.0, abs=1e-12)
        assert metrics["ppo/grad_norm"] > 0 and metrics["ppo/value_grad_norm"] > 0
    assert_same_bytes(weights(trainer.models), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_of_a_fresh_policy_is_exactly_zero(family: str, make: Make) -> None:
    """Catches: a reference that is not the SFT policy, e.g. a base model without the merged SFT adapter, or another type."""
    trainer = make(family, fresh=True)
    rollout, metrics = trainer.collect()
    assert metrics["objective/kl"] == 0.0 and metrics["objective/kl_k3"] == 0.0
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    assert metrics["objective/rlhf_reward"] == metrics["objective/score"]


def test_training_changes_policy_and_value_and_nothing_else(make: Make) -> None:
    """Catches: a reference, base or reward model that trains along, a parameter that the optimiser forgot, and a merge that
    is undone by subtraction."""
    trainer = make(fresh=True)
    models, batch = trainer.models, fixed_sequences()

    def frozen_answers() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            reference = forward.token_logprobs(models, "reference", batch, 1.0)
            return reference, forward.sequence_scores(models, batch)

    before = {n: t.clone() for n, t in models.state_dict().items()}
    answers = frozen_answers()
    with torch.no_grad():
        own = forward.token_logprobs(models, "policy", batch, 1.0)
    assert torch.equal(own, answers[0])
    for _ in range(2):  # a fresh A gets its first gradient once B has moved
        trainer.step()
    for one, two in zip(answers, frozen_answers(), strict=True):
        assert torch.equal(one, two)
    with torch.no_grad():
        own = forward.token_logprobs(models, "policy", batch, 1.0)
    assert not torch.equal(own, answers[0])
    changed = {n.removeprefix("peft.") for n, t in models.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == set(weights(models))


def test_stale_log_probabilities_are_refused(make: Make) -> None:
    """Catches: the run-time guard compared nothing, or only after the first optimiser step."""
    trainer = make()
    rollout, _ = trainer.collect()
    zeros = torch.zeros_like(rollout.logprobs)
    before = weights(trainer.models)
    stale = dataclasses.replace(rollout, logprobs=rollout.logprobs - 1e-3 * rollout.mask)
    with pytest.raises(RuntimeError, match="first probability ratio"):
        trainer.optimise(stale, zeros, rollout.values)
    assert_same_bytes(weights(trainer.models), before)
    trainer.optimizer.zero_grad()
    trainer.optimise(rollout, zeros, rollout.values)


def test_every_pass_over_the_prompts_is_another_permutation(make: Make) -> None:
    """Catches: prompts left out or repeated within a pass, one order for all passes, and an order that depends on history."""
    trainer = make(rollout_batch_size=4, minibatch_size=4, total_episodes=48)
    rows = [row for update in range(12) for row in trainer.prompt_rows(update)]  # 8 passes over 6 prompts
    passes = [tuple(rows[i : i + 6]) for i in range(0, 48, 6)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert len(set(passes)) > 5
    assert trainer.prompt_rows(3) == rows[12:16]
    other = make(rollout_batch_size=4, minibatch_size=4, total_episodes=48, seed=5, folder="other")
    assert [row for update in range(12) for row in other.prompt_rows(update)] == rows
    other.config.seed = 1
    assert [row for update in range(12) for row in other.prompt_rows(update)] != rows


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
    trainer.reward = share  # type: ignore[assignment]
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
        trainer.optimise(rollout, advantages, returns)
    assert_same_bytes(weights(trainer.models), before)


# ---- save and resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
def test_a_resumed_run_ends_in_the_same_bytes(optim: str, make: Make) -> None:
    """Catches: anything a checkpoint forgets: weights, heads, moments (8-bit ones too), the schedule, the update count, or a
    random draw that depends on how often a generator was used before."""
    # Rank 128 on width 32 makes 4096 elements: enough for 8-bit states.
    options = {"optim": optim, "dtype": "float32", "lora_r": 128, "lora_alpha": 16, "learning_rate": 1e-3}
    straight = make(folder="straight", **options)
    figures = [straight.step() for _ in range(4)]
    types = {t.dtype for s in straight.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)}
    assert (torch.uint8 in types) == (optim == "adamw_8bit")

    first = make(folder="broken", **options)
    for _ in range(2):
        first.step()
    first.save()
    second = make(
        folder="broken", seed=99, **options
    )  # its fresh adapters are others: all must come from the checkpoint
    assert second.resume() == 2
    again = [second.step() for _ in range(2)]
    assert_same_bytes(weights(second.models), weights(straight.models))
    for one, two in zip(figures[2:], again, strict=True):
        timeless = [n for n in one if not n.startswith("time/") and n != "rollout/tokens_per_second"]
        assert [n for n in timeless if one[n] != two[n]] == []


def test_resuming_takes_back_log_lines_after_the_checkpoint(make: Make) -> None:
    """Catches: updates that were run twice, before and after a crash, and so appear twice in the report."""
    trainer = make()
    trainer.step()
    trainer.save()
    trainer.step()
    trainer.resume()
    trainer.step()
    lines = (trainer.tracker.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_train_runs_all_updates_and_keeps_the_last_checkpoint(make: Make) -> None:
    """Catches: a last update that is not saved because it falls between two checkpoints."""
    trainer = make(total_episodes=24, save_steps=2)
    trainer.train()
    assert trainer.updates_done == 3
    assert sorted(p.name for p in trainer.folder.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_every_documented_metric_is_logged_and_no_other(make: Make) -> None:
    """Catches: a figure that was renamed in one place, dropped, or added without saying what it means."""
    trainer = make(minibatch_size=4, num_logged_samples=3)
    trainer.step()
    (line,) = (trainer.tracker.run_dir / "metrics.jsonl").read_text().splitlines()
    logged = json.loads(line)
    assert logged.keys() - {"step", "time"} == METRICS.keys() | {"episodes"}
    assert logged["episodes"] == 8 and logged["step"] == 1
    assert all(isinstance(value, (int, float)) for value in logged.values())
    samples = [json.loads(x) for x in (trainer.tracker.run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and samples[0].keys() == {"step", "prompt", "response", "score", "kl"}
