"""PPO a second time, as plainly as possible: loops over Python floats, one row at a time, no padding, no masks, no peft.

Nothing here comes from rlhf. What takes and gives numbers works on floats and on torch scalars alike, so the same formulas
give the figures (floats) and, through `backward`, the gradients. Formulas: Schulman et al. 2015 (GAE) and 2017 (PPO).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Rows = list[list[float]]
#: Module path -> (A, B) of its adapter.
Lora = dict[str, tuple[Tensor, Tensor]]

# ---- arithmetic -----------------------------------------------------------------------------------------------------


def token_rewards(logprobs: list[float], ref_logprobs: list[float], score: float, kl_coef: float) -> list[float]:
    """The KL penalty of each token, and the score on the last one."""
    rewards = [-kl_coef * (a - b) for a, b in zip(logprobs, ref_logprobs, strict=True)]
    rewards[-1] += score
    return rewards


def advantages(values: list[float], rewards: list[float], gamma: float, lam: float) -> list[float]:
    """GAE as the double sum of its definition; the value after the last token is 0."""
    n = len(values)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]


def whiten(rows: Rows) -> Rows:
    """Zero mean and unit population variance over all tokens of all rows together."""
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat))
    return [[(x - mean) / std for x in row] for row in rows]


def policy_loss(new: Any, old: float, advantage: float, clip: float) -> Any:
    """One token's clipped surrogate."""
    ratio = math.e ** (new - old)
    held = min(max(ratio, 1 - clip), 1 + clip)
    return max(-advantage * ratio, -advantage * held)


def value_loss(new: Any, old: float, target: float, clip: float) -> Any:
    """One token's clipped value error."""
    held = min(max(new, old - clip), old + clip)
    return 0.5 * max((new - target) ** 2, (held - target) ** 2)


def mean_over_tokens(rows: list[list[Any]]) -> Any:
    """Every token counts alike, whatever the length of its row."""
    return sum(x for row in rows for x in row) / sum(len(row) for row in rows)


# ---- the model ------------------------------------------------------------------------------------------------------


def merged_weights(model: PreTrainedModel, lora: Lora, scale: float) -> dict[str, Tensor]:
    """W + scale B A of each adapted layer, as a function of A and B."""
    weights = {}
    for path, (a, b) in lora.items():
        module = model.get_submodule(path)
        delta = scale * (b @ a)
        weights[f"{path}.weight"] = module.weight + (delta.T if isinstance(module, Conv1D) else delta)
    return weights


def run(model: PreTrainedModel, weights: dict[str, Tensor], row: list[int]) -> tuple[Tensor, Tensor]:
    """Logits and last hidden states of one row alone, without padding: (T, V), (T, d)."""
    inputs = {"input_ids": torch.tensor([row]), "use_cache": False, "output_hidden_states": True}
    output = functional_call(model, weights, (), inputs)
    return output.logits[0], output.hidden_states[-1][0]


def logprobs(logits: Tensor, prompt: list[int], response: list[int], temperature: float) -> list[Tensor]:
    """Log-probability of each response token, from the position before it."""
    table = (logits / temperature).log_softmax(-1)
    first = len(prompt)
    return [table[first + t - 1, token] for t, token in enumerate(response)]


def values(hidden: Tensor, prompt: list[int], response: list[int], weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The value read at the position before each response token."""
    first = len(prompt)
    return [hidden[first + t - 1] @ weight + bias for t in range(len(response))]


# ---- the optimiser --------------------------------------------------------------------------------------------------


def clip(gradients: dict[str, Tensor], limit: float) -> tuple[dict[str, Tensor], float]:
    """Gradients scaled down to a joint norm of `limit`, and the norm they had."""
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    factor = min(1.0, limit / (norm + 1e-6))  # torch adds this
    return {name: g * factor for name, g in gradients.items()}, norm


class AdamW:
    """Kingma & Ba 2015, algorithm 1, with Loshchilov & Hutter's decoupled decay."""

    def __init__(self, lr: float, beta1: float, beta2: float, epsilon: float, decay: float) -> None:
        self.lr, self.beta1, self.beta2, self.epsilon, self.decay = lr, beta1, beta2, epsilon, decay
        self.steps = 0
        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}

    def step(self, parameters: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """Changes the parameters in place."""
        self.steps += 1
        for name, g in gradients.items():
            p = parameters[name]
            m = self.m[name] = self.beta1 * self.m.get(name, torch.zeros_like(p)) + (1 - self.beta1) * g
            v = self.v[name] = self.beta2 * self.v.get(name, torch.zeros_like(p)) + (1 - self.beta2) * g**2
            m_hat = m / (1 - self.beta1**self.steps)
            v_hat = v / (1 - self.beta2**self.steps)
            p.data -= self.lr * (m_hat / (v_hat.sqrt() + self.epsilon) + self.decay * p.data)
