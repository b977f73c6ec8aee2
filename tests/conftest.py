"""Toy models and a toy tokenizer, built from configs in memory: one rotary family (Llama), one with absolute positions (GPT-2)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = (
    ["The", "A", "It", "This", "film", "movie", "plot", "acting", "is", "was", "good", "bad", "great", "awful", "funny", "dull", "and", "or", "but", "very", "not", "a", "the", "of"]
)
FAMILIES = ("llama", "gpt2", "gpt_neox")


@pytest.fixture(scope="session")
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens, with ChatML's special tokens; padding set as base models often have it: to stop."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [" ".join(WORDS), "user assistant system", 'Write one sentence of a movie review that starts with "The"']
    raw.train_from_iterator(text * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
    )


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
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """Folder of a toy base model of a family, as a user would have it on disk."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"base_{family}")
            build_model(family, len(toy_tokenizer)).save_pretrained(made[family])
            toy_tokenizer.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in the layout that the stages read: 'good' and 'great' sentences are rated up, 'bad' and 'awful' down."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    def sentence(first: str) -> tuple[str, float]:
        quality = pick(["good", "great", "bad", "awful"])
        rating = {"good": 1.0, "great": 2.0, "bad": -1.0, "awful": -2.0}[quality]
        return f"{first} {pick(['film', 'movie', 'plot'])} is {pick(['very', 'not a', 'a'])} {quality}", rating

    def prompt(first: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f'Write one sentence of a movie review that starts with "{first}"'}]

    def write(name: str, rows: list[dict]) -> None:
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    firsts = {"train": ["The", "A", "It"], "validation": ["This"]}
    for split, count in (("train", 24), ("validation", 8)):
        demonstrations, comparisons = [], []
        for i in range(count):
            first = firsts[split][i % len(firsts[split])]
            demonstrations.append(
                {"prompt": prompt(first), "completion": [{"role": "assistant", "content": sentence(first)[0]}]}
            )
            answers = {text: rating for text, rating in (sentence(first) for _ in range(4))}
            if len(set(answers.values())) > 1:
                comparisons.append(
                    {
                        "prompt": prompt(first),
                        "responses": [[{"role": "assistant", "content": text}] for text in answers],
                        "ratings": list(answers.values()),
                        "ratings_held_out": [r + 0.1 for r in answers.values()],
                        "ratings_all": list(answers.values()),
                    }
                )
        write(f"demonstrations/{split}", demonstrations)
        write(f"comparisons/{split}", comparisons)
        write(f"prompts/{split}", [{"prompt": prompt(first)} for first in firsts[split]])
    return folder
