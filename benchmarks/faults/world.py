"""The toy world: a small language, a base model that has read it, and rewards and judges in Python.

Sentences such as `the film is very good and the plot is dull .` are rated by their adjectives. The base model has read prompts
with answers that go on and on; supervised fine-tuning teaches it to answer with one sentence and to stop.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOUNS = [
    "film",
    "plot",
    "acting",
    "music",
    "story",
    "ending",
    "script",
    "cast",
    "scene",
    "camera",
    "dialogue",
    "humour",
]
GOOD, BAD = ["good", "great", "funny", "moving", "clever"], ["bad", "awful", "dull", "silly", "slow"]
ADVERBS = ["very", "rather", "quite", "truly"]
OTHERS = ["the", "is", "and", "but", ".", "user", "assistant", "system", "review", "of"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*SPECIAL, *NOUNS, *GOOD, *BAD, *ADVERBS, *OTHERS]
#: Shapes of the base model by name.
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "wide": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


# ---- judges and rewards, by the names that PPO's options `gold` and `reward` take ------------------------------------


def judge(responses: Sequence[str]) -> list[float]:
    """Share of good less share of bad adjectives among the words."""
    return [_mood(text.split()) for text in responses]


def strict_judge(responses: Sequence[str]) -> list[float]:
    """The same, less the share of words that were said before."""
    return [_mood(words) - _repeated(words) for words in (text.split() for text in responses)]


def mood(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """The judge's own taste as a reward, five times as large."""
    return [5 * score for score in judge(responses)]


def opposite_mood(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """The same with its sign flipped."""
    return [-5 * score for score in judge(responses)]


def constant(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """Tells nothing apart."""
    return [1.0 for _ in responses]


def length(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """Pays for every word."""
    return [0.2 * len(text.split()) for text in responses]


def praise(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """Pays for every good adjective, however often it comes."""
    return [float(sum(word in GOOD for word in text.split())) for text in responses]


def broken(prompts: Any, responses: Sequence[str], **columns: Any) -> list[float]:
    """Divides by what may be 0."""
    return [float("nan") for _ in responses]


def _mood(words: list[str]) -> float:
    return sum((word in GOOD) - (word in BAD) for word in words) / max(len(words), 1)


def _repeated(words: list[str]) -> float:
    return 1 - len(set(words)) / max(len(words), 1)


# ---- data and base model ---------------------------------------------------------------------------------------------


def sentence(draw: random.Random, noun: str) -> str:
    """One sentence about a noun, of one to three clauses."""
    clauses = []
    for name in [noun, *draw.sample(NOUNS, draw.choice([0, 1, 1, 2]))]:
        adjective = draw.choice(GOOD + BAD)
        clauses.append(f"the {name} is {draw.choice([*ADVERBS, ''])} {adjective}".replace("  ", " "))
    return f" {draw.choice(['and', 'but'])} ".join(clauses) + " ."


def write_data(folder: Path, *, seed: int) -> Path:
    """Write prompts, demonstrations and comparisons, training and held-out: a function of the seed."""
    draw = random.Random(seed)
    pairs = [(a, b) for a in NOUNS for b in NOUNS if a != b]
    endings = ["", " and the {b}", " and the {b} of the {a}"]  # prompts of several lengths
    prompts = [f"review of the {a}" + endings[i % 3].format(a=a, b=b) for i, (a, b) in enumerate(pairs)]
    prompts = sorted(set(prompts))
    draw.shuffle(prompts)
    for split, chosen in (("train", prompts[:-20]), ("validation", prompts[-20:])):
        demonstrations, comparisons = [], []
        for text in chosen * 4:
            noun = text.split()[3]
            demonstrations.append({"prompt": _user(text), "completion": _assistant(sentence(draw, noun))})
            answers = list(dict.fromkeys(sentence(draw, noun) for _ in range(4)))
            ratings = [round(10 * _mood(answer.split()), 3) for answer in answers]
            if len(set(ratings)) > 1:
                comparisons.append(
                    {"prompt": _user(text), "responses": [_assistant(a) for a in answers], "ratings": ratings}
                )
        _write(folder / "demonstrations" / f"{split}.jsonl", demonstrations)
        _write(folder / "comparisons" / f"{split}.jsonl", comparisons)
        _write(folder / "prompts" / f"{split}.jsonl", [{"prompt": _user(text)} for text in chosen])
    return folder


def write_base(folder: Path, *, size: str, seed: int, steps: int) -> Path:
    """A base model that has read prompts with endless answers, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(WORDS)}
    config = LlamaConfig(**SIZES[size], **ids, max_position_embeddings=128, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw = random.Random(seed)
    number = {word: i for i, word in enumerate(WORDS)}
    for _ in range(steps):
        rows = torch.tensor([[number[word] for word in _endless(draw)[:40]] for _ in range(16)])
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), bos_token="<|im_start|>", **special).save_pretrained(folder)
    return folder


def _endless(draw: random.Random) -> list[str]:
    """Words of a prompt as the chat template writes it, and of more sentences than one."""
    noun = draw.choice(NOUNS)
    prompt = f"<|im_start|> user review of the {noun} <|im_end|> <|im_start|> assistant".split()
    return prompt + " ".join(sentence(draw, noun) for _ in range(8)).split()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<|endoftext|>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return raw


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
