"""The transformer below the language-model head, and the logits of its states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from rlhf.base.errors import UserError

#: What `has_plain_head` found.
_PLAIN_HEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def backbone(causal: PreTrainedModel) -> nn.Module:
    """The transformer below the language-model head, ending in its last norm."""
    return getattr(causal, causal.base_model_prefix)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a causal model's logits are just its output embedding of the last hidden states: no scale, no soft cap.

    Tried with one short pass, once for each model.
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


def before_head(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """States (B, T, ...), and what makes logits (..., V) of any of them: of a plain head, which need not see all tokens, the
    last hidden states and the head; of others the logits, which stay as they are."""
    if has_plain_head(model):
        output = backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state, model.get_output_embeddings()
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits, nn.Identity()


def check_plain_head(model: PreTrainedModel) -> None:
    """Refuses a model whose logits are more than its output embedding of the last hidden state (soft caps, scales)."""
    if not has_plain_head(model):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output embedding, which PPO does not support"
        )


class ScalarHead(nn.Linear):
    """A linear head to one number that computes in its own type, outside autocast: a score must not be rounded to bf16."""

    def __init__(self, width: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(width, 1, bias=bias, dtype=dtype)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))
