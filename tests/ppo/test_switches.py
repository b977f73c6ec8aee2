"""The switches of the PPO recipes: each does what it says, and is carried through a resumed run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from ppo.conftest import Make
from ppo.test_trainer import weights
from test_models import VOCAB, ppo_config
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.ppo import functional as F
from rlhf.ppo.draws import prompt_rows, text_rows
from rlhf.ppo.rollout import Penalties
from rlhf.ppo.state import MAX_ROLL_BACKS, Order
from rlhf.ppo.trainer import KLLimitPassed, PPOTrainer
from rlhf.run import checkpoint

FAST = {"learning_rate": 2e-2, "lr_scheduler_type": "constant_with_warmup"}


def policy_weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.models.trainable("policy").items()}


def value_weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.models.trainable("value").items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


# ---- adaptive KL ----------------------------------------------------------------------------------------------------


def test_kl_coefficient_follows_the_clipped_error_of_the_kl() -> None:
    """Catches: an unclipped error, a horizon counted in updates instead of episodes, a sign the wrong way round."""
    settings = {"target": 6.0, "horizon": 10_000, "episodes": 500}
    assert F.adapted_kl_coef(0.15, 6.0, **settings) == 0.15
    assert F.adapted_kl_coef(0.15, 6.6, **settings) == pytest.approx(0.15 * (1 + 0.1 * 0.05))
    assert F.adapted_kl_coef(0.15, 60.0, **settings) == pytest.approx(0.15 * 1.01)
    assert F.adapted_kl_coef(0.15, 0.0, **settings) == pytest.approx(0.15 * 0.99)


def test_adapted_coefficient_is_used_logged_and_restored(make: Make) -> None:
    """Catches: a controller that only logs, one that adapts before it is used, one that a resumed run starts afresh."""
    trainer = make(fresh=True, kl_coef=0.2, kl_target=5.0, kl_horizon=100)
    first, second = trainer.step(), trainer.step()
    assert first["objective/kl"] == 0 and first["objective/kl_coef"] == 0.2
    expected = 0.2 * (1 - 0.2 * trainer.config.rollout_batch_size / 100)
    assert second["objective/kl_coef"] == pytest.approx(expected, rel=1e-12)
    assert second["objective/rlhf_reward"] == pytest.approx(
        second["objective/score"] - expected * second["objective/kl"], abs=1e-9
    )
    trainer.state.save()
    again = make(fresh=True, kl_coef=0.2, kl_target=5.0, kl_horizon=100)
    again.state.resume()
    assert again.state.kl_coef == trainer.state.kl_coef != 0.2


# ---- rewards --------------------------------------------------------------------------------------------------------


def test_whitened_rewards_have_unit_spread_and_the_mean_they_had() -> None:
    """Catches: a mean that is shifted away, padding that counts, and a division by a spread of zero."""
    rewards = torch.tensor([[1.0, 3.0, 77.0], [5.0, 77.0, 77.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    white = F.whiten_rewards(rewards, mask)
    assert white[mask].tolist() == pytest.approx([3 - 1.5**0.5, 3.0, 3 + 1.5**0.5])
    assert white[~mask].tolist() == [0.0] * 3
    flat = torch.full((2, 3), 0.1)
    assert F.whiten_rewards(flat, mask)[mask].tolist() == pytest.approx([0.1] * 3)


def test_whitening_of_rewards_reaches_the_advantages(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an option that nobody reads, and whitening after the advantages were made."""
    seen: list[Tensor] = []
    gae = F.gae

    def spy(values: Tensor, rewards: Tensor, mask: Tensor, **kwargs: float) -> tuple[Tensor, Tensor]:
        seen.append(rewards[mask])
        return gae(values, rewards, mask, **kwargs)

    monkeypatch.setattr("rlhf.ppo.credit.F.gae", spy)
    for whiten in (False, True):
        make(folder=str(whiten), whiten_rewards=whiten, rollout_batch_size=8, total_episodes=16).step()
    plain, white = seen
    assert float(white.std(correction=0)) == pytest.approx(1.0, abs=1e-6)
    assert float(white.mean()) == pytest.approx(float(plain.mean()), abs=1e-6)
    assert float(plain.std(correction=0)) != pytest.approx(1.0, abs=1e-2)


def test_clipped_scores_are_clipped_before_the_penalties() -> None:
    """Catches: a clip that swallows the penalty for a missing stop token."""
    penalties = Penalties(clip=2.0, missing_eos=1.0)
    raw = torch.tensor([5.0, -5.0, 0.5])
    assert penalties.apply(raw, torch.tensor([False, True, True]), torch.tensor([4, 4, 4])).tolist() == [1.0, -2.0, 0.5]


def test_reward_clip_is_what_the_rollout_is_scored_with(make: Make) -> None:
    """Catches: an option that nobody reads, and raw scores that are logged clipped."""
    trainer = make(reward_clip=0.25, missing_eos_penalty=0.0)
    trainer.environment.reward = lambda responses: (torch.linspace(-9, 9, len(responses.texts)), {})  # type: ignore[assignment]
    rollout, _ = trainer.collect()
    assert float(rollout.raw_scores.max()) == 9
    assert sorted(set(rollout.scores.tolist())) == [-0.25, 0.25]


# ---- who is trained, how long ---------------------------------------------------------------------------------------


def test_value_warmup_leaves_the_policy_alone(make: Make) -> None:
    """Catches: a warm-up that trains both, one that never ends, one that moves the policy by weight decay or momentum."""
    trainer = make(value_warmup_updates=1, total_episodes=24, **FAST)
    policy, value = policy_weights(trainer), value_weights(trainer)
    metrics = trainer.step()
    assert same(policy, policy_weights(trainer)) and not same(value, value_weights(trainer))
    assert metrics["ppo/grad_norm"] == 0 and metrics["ppo/value_grad_norm"] > 0 and metrics["ppo/value_loss"] > 0
    trainer.step()
    assert not same(policy, policy_weights(trainer))


def test_the_first_step_of_a_warmup_changes_the_weights(make: Make) -> None:
    """Catches: a warm-up from 0, with which the first rollout is sampled, scored and thrown away."""
    trainer = make(warmup_steps=4, **FAST)
    policy, value = policy_weights(trainer), value_weights(trainer)
    assert [group["lr"] for group in trainer.state.optimizer.param_groups] == pytest.approx([2e-3, 2e-3])
    metrics = trainer.step()
    assert not same(policy, policy_weights(trainer)) and not same(value, value_weights(trainer))
    assert metrics["ppo/lr"] == pytest.approx(6.5e-3)


def test_updates_of_a_rollout_end_early_and_the_schedule_goes_on(make: Make) -> None:
    """Catches: a limit that is checked after the step it should prevent, and a schedule that falls behind."""
    options = {"num_ppo_epochs": 3, "rollout_batch_size": 8, "minibatch_size": 4, "total_episodes": 16, **FAST}
    counts = {}
    for limit in (None, 1e-9):
        trainer = make(folder=str(limit), max_approx_kl=limit, **options)
        steps = []
        trainer.state.optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        metrics = trainer.step()
        counts[limit] = len(steps), metrics["ppo/early_stop"], trainer.state.scheduler.last_epoch
    assert counts == {None: (6, 0.0, 6), 1e-9: (1, 1.0, 6)}


def test_each_prompt_gets_its_number_of_responses(make: Make) -> None:
    """Catches: prompts skipped or repeated too often when several responses are drawn from each."""
    trainer = make(num_responses_per_prompt=4, rollout_batch_size=8, total_episodes=24, minibatch_size=8)
    rows = [prompt_rows(trainer.config, 6, update) for update in range(3)]
    assert all(row[:4] == row[:1] * 4 and row[4:] == row[4:5] * 4 for row in rows)
    assert sorted(row[i] for row in rows for i in (0, 4)) == list(range(6)), "one pass over six prompts"
    rollout, _ = trainer.collect()
    assert len({tuple(r[m].tolist()) for r, m in zip(rollout.responses[:4], rollout.mask[:4], strict=True)}) > 1


# ---- PPO-ptx --------------------------------------------------------------------------------------------------------

TEXTS = [([5, 6, 7], [20, 21, 2]), ([5, 8], [22, 2]), ([9], [23, 24, 25, 26, 2])]


def test_texts_add_their_gradient_to_the_same_update(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a step of its own for the texts, a loss on their prompts, a mean over texts instead of tokens, a lost weight."""
    gradients = {}
    for coef in (0.0, 3.0):
        trainer = make(folder=str(coef), ptx_coef=coef, ptx_ratio=0.25, rollout_batch_size=8, minibatch_size=8)
        trainer.texts = TEXTS
        steps: list[int] = []
        trainer.state.optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        update = trainer._update

        def record(totals: object, trainer: PPOTrainer = trainer, update: object = update, coef: float = coef) -> None:
            gradients[coef] = {n: p.grad.clone() for n, p in trainer.models.trainable("policy").items()}
            update(totals)  # type: ignore[operator]

        monkeypatch.setattr(trainer, "_update", record)
        metrics = trainer.step()
        assert len(steps) == 1
    fresh = make(folder="oracle")
    chosen = text_rows(trainer.config, len(TEXTS), 0)
    with fresh.models.role("policy"):
        nll = torch.tensor(0.0, dtype=torch.float64)
        for i in chosen:
            prompt, answer = TEXTS[i]
            logits = fresh.models.causal(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            nll = nll + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        nll = nll / sum(len(TEXTS[i][1]) for i in chosen)
        nll.backward()
    assert metrics["ppo/ptx_loss"] == pytest.approx(float(nll), abs=1e-9)
    for name, parameter in fresh.models.trainable("policy").items():
        expected = gradients[0.0][name] + 3.0 * parameter.grad
        torch.testing.assert_close(gradients[3.0][name], expected, rtol=0, atol=1e-9)


# ---- the limit of the KL --------------------------------------------------------------------------------------------


def test_run_stops_at_the_kl_limit_and_names_the_last_good_checkpoint(make: Make) -> None:
    """Catches: a run that goes on past its limit, and one that leaves only the checkpoint of the broken policy."""
    trainer = make(fresh=True, max_kl=1e-6, total_episodes=24, save_steps=1, **FAST)
    with pytest.raises(UserError, match=r"nats a response after update 1, above max_kl 1e-06; .*checkpoint-0"):
        trainer.train()
    assert checkpoint.last_before(trainer.outputs.folder, 1) == trainer.outputs.folder / "checkpoint-0"


def test_rolling_back_restores_the_last_good_state_with_half_the_step_size(make: Make, tmp_path: Path) -> None:
    """Catches: rolling back to the very weights that passed the limit, a step size that is not halved, or only once."""
    trainer = make(fresh=True, max_kl=1e-6, on_max_kl="roll_back", total_episodes=24, save_steps=1, **FAST)
    start = weights(trainer.models)
    trainer.state.save()
    trainer.step()
    trainer.state.save()
    with pytest.raises(KLLimitPassed) as passed:
        trainer.step()
    assert trainer.follow(Order(action="roll_back", reason=str(passed.value))) == -1
    assert trainer.state.updates_done == 0 and same(start, weights(trainer.models))
    assert [group["lr"] for group in trainer.state.optimizer.param_groups] == pytest.approx([1e-2, 1e-2])
    assert [p.name for p in trainer.outputs.folder.iterdir()] == ["checkpoint-0"]
    again = make(fresh=True, max_kl=1e-6, on_max_kl="roll_back", total_episodes=24, save_steps=1, **FAST)
    again.state.resume()
    assert again.state.roll_backs == 1 and again.state.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)
    with pytest.raises(UserError, match="above max_kl"):
        again.train()
    assert again.state.roll_backs == MAX_ROLL_BACKS
    assert again.state.optimizer.param_groups[0]["lr"] == pytest.approx(2e-2 / 2**MAX_ROLL_BACKS)


# ---- mean of the weights --------------------------------------------------------------------------------------------


def test_averaged_policy_is_the_running_mean_and_is_put_back(make: Make) -> None:
    """Catches: a mean of the wrong weights, one that training moves along, and weights that are not restored."""
    trainer = make(ema_decay=0.9, rollout_batch_size=8, minibatch_size=8, total_episodes=24, **FAST)
    before = policy_weights(trainer)
    trainer.step()
    after = policy_weights(trainer)
    with trainer.state.averaged_policy():
        inside = policy_weights(trainer)
    assert same(after, policy_weights(trainer)) and not same(before, after)
    for name, mean in inside.items():
        torch.testing.assert_close(mean, 0.9 * before[name] + 0.1 * after[name])
    trainer.state.save()
    again = make(ema_decay=0.9, rollout_batch_size=8, minibatch_size=8, total_episodes=24, **FAST)
    again.state.resume()
    assert same(again.state.average, trainer.state.average)


# ---- where a response ends ------------------------------------------------------------------------------------------


def test_stop_strings_end_responses_even_across_tokens(make: Make, tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches: a string that is looked for in single tokens only, text after it, and a response that counts as cut off."""
    trainer = make("llama", stop_strings=["an"], rollout_batch_size=8, response_length=40, total_episodes=16)
    word = {tokenizer.convert_tokens_to_ids(letter): letter for letter in "abn"}
    # The toy's vocabulary is smaller than the tokenizer's: its tokens are spelt as these letters.
    spelt = dict(zip((20, 21, 22), word, strict=True))

    class Spelling:
        def __call__(self, ids: Tensor, scores: None) -> Tensor:
            assert trainer.sampling.stop_strings is not None
            translated = torch.tensor([[spelt.get(int(i), next(iter(word))) for i in row] for row in ids])
            return criteria(translated, scores)

    criteria = trainer.sampling.stop_strings
    assert criteria is not None
    trainer.sampling = dataclasses.replace(trainer.sampling, stop_token_ids=[VOCAB], stop_strings=Spelling())  # type: ignore[arg-type]
    rollout, _ = trainer.collect()
    texts = [
        "".join(word[spelt.get(int(i), next(iter(word)))] for i in row[m])
        for row, m in zip(rollout.responses, rollout.mask, strict=True)
    ]
    assert any(rollout.stopped) and not all(rollout.stopped)
    for text, stopped in zip(texts, rollout.stopped.tolist(), strict=True):
        assert ("an" in text) == stopped and (not stopped or text.index("an") == len(text) - 2)


# ---- the KL over the whole vocabulary -------------------------------------------------------------------------------


@torch.no_grad()
def test_full_kl_is_that_of_the_two_distributions(make: Make) -> None:
    """Catches: distributions at the wrong position, the wrong direction, or another temperature than the sampler's."""
    trainer = make("llama", temperature=0.7)
    rollout, metrics = trainer.collect()
    total = 0.0
    for i in range(len(rollout)):
        prompt = rollout.prompts[i][rollout.prompt_mask[i]]
        response = rollout.responses[i][rollout.mask[i]]
        ids = torch.cat([prompt, response])[None]
        logits = {}
        for role in ("policy", "reference"):
            with trainer.models.role(role):
                logits[role] = trainer.models.causal(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / 0.7
        policy = torch.distributions.Categorical(logits=logits["policy"])
        reference = torch.distributions.Categorical(logits=logits["reference"])
        total += float(torch.distributions.kl_divergence(policy, reference).sum())
    assert metrics["objective/kl_full"] == pytest.approx(total / len(rollout), rel=1e-4)
    assert total > 0.1


def test_kl_is_summed_over_a_response_and_averaged_over_responses(make: Make) -> None:
    """Catches: a mean over tokens, padding that counts, a sign the wrong way round."""
    rollout, metrics = make("llama").collect()
    sums = [
        sum(a - b for a, b in zip(new[m].tolist(), ref[m].tolist(), strict=True))
        for new, ref, m in zip(rollout.logprobs, rollout.ref_logprobs, rollout.mask, strict=True)
    ]
    assert metrics["objective/kl"] == pytest.approx(sum(sums) / len(sums), abs=1e-9)
    assert rollout.mask.sum() > len(rollout)


# ---- diagnostics ----------------------------------------------------------------------------------------------------


def test_approx_kl_and_ratios_are_those_of_the_tokens(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: padding in a mean or a maximum, the KL of the other direction, figures of the last microbatch only."""
    logs: list[float] = []
    loss = F.policy_loss

    def spy(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **kwargs: float) -> tuple[Tensor, Tensor]:
        logs.extend((new - old)[mask].tolist())
        return loss(new, old, advantages, mask, **kwargs)

    monkeypatch.setattr("rlhf.ppo.gradients.F.policy_loss", spy)
    metrics = make(num_ppo_epochs=3, rollout_batch_size=8, minibatch_size=4, **FAST).step()
    ratios = [math.exp(x) for x in logs]
    assert max(ratios) > 1.05
    assert metrics["ppo/ratio_max"] == pytest.approx(max(ratios), abs=1e-9)
    assert metrics["ppo/ratio_mean"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-9)
    exact = sum(r - 1 - x for r, x in zip(ratios, logs, strict=True)) / len(logs)
    assert metrics["ppo/approx_kl"] == pytest.approx(exact, abs=1e-9) and exact > 1e-4


def test_first_ratio_is_one_in_bf16_to_the_last_bit(make: Make) -> None:
    """Catches: old log-probabilities of other microbatches: in bf16 other neighbours round differently."""
    trainer = make("llama", dtype="bfloat16", rollout_batch_size=8, minibatch_size=4, microbatch_size=2, **FAST)
    for _ in range(2):
        assert trainer.step()["ppo/first_ratio_error"] == 0.0


# ---- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_responses_per_prompt": 3, "rollout_batch_size": 8}, "must be a multiple of num_responses_per_prompt"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target needs a kl_coef above 0"),
        ({"ptx_coef": 1.0, "ptx_ratio": 0.01}, "mixes no text"),
        ({"value_model": "shared_trunk", "value_warmup_updates": 1}, "needs value_model adapter"),
        ({"max_kl": 0.0}, "max_kl must be above 0"),
        ({"snapshot_steps": 0}, "snapshot_steps must be at least 1"),
        ({"snapshot_steps": 2, "finetuning": "full"}, "needs finetuning lora"),
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1"),
        ({"whiten_rewards": True, "rollout_batch_size": 4}, "whiten_rewards needs a rollout_batch_size of at least 8"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, float], complaint: str) -> None:
    """Catches: a run that starts and then divides by zero, or averages nothing."""
    with pytest.raises(UserError, match=complaint):
        dataclasses.replace(
            ppo_config(), **{"minibatch_size": 4, "microbatch_size": 4, "total_episodes": 24, **options}
        )
