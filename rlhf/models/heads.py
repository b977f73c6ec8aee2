"""A model's backbone and heads: logits from hidden states, and heads to one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.base.errors import UserError

#: Results of `has_plain_head`.
_PLAIN_HEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def backbone(causal: PreTrainedModel) -> nn.Module:
    """Return the transformer below the language-model head, ending in its last norm."""
    return getattr(causal, causal.base_model_prefix)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Return True if a causal model's logits are just its output embedding of the last hidden states.

    Scales and soft caps make it False. A short pass decides, once for each model.
    """
    if model not in _PLAIN_HEAD:
        # From the middle of the vocabulary: the embedding of a padding token may be all zeros.
        ids = torch.linspace(0.25, 0.75, 8, device=model.device).mul(model.config.get_text_config().vocab_size).long()
        states: list[Tensor] = []

        def enlarge(module: nn.Module, args: Any, output: Any) -> None:
            output.last_hidden_state = 100 * output.last_hidden_state  # a soft cap leaves small logits as they are
            states.append(output.last_hidden_state)

        hook = backbone(model).register_forward_hook(enlarge)
        try:
            logits = model(input_ids=ids[None], use_cache=False).logits.float()
        finally:
            hook.remove()
        plain = model.get_output_embeddings()(states[0]).float()
        _PLAIN_HEAD[model] = bool((plain - logits).norm() <= 1e-3 * plain.norm())
    return _PLAIN_HEAD[model]


def states_and_head(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return hidden states (B, T, ...) and the function that maps any of them to logits (..., V).

    Models with a plain head return their last hidden states and that head, so callers can skip tokens; other models
    return full logits and the identity.
    """
    if has_plain_head(model):
        output = backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state, model.get_output_embeddings()
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits, nn.Identity()


def check_plain_head(model: PreTrainedModel) -> None:
    """Raise `UserError` for a model whose head is not plain (`has_plain_head`)."""
    if not has_plain_head(model):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output embedding, which PPO does not support"
        )


class ScalarHead(nn.Linear):
    """A linear head to one number, computed in its own type: autocast would round scores to bf16. It starts at 0."""

    def __init__(self, width: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(width, 1, bias=bias, dtype=dtype)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))
