"""The small GPT of configs/mini_gpt against an interpolated Kneser-Ney 5-gram of the same characters, by the same split.

The 5-gram is nltk's. Its one slow loop, over all n-grams for each count of continuations, is replaced by a table of the same
counts; a test compares the two. Where there is a choice it is the 5-gram's: the best of several discounts on the held-out text
itself; characters that training saw less than twice count as one unknown character; and at a document's first characters
nltk's probabilities add up to a little more than 1.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, machine, save
from nltk.lm import Vocabulary
from nltk.lm.models import InterpolatedLanguageModel
from nltk.lm.preprocessing import padded_everygrams
from nltk.lm.smoothing import KneserNey
from nltk.util import ngrams

from rlhf.base.errors import run_command
from rlhf.config import PretrainConfig, build, read_yaml
from rlhf.data_prep.corpus import characters
from rlhf.stages import pretrain

ORDER, DISCOUNTS = 5, (0.5, 0.7, 0.8, 0.9)


class IndexedKneserNey(KneserNey):
    """nltk's smoothing with its continuation counts looked up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._before: Counter[tuple[Any, ...]] = Counter()
        self._after: Counter[tuple[Any, ...]] = Counter()

    def index(self) -> None:
        """After the counting: n-grams of each order without their first word, and those without their last as well."""
        for order in range(2, self._order + 1):
            for context, counts in self.counts[order].items():
                for word, count in counts.items():
                    if count > 0:
                        self._before[(*context[1:], word)] += 1
                        self._after[context[1:]] += 1

    def _continuation_counts(self, word: Any, context: tuple[Any, ...] = ()) -> tuple[int, int]:
        return self._before[(*context, word)], self._after[context]


def kneser_ney(texts: Iterable[str], order: int = ORDER) -> Any:
    """The model of characters, counted; its estimator's `discount` may be changed."""
    texts = list(texts)
    seen = Counter(character for text in texts for character in text)
    vocabulary = Vocabulary({**seen, "<s>": 2, "</s>": 2}, unk_cutoff=2)
    model = InterpolatedLanguageModel(
        IndexedKneserNey, order, params={"discount": 0.75, "order": order}, vocabulary=vocabulary
    )
    model.fit(padded_everygrams(order, list(text)) for text in texts)
    model.estimator.index()
    return model


def bits_per_character(model: Any, texts: Sequence[str]) -> float:
    """Of documents, each's end counted as a character, as in pretraining."""
    pad = ["<s>"] * (model.order - 1)
    found = Counter(
        gram for text in texts for gram in ngrams([*pad, *model.vocab.lookup(list(text)), "</s>"], model.order)
    )
    bits = -sum(n * math.log2(model.unmasked_score(gram[-1], gram[:-1])) for gram, n in found.items())
    return bits / characters(texts)


def run(given: argparse.Namespace) -> None:
    values = read_yaml(ROOT / "configs" / "mini_gpt" / "pretrain.yaml")
    place = {"output_dir": str(given.folder), "registry": str(given.folder / "registry"), "wandb_mode": "disabled"}
    more = {"max_steps": given.updates} if given.updates else {}
    config = build(PretrainConfig, {**values, **place, **more}, "configs/mini_gpt/pretrain.yaml")
    made = pretrain.run(config, reuse=True)
    assert made is not None
    sets = pretrain.data_sets(config)
    train, held_out = list(sets["train"].rows["text"]), list(sets["validation"].rows["text"])
    started = time.perf_counter()
    model = kneser_ney(train)
    rivals = {}
    for model.estimator.discount in DISCOUNTS:
        rivals[str(model.estimator.discount)] = bits_per_character(model, held_out)
    seconds = time.perf_counter() - started
    metrics = {name: value for name, value in made.manifest.metrics.items() if name != "phases"}
    best = min(rivals.values())
    result = {
        "machine": machine("cpu"),
        "documents": {"train": len(train), "held_out": len(held_out)},
        "characters": {"train": characters(train), "held_out": characters(held_out)},
        "model": metrics,
        "kneser_ney": {"order": ORDER, "bits_per_character": rivals, "best": best, "seconds": seconds},
    }
    save("pretrain", given, result)
    print(
        f"bits per character: {metrics['eval_bits_per_character']:.3f} after {metrics['seconds']:.0f} s, "
        f"Kneser-Ney {ORDER}-gram {best:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/mini_gpt"), help="for registry and run")
    parser.add_argument("--updates", type=int, default=0, help="updates in place of the config's epochs")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/pretrain_cpu.json")
    parser.set_defaults(device="cpu")
    run(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
