"""The Kneser-Ney 5-gram that pretraining is measured against."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
from nltk.lm import KneserNeyInterpolated

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import pretrain as benchmark

TEXTS = ["the film was good", "the plot was not good", "a great film", "a dull plot", "the acting was great"]


@pytest.mark.parametrize("discount", [0.1, 0.75])
def test_table_of_counts_gives_what_nltk_counts(discount: float) -> None:
    """A rival that is weaker than the library's own is no rival."""
    model = benchmark.kneser_ney(TEXTS, order=4)
    model.estimator.discount = discount
    own = KneserNeyInterpolated(4, discount=discount, vocabulary=model.vocab, counter=model.counts)
    for text in ("the great plot", "a film was dull", "zz"):
        known = [*["<s>"] * 3, *model.vocab.lookup(list(text)), "</s>"]
        for i in range(3, len(known)):
            context = tuple(known[i - 3 : i])
            assert model.unmasked_score(known[i], context) == pytest.approx(own.unmasked_score(known[i], context))


def test_probabilities_of_a_context_add_up_to_one() -> None:
    """Figures of a model whose probabilities exceed one would flatter it. (Right at a document's start nltk's do, by the share
    that it keeps for a further start after the padding.)"""
    model = benchmark.kneser_ney(TEXTS, order=3)
    words = [*model.vocab, "<UNK>"]
    for context in (("t", "h"), ("s", " "), ("o", "d")):
        assert sum(model.unmasked_score(word, context) for word in set(words)) == pytest.approx(1.0)


def test_bits_are_those_of_all_characters_and_ends() -> None:
    """An end that is not counted, or counted and not divided by."""
    model = benchmark.kneser_ney(TEXTS, order=2)
    bits = 0.0
    for text in TEXTS:
        known = ["<s>", *model.vocab.lookup(list(text)), "</s>"]
        bits -= sum(math.log2(model.unmasked_score(b, (a,))) for a, b in itertools.pairwise(known))
    count = sum(len(text) + 1 for text in TEXTS)
    assert benchmark.bits_per_character(model, TEXTS) == pytest.approx(bits / count)
