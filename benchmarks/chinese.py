"""Vocabulary extension on a real Chinese text: SmolLM2 with its own tokens and with new ones, at equal updates on equal rows.

Measured: tokens per character of held-out answers, held-out loss per character (nats), and whether sampled answers decode to
whole characters. `--prepare FOLDER` only writes the data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, machine

from rlhf.base.errors import run_command
from rlhf.config import RunConfig, SFTConfig, TextConfig, build, read_yaml
from rlhf.data_prep.corpus import CHINESE_REVIEWS, load_text
from rlhf.models.base import load_policy
from rlhf.models.compute import Compute
from rlhf.models.responses import answer_prompts
from rlhf.models.tokenization import encode_prompt, load_tokenizer
from rlhf.registry import Artifact, Registry
from rlhf.stages import sft

PROMPT = "写一条以“{opening}”开头的评论"
PER_CHARACTER = f"sft/{sft.PER_CHARACTER}"
#: Characters of a review that the prompt gives away, and of reviews that are taken.
OPENING, SHORTEST, LONGEST = 4, 12, 40


def prepare(folder: Path) -> None:
    """Writes `demonstrations/{train,validation}.jsonl`: a review to a prompt that names its first characters."""
    for split, loaded in load_text(CHINESE_REVIEWS, TextConfig(documents="line"), validation_share=0.05).items():
        file = folder / "demonstrations" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        texts = dict.fromkeys(text for text in loaded.rows["text"] if SHORTEST <= len(text) <= LONGEST)
        rows = [{"prompt": PROMPT.format(opening=text[:OPENING]), "completion": text} for text in texts]
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{file}: {len(rows)} reviews")


def figures(artifact: Artifact, config: SFTConfig, samples: int) -> dict[str, Any]:
    """What a run gave, and answers sampled from it."""
    tokenizer = load_tokenizer(str(artifact.path))
    run = RunConfig(registry=config.registry, device=config.device, dtype=config.dtype)
    policy = load_policy(artifact, run, Compute.choose(run)).eval()
    prompts = [
        [{"role": "user", "content": PROMPT.format(opening=word)}] for word in ("这本书的", "酒店的服", "手机外观")
    ]
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts * samples]
    texts = answer_prompts(policy, tokenizer, encoded, response_length=64, seed=0).texts
    metrics = artifact.manifest.metrics
    kept = (
        "new_tokens",
        "tokens_per_character",
        "eval_loss_per_character_before",
        "eval_loss_per_character_after",
        "seconds",
    )
    broken = sum("\ufffd" in text for text in texts)
    return {**{name: metrics[name] for name in kept}, "samples": texts, "broken_samples": broken}


def course(log: Path) -> dict[int, float]:
    """Held-out loss a character by updates; of a run that was taken up again, what was logged last."""
    entries = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return {entry["step"]: entry[PER_CHARACTER] for entry in entries if PER_CHARACTER in entry}


def run(given: argparse.Namespace) -> None:
    data = given.folder / "data"
    prepare(data)
    values = read_yaml(ROOT / "configs" / "chinese" / "sft.yaml")
    place = {"dataset": str(data), "registry": str(given.folder / "registry"), "wandb_mode": "disabled"}
    every = max(given.updates // 4, 1)
    values = {**values, **place, "max_steps": given.updates, "eval_steps": every, "save_steps": every}
    results = {}
    for name, tokens in (("old", 0), ("new", values["learn_tokens"])):
        own = {"name": name, "learn_tokens": tokens, "output_dir": str(given.folder / name)}
        config = build(SFTConfig, {**values, **own}, name)
        made = sft.run(config, reuse=True)
        assert made is not None
        results[name] = figures(Registry(config.registry).get(made.reference), config, given.samples)
        results[name]["course"] = course(Path(config.output_dir) / "sft" / "metrics.jsonl")
    content = {"updates": given.updates, "machine": machine("cpu"), **results}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, result in results.items():
        loss = f"{result['eval_loss_per_character_before']:.3f} -> {result['eval_loss_per_character_after']:.3f}"
        print(f"{name}: {result['tokens_per_character']:.2f} tokens a character, held-out loss a character {loss} nats")
        print(f"{name}: by updates {', '.join(f'{step}: {nats:.2f}' for step, nats in result['course'].items())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepare", type=Path, help="only writes the data into this folder")
    parser.add_argument("--folder", type=Path, default=Path("outputs/chinese"), help="for data, registry and runs")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--samples", type=int, default=4, help="answers to each of three prompts")
    parser.add_argument("--out", type=Path, default=RESULTS / "chinese.json")
    given = parser.parse_args()
    prepare(given.prepare) if given.prepare else run(given)


if __name__ == "__main__":
    run_command(main)
