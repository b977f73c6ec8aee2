"""Toy models built from configs: one rotary family, one with learned absolute positions, one of the NeoX kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
)

if TYPE_CHECKING:
    from rlhf.models.sampling import Sampled

WORDS = [
    *("The", "A", "It", "This", "film", "movie", "plot", "acting", "is", "was", "good", "bad", "great", "awful"),
    *("funny", "dull", "and", "or", "but", "very", "not", "a", "the", "of"),
]
FAMILIES = ("llama", "gpt2", "gpt_neox")
#: Prompts of several lengths, in a vocabulary of 40.
PROMPTS = [[5, 6, 7], [8], [10, 11, 12, 13, 14], [5, 6], [20, 21, 22, 23], [30, 31, 33], [5], [12, 12, 12]]
#: Families whose logits are more than their head's product, and what says so in their configs.
BENT: dict[str, dict[str, float]] = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
}


def rows(result: Sampled) -> list[list[int]]:
    """The tokens of each response, without padding."""
    return [r[m].tolist() for r, m in zip(result.responses, result.mask, strict=True)]


@dataclass(frozen=True)
class Call:
    """What a command left: its exit code and what it printed."""

    code: object
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of a user's error, the last on stderr. A traceback or another exit code fails the test."""
        lines = self.err.strip().splitlines()
        assert self.code == 2, (self.code, self.err[-3000:])
        assert lines[-1].startswith("error: ") and sum("error" in line.lower() for line in lines) == 1, self.err[-3000:]
        assert "Traceback" not in self.err
        return lines[-1]


def build_model(family: str, vocab_size: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer causal model of a family, with weights large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    common = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "llama":
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            **common,
        )
    elif family == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, **common)
    else:
        config = GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.2,
            **common,
        )
    # Not eager: its softmax is fp32 at most, which turns a float64 mask into -inf and padded rows into NaN.
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()


def build_bent(family: str, vocab_size: int) -> PreTrainedModel:
    """The same of a family of `BENT`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **BENT[family],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()
