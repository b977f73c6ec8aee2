"""PPO finds an optimum that is known in closed form."""

from __future__ import annotations

import dataclasses

import torch
from ppo.conftest import Make
from test_models import VOCAB
from torch import Tensor

from rlhf.models.roles import Role, SharedModels

PROMPT = [5, 6, 7, 8]
REWARDED = torch.tensor([20, 21, 22])
KL_COEF = 0.25
UPDATES = 60


def responses_table(models: SharedModels, role: Role) -> Tensor:
    """log-probabilities (VOCAB, VOCAB) of all responses of two tokens, without cache, masks or our forward."""
    with models.role(role):
        first = models.causal(input_ids=torch.tensor([PROMPT])).logits[0, -1].double().log_softmax(-1)
        rows = torch.tensor([[*PROMPT, token] for token in range(VOCAB)])
        second = models.causal(input_ids=rows).logits[:, -1].double().log_softmax(-1)
    return first[:, None] + second


def share(tokens: Tensor) -> Tensor:
    """The reward: the share of rewarded tokens in each response (..., 2)."""
    return torch.isin(tokens, REWARDED).double().mean(dim=-1)


def kl(policy: Tensor, other: Tensor) -> Tensor:
    """KL(policy || other) of two tables of log-probabilities, nats."""
    return (policy.exp() * (policy - other)).sum()


def test_policy_reaches_the_optimum_of_reward_and_kl(make: Make) -> None:
    """The optimum is pi* = pi_ref exp(r / kl_coef) / Z, as far as the toy's adapter can express it: that far, its weights
    are trained a second time, on the exact KL to pi* summed over all responses. Catches: a KL penalty of another size, sign
    or reference, a reward that lands elsewhere, a bias of whitening, clipping or baseline: all move where training ends."""
    options = {"dtype": "float32", "response_length": 2, "kl_coef": KL_COEF, "missing_eos_penalty": 0.0, "lam": 1.0}
    sizes = {"rollout_batch_size": 256, "minibatch_size": 128, "microbatch_size": 128, "total_episodes": 256 * UPDATES}
    trainer = make("llama", fresh=True, learning_rate=1e-2, lr_scheduler_type="linear", **options, **sizes)
    trainer.environment.prompts, trainer.environment.rows = [PROMPT], [{}]
    trainer.environment.reward = lambda responses: (share(responses.sequences.responses).float(), {})  # type: ignore[assignment]
    trainer.sampling = dataclasses.replace(trainer.sampling, stop_token_ids=[VOCAB])  # never drawn: always two tokens
    with torch.no_grad():
        reference = responses_table(trainer.models, "reference")
    tokens = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB)).view(VOCAB, VOCAB, 2)
    unnormalised = reference + share(tokens) / KL_COEF
    optimum = unnormalised - unnormalised.logsumexp(dim=(0, 1))

    exact = make("llama", folder="exact", fresh=True, **options).models
    optimizer = torch.optim.Adam(exact.trainable("policy").values(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        kl(responses_table(exact, "policy"), optimum).backward()
        optimizer.step()

    while trainer.state.updates_done < UPDATES:
        trainer.step()
    with torch.no_grad():
        start, best = float(kl(reference, optimum)), float(kl(responses_table(exact, "policy"), optimum))
        reached = float(kl(responses_table(trainer.models, "policy"), optimum))
    print(f"KL to the optimum, nats: {start:.3f} at first, {reached:.4f} by PPO, {best:.4f} by exact gradients")
    assert start > 0.5
    assert reached - best < 0.1 * (start - best)
