"""What the reward model's report card is worth, and what K-wise ranking saves: four measurements, one command each.

`python benchmarks/reward_card.py flags`: reward models trained on labels that prefer the longer answer, and on shuffled
labels, are judged on people's labels. Both have to be flagged; the exit code is 1 if one is not.

`python benchmarks/reward_card.py pandalm --file testset-v1.json`: cross-validation by prompt on the public test set of
PandaLM (instructions with two answers and the verdicts of three annotators), on the base model as it is.

`python benchmarks/reward_card.py speed`: pairs a second of rankings of 4 and of 9, and of the same pairs one by one.

`python benchmarks/reward_card.py equal_compute`: held-out accuracy of rankings of 4 and of single pairs, after as many
updates of as many responses.

Words after `--` go to the reward stage.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from rlhf.config import RewardConfig, SFTConfig, build, parse_config, read_yaml
from rlhf.data_prep.load import load_rows
from rlhf.evaluation.card import statistics as cards
from rlhf.evaluation.card.judged import Judged, rated_pairs
from rlhf.models.adapters import fast_adapters
from rlhf.models.base import load_policy
from rlhf.models.compute import Compute
from rlhf.models.reward_model import trainable_reward_model
from rlhf.models.sequences import prompt_batches
from rlhf.models.tokenization import encode_prompt, encode_response, load_tokenizer
from rlhf.registry import Registry
from rlhf.reward.ranking import RankingCollator, ordered_pairs, ranking_loss, score_rows
from rlhf.stages import reward, sft

Row = dict[str, Any]
#: The stage's options on PandaLM: short training on few pairs, of which those without a winner are left out.
PANDALM = {
    "eval_rating_difference": 0.5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-4,
    "warmup_steps": 4,
    "max_length": 512,
}


def write_data(folder: Path, kind: str, splits: dict[str, list[Row]]) -> None:
    """Data in the layout that the stages read."""
    (folder / kind).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / kind / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def comparisons_of(dataset: str) -> dict[str, list[Row]]:
    """The comparisons of both splits: prompt, responses, ratings, and the held-out raters' where there are some."""
    columns = ("prompt", "responses", "ratings", "ratings_held_out")
    return {
        split: [{c: row[c] for c in columns if c in row} for row in load_rows(dataset, split, kind="comparisons").rows]
        for split in ("train", "validation")
    }


def run_reward_stage(name: str, dataset: Path, arguments: argparse.Namespace, *words: object) -> dict[str, Any]:
    """Trains a reward model and returns its card. Later words win: the script's over the file's, the user's over both."""
    output = arguments.folder / name
    options: list[object] = ["--config", arguments.config] if arguments.config else []
    options += ["--registry", arguments.registry, "--policy", arguments.policy, "--dataset", dataset, "--name", name]
    options += ["--output_dir", output, *words, *arguments.words]
    reward.run(parse_config(RewardConfig, [str(word) for word in options]))
    gc.collect()
    return json.loads((output / "reward" / "card.json").read_text(encoding="utf-8"))


# Flags

#: Parts of the cards that are kept.
SAVED = ("verdict", "flags", "accuracy", "accuracy_held_out_raters", "human_ceiling", "length", "rivals")


def length_labels(row: Row, generator: random.Random) -> Row:
    """The longer response is the better one."""
    return {**row, "ratings": [float(len(response[-1]["content"].split())) for response in row["responses"]]}


def shuffled_labels(row: Row, generator: random.Random) -> Row:
    """The ratings of the row in another order."""
    return {**row, "ratings": generator.sample(row["ratings"], len(row["ratings"]))}


def flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Cards of reward models that learned something else than what people think."""
    splits, found = comparisons_of(arguments.dataset), {}
    spoilers: dict[str, Callable[[Row, random.Random], Row]] = {"length": length_labels, "shuffled": shuffled_labels}
    for name, spoil in spoilers.items():
        generator, folder = random.Random(0), arguments.folder / f"{name}_labels"
        write_data(folder, "comparisons", {**splits, "train": [spoil(row, generator) for row in splits["train"]]})
        card = run_reward_stage(f"{name}-labels", folder, arguments, "--normalize_on", "demonstrations")
        found[name] = {key: card[key] for key in SAVED}
        print(f"{name}: {card['verdict']}\n  " + "\n  ".join(flag["message"] for flag in card["flags"]))
    return found


def flagged(found: dict[str, Any]) -> bool:
    """Whether the card saw through both, by what more data would show all the more: that a rival is not clearly beaten may
    only say that the pairs are few."""
    seen = {name: {flag["name"] for flag in part["flags"]} for name, part in found.items()}
    return "length" in seen["length"] and bool(seen["shuffled"] & {"coin", "ceiling"})


# PandaLM


def pandalm_rows(file: Path) -> list[Row]:
    """Rows with the verdicts as `rater_ratings`: 1 for the better answer, 0 for the other, a half each for a tie."""
    verdicts = {0: (0.5, 0.5), 1: (1.0, 0.0), 2: (0.0, 1.0)}
    rows = []
    for entry in json.loads(file.read_text(encoding="utf-8")):
        said = [verdicts[int(entry[f"annotator{number}"])] for number in (1, 2, 3)]
        prompt = "\n\n".join(part for part in (entry["instruction"], entry["input"]) if part)
        rows.append(
            {
                "prompt": prompt,
                "responses": [str(entry["response1"]), str(entry["response2"])],  # some are the JSON word true
                "rater_ratings": [[first for first, _ in said], [second for _, second in said]],
                "source": entry["cmp_key"],
                "prompt_group": entry["motivation_app"],
            }
        )
    return rows


def fold_of(row: Row, folds: int) -> int:
    """By a hash of the prompt, so that a prompt is in one fold only."""
    return int(hashlib.sha256(row["prompt"].encode()).hexdigest(), 16) % folds


def pandalm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Cross-validated accuracy on the annotators trained on, on the one held out, and of the rivals; and the ceiling."""
    rows = pandalm_rows(arguments.file)
    untrained_policy(rows, arguments, "pandalm")
    arguments.policy = "sft/pandalm"
    scored: list[Row] = []
    for fold in range(arguments.folds):
        folder = arguments.folder / f"fold-{fold}-data"
        inside = [fold_of(row, arguments.folds) == fold for row in rows]
        parts = {
            "train": [row for row, held_out in zip(rows, inside, strict=True) if not held_out],
            "validation": [row for row, held_out in zip(rows, inside, strict=True) if held_out],
        }
        write_data(folder, "comparisons", parts)
        words = [word for name, value in PANDALM.items() for word in (f"--{name}", value)]
        run_reward_stage(f"pandalm-{fold}", folder, arguments, *words)
        lines = (arguments.folder / f"pandalm-{fold}" / "reward" / "scores.jsonl").read_text().splitlines()
        scored += [{**json.loads(line), "fold": fold} for line in lines]
    return pooled(scored)


def untrained_policy(rows: Sequence[Row], arguments: argparse.Namespace, name: str) -> None:
    """Registers the base model as sft/NAME: one update with step size 0. It sees no answer, of prompts no more than 8."""
    folder = arguments.folder / "demonstrations"
    told = [{"prompt": row["prompt"], "completion": "."} for row in rows[:8]]
    write_data(folder, "demonstrations", {"train": told, "validation": told})
    config = SFTConfig(
        name=name,
        dataset=str(folder),
        model_name_or_path=arguments.base,
        chat_template=arguments.chat_template or None,
        registry=arguments.registry,
        output_dir=str(arguments.folder / "policy"),
        learning_rate=0.0,
        max_steps=1,
        wandb_mode="disabled",
        preflight=False,  # its rows teach nothing, and may be held out and trained on
    )
    sft.run(config)


def pooled(scored: Sequence[Row]) -> dict[str, Any]:
    """The figures of all folds together: pairs are within a ranking, so scores of different models are never compared."""
    ranking = {key: i for i, key in enumerate(dict.fromkeys((row["fold"], row["ranking"]) for row in scored))}
    prompt = {text: i for i, text in enumerate(dict.fromkeys(row["prompt"] for row in scored))}

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if row[name] is None else row[name] for row in scored], dtype=float)

    judged = Judged(
        ranking=np.array([ranking[row["fold"], row["ranking"]] for row in scored]),
        prompt=np.array([prompt[row["prompt"]] for row in scored]),
        ratings=column("rating"),
        held_out=column("rating_held_out"),
        lengths=column("length"),
        texts=[row["response"] for row in scored],
        seen=np.zeros(len(scored), dtype=bool),
        columns={},
    )
    scores, pairs = column("score"), rated_pairs(judged.ratings, judged, 0.5)
    others, ceiling = cards.raters(scores, judged, 0.5)
    rivals = []
    for name in ("length", "bag of words", "likelihood of the SFT model"):
        theirs = column(name) if name in scored[0] else np.full(len(scored), np.nan)
        known = np.isfinite(theirs[pairs.better]) & np.isfinite(theirs[pairs.worse])
        rivals.append(cards.rival(name, theirs, scores, pairs.where(known)))
    return {
        "accuracy": cards.accuracy(scores, pairs),
        "accuracy_held_out_rater": others,
        "human_ceiling": ceiling,
        "rivals": [line for line in rivals if line],
        "length": cards.length_bias(scores, judged, 0.5),
    }


# Rankings against single pairs


def rankings_of(rows: Sequence[Row], k: int) -> list[Row]:
    """Rankings of exactly k responses, cut out of larger ones, without ties among them."""
    cut = []
    for row in rows:
        for first in range(0, len(row["responses"]) - k + 1, k):
            part = {c: row[c][first : first + k] for c in ("responses", "ratings")}
            if len(set(part["ratings"])) == k:
                cut.append({"prompt": row["prompt"], **part})
    return cut


def pairs_of(rows: Sequence[Row]) -> list[Row]:
    """The same comparisons, a row for each pair."""
    return [
        {"prompt": row["prompt"], **{c: [row[c][i], row[c][j]] for c in ("responses", "ratings")}}
        for row in rows
        for i, j in itertools.combinations(range(len(row["responses"])), 2)
    ]


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Pairs a second of forward and backward passes, rankings and single pairs in turn."""
    config = build(RewardConfig, {**read_yaml(arguments.config), "dataset": arguments.dataset}, str(arguments.config))
    compute, policy = Compute.choose(config), Registry(arguments.registry).get(arguments.policy, expect_stage="sft")
    tokenizer = load_tokenizer(str(policy.path))
    pad_id = int(tokenizer.pad_token_id)
    model = trainable_reward_model(load_policy(policy, config, compute), config, pad_id)
    rows, results = comparisons_of(arguments.dataset)["train"], {}
    for k in (4, 9):
        chosen = rankings_of(rows, k)[: max(1, arguments.responses // k)]
        if not chosen:
            print(f"K={k}: no ranking of so many responses in {arguments.dataset}")
            continue
        seconds: dict[str, list[float]] = {"rankings": [], "single pairs": []}
        pairs = pairs_of(chosen)
        # In the order of training, shuffled: side by side, the pairs of one ranking would be packed into it again.
        forms = {"rankings": chosen, "single pairs": random.Random(0).sample(pairs, len(pairs))}
        encoded = {name: encode(part, tokenizer) for name, part in forms.items()}
        for _ in range(arguments.repeats + 1):
            for name in forms:
                seconds[name].append(time_step(model, encoded[name], pad_id, compute, arguments.responses_a_pass))
        count = len(forms["single pairs"])
        rates = {name: count / statistics.median(taken[1:]) for name, taken in seconds.items()}  # the first warms up
        ratio = rates["rankings"] / rates["single pairs"]
        results[f"K={k}"] = {"pairs": count, "pairs_per_second": rates, "ratio": ratio}
        print(f"K={k}: {rates['rankings']:.1f} against {rates['single pairs']:.1f} pairs a second, {ratio:.2f}x")
    return results


def encode(rows: Sequence[Row], tokenizer: Any) -> list[Row]:
    """Rows as the collator takes them."""
    return [
        {
            "input_ids": [
                encode_prompt(tokenizer, row["prompt"]) + encode_response(tokenizer, row["prompt"], response)
                for response in row["responses"]
            ],
            "ratings": row["ratings"],
        }
        for row in rows
    ]


def time_step(model: Any, rows: list[Row], pad_id: int, compute: Compute, responses: int) -> float:
    """Seconds of the forward and backward passes over the rows, so many responses a pass."""
    collator, size = RankingCollator(pad_id), max(1, responses // len(rows[0]["ratings"]))
    model.train().zero_grad(set_to_none=True)
    started = time.perf_counter()
    for first in range(0, len(rows), size):
        batch = {name: value.to(compute.device) for name, value in collator(rows[first : first + size]).items()}
        batches = prompt_batches(batch["prompt"], responses)
        with fast_adapters(model, compute), compute.autocast():
            scores = score_rows(model, batch["input_ids"], batch["attention_mask"], batches)
        pairs = ordered_pairs(batch["ratings"], batch["prompt"])
        ranking_loss(scores, pairs, int(batch["prompt"].max()) + 1).backward()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def equal_compute(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two reward models after as many updates of as many responses: rankings of 4, and the same comparisons as pairs."""
    splits, results = comparisons_of(arguments.dataset), {}
    rankings = rankings_of(splits["train"], 4)
    size = max(1, arguments.responses // 4)
    for name, rows, batch in (("rankings of 4", rankings, size), ("single pairs", pairs_of(rankings), 2 * size)):
        folder = arguments.folder / f"{name.replace(' ', '_')}_data"
        write_data(folder, "comparisons", {**splits, "train": rows})
        words = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", 1, "--min_responses", 2]
        card = run_reward_stage(name.replace(" ", "-"), folder, arguments, *words)
        results[name] = {"rows": len(rows), "accuracy": card["accuracy"], "rivals": card["rivals"]}
        print(f"{name}: {card['verdict']}")
    return results


COMMANDS = {"flags": flags, "pandalm": pandalm, "speed": speed, "equal_compute": equal_compute}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--config", type=Path, default=None, help="default: the demo's, and none for pandalm")
    parser.add_argument("--dataset", default="outputs/demo/data", help="comparisons (not for pandalm)")
    parser.add_argument("--policy", default="sft/demo")
    parser.add_argument("--registry", default="registry")
    parser.add_argument("--folder", type=Path, default=Path("outputs/reward_bench"), help="where the runs go")
    parser.add_argument("--file", type=Path, help="pandalm: the JSON file of the test set")
    parser.add_argument("--base", default="pypi:smollm2-135m-instruct", help="pandalm: the base model")
    parser.add_argument(
        "--chat_template", default="chatml", help="pandalm: as in the SFT stage; '' for the model's own"
    )
    parser.add_argument("--responses", type=int, default=72, help="responses a step, speed and equal_compute")
    parser.add_argument("--responses_a_pass", type=int, default=36, help="speed: responses a forward pass")
    parser.add_argument("--repeats", type=int, default=5, help="speed: timed steps")
    parser.add_argument("--folds", type=int, default=5, help="pandalm: parts of the prompts, each held out once")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/reward_COMMAND.json")
    known, more = common.words()
    arguments = parser.parse_args(known)
    arguments.words = more
    if arguments.command == "pandalm" and arguments.file is None:
        parser.error("pandalm needs --file")
    if arguments.command != "pandalm" and arguments.config is None:
        arguments.config = Path("configs/demo/reward.yaml")
    results = COMMANDS[arguments.command](arguments)
    out = arguments.out or Path(f"benchmarks/results/reward_{arguments.command}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": common.machine("cpu"), **results}, indent=1) + "\n", encoding="utf-8")
    if arguments.command == "flags" and not flagged(results):
        sys.exit("a reward model that did not learn from people was not flagged")


if __name__ == "__main__":
    main()
