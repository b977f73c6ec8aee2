"""Figures of comparisons: what a linear scorer of words and length learns of their labels, and how raters agree.

The scorer is cross-validated over prompts. Its accuracy is a lower bound of what the labels hold: where it is above chance,
they are no coin tosses; where it is not, they may be, or the task is beyond words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.base.functions import GoldFunction
from rlhf.data_prep.formats.rows import comparable, prompt_key
from rlhf.data_prep.ratings import is_clear
from rlhf.doctor.review.texts import Figures, of_answers, of_prompts
from rlhf.models.tokenization import last_user_text

Array = NDArray[np.float64]
#: Pairs that the scorer is fitted to, and least pairs for a statement on them.
PAIRS, ENOUGH_PAIRS = 3000, 60
#: Pairs among which the scorer finds whatever there is to find in all preference data tried.
SURE_PAIRS = 200
#: Standard errors that permuted labels stay below in 19 of 20: folds share most of their pairs, which widens a coin's 1.645.
CHANCE = 2.0
FOLDS = 5
#: Pairs that an independent judge is asked for.
JUDGED_PAIRS = 150
#: Most pairs of one ranking, so that no ranking outweighs the others.
PAIRS_A_RANKING = 8


class Pairs:
    """Ordered pairs of responses that have no response in common."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], minimum: float = 0.0) -> None:
        self.better: list[str] = []
        self.worse: list[str] = []
        self.prompts: list[str] = []
        for row in rows:
            texts = ["\n".join(message["content"] for message in answer) for answer in row["responses"]]
            order = sorted(range(len(texts)), key=lambda i: row["ratings"][i])
            # The best with the worst, the second best with the second worst: the pairs are independent of each other.
            pairs = [(order[-1 - i], order[i]) for i in range(len(order) // 2)]
            for high, low in pairs[:PAIRS_A_RANKING]:
                if is_clear(row["ratings"][high] - row["ratings"][low], minimum):
                    self.better.append(texts[high])
                    self.worse.append(texts[low])
                    self.prompts.append(prompt_key(row["prompt"]))
        if len(self) > PAIRS:
            keep = range(0, len(self), -(-len(self) // PAIRS))
            self.better, self.worse, self.prompts = (
                [values[i] for i in keep] for values in (self.better, self.worse, self.prompts)
            )

    def __len__(self) -> int:
        return len(self.prompts)


class LinearScorer:
    """A Bradley-Terry model whose score is linear in the words of a response and the logarithm of its length."""

    def __init__(self, pairs: Pairs, chosen: Sequence[int]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        better, worse = ([texts[i] for i in chosen] for texts in (pairs.better, pairs.worse))
        self.words = TfidfVectorizer(token_pattern=r"(?u)\S+", min_df=2, sublinear_tf=True, max_features=20_000)
        try:
            self.words.fit([*better, *worse])
        except ValueError:  # scikit-learn: no word is left
            self.words = TfidfVectorizer(analyzer="char", max_features=1000).fit([*better, *worse])
        # Every second pair is reversed, with its label: the loss is the same, and a classifier needs two classes.
        sign = np.where(np.arange(len(chosen)) % 2, -1, 1)
        features = self._features(better, worse).multiply(sign[:, None]).tocsr()
        self.model = LogisticRegression(C=3.0, fit_intercept=False, max_iter=200).fit(features, sign)

    def _features(self, better: Sequence[str], worse: Sequence[str]) -> Any:
        from scipy.sparse import csr_matrix, hstack

        words = self.words.transform(better) - self.words.transform(worse)
        sizes = [np.log1p([len(text.split()) for text in texts]) for texts in (better, worse)]
        return hstack([words, csr_matrix((sizes[0] - sizes[1])[:, None])]).tocsr()

    def margins(self, pairs: Pairs, chosen: Sequence[int]) -> Array:
        """Return the log-odds (n,) that the better response of each pair is the better one."""
        better, worse = ([texts[i] for i in chosen] for texts in (pairs.better, pairs.worse))
        return np.asarray(self.model.decision_function(self._features(better, worse)), dtype=np.float64)


def cross_validated(pairs: Pairs) -> Array:
    """Return the held-out log-odds (n,) of each pair, of scorers that were fitted to pairs of other prompts."""
    names = {prompt: number for number, prompt in enumerate(dict.fromkeys(pairs.prompts))}
    # Prompts in a random order: neighbours in a file may be alike.
    place = np.random.default_rng(0).permutation(len(names))
    fold = np.array([place[names[prompt]] % FOLDS for prompt in pairs.prompts])
    margins = np.zeros(len(pairs))
    for number in range(FOLDS):
        inside, outside = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if len(inside) and len(outside) >= 2:
            margins[inside] = LinearScorer(pairs, outside.tolist()).margins(pairs, inside.tolist())
    return margins


def correct(margins: Array) -> Array:
    """Return 1 for pairs in the right order, 0 in the wrong one, a half without an order."""
    return (np.sign(margins) + 1) / 2


def z_score(margins: Array) -> float:
    """Return by how many standard errors of a coin the share of right orders is above a half."""
    return float((correct(margins).mean() - 0.5) * 2 * np.sqrt(len(margins)))


def of_labels(
    train: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    minimum: float,
    figures: Figures,
    gold: GoldFunction | None = None,
) -> None:
    """Add figures of the ratings in training and held-out comparisons.

    Args:
        minimum: least difference in rating of a training pair.
        gold: an independent judge, whose order of a few pairs is compared.
    """
    differences = [_difference(row) for row in train]
    figures.add("rating_difference", float(np.mean(differences)))
    clear = [bool(is_clear(max(row["ratings"]) - min(row["ratings"]), minimum)) for row in train]
    figures.add("unclear", 1 - sum(clear) / len(clear))
    if (reliability := rater_reliability(train)) is not None:
        figures.add("rater_reliability", reliability)
    pairs, others = Pairs(train, minimum), Pairs(held_out)
    if gold is not None and len(pairs) >= ENOUGH_PAIRS:
        share, z = judge_agreement(pairs, gold)
        figures.add(
            "judge_agrees", z, f"the judge `gold` orders {share:.0%} of up to {JUDGED_PAIRS} pairs as they are labelled"
        )
    if len(pairs) >= ENOUGH_PAIRS:
        _labels(pairs, others, figures)


def of_comparisons(rows: Sequence[Mapping[str, Any]], figures: Figures) -> None:
    """Add figures of the texts of comparisons, and of the lengths of better and worse responses."""
    of_prompts(rows, figures)
    prompts = [last_user_text(row["prompt"]) for row in rows]
    answers = [["\n".join(message["content"] for message in answer) for answer in row["responses"]] for row in rows]
    of_answers(
        [prompt for prompt, own in zip(prompts, answers, strict=True) for _ in own],
        [text for own in answers for text in own],
        figures,
    )
    twice = float(np.mean([len({comparable(t) for t in own}) < len(own) for own in answers]))
    figures.values["same_responses"] = max(twice, figures.values.get("same_responses", 0.0))
    _length(Pairs(rows), figures)


def _difference(row: Mapping[str, Any]) -> float:
    ratings = np.asarray(row["ratings"], dtype=float)
    return float(np.abs(ratings[:, None] - ratings[None]).sum() / (len(ratings) * (len(ratings) - 1)))


def _length(pairs: Pairs, figures: Figures) -> None:
    """Add the share of pairs whose longer response is the better one."""
    sizes = [(len(a), len(b)) for a, b in zip(pairs.better, pairs.worse, strict=True) if len(a) != len(b)]
    if len(sizes) >= ENOUGH_PAIRS:
        figures.add(
            "longer_wins", float(np.mean([a > b for a, b in sizes])), f"{len(sizes):,} pairs of different length"
        )


def _labels(pairs: Pairs, others: Pairs, figures: Figures) -> None:
    """Add what the scorer finds: is there information, in both splits and of one direction, and how many labels are flipped?"""
    margins, noise = cross_validated(pairs), None
    accuracy, z = float(correct(margins).mean()), z_score(margins)
    if len(pairs) >= SURE_PAIRS or z > CHANCE:
        figures.add("labels", z, f"a linear scorer orders {accuracy:.0%} of {len(pairs):,} pairs of other prompts")
    if len(others) >= ENOUGH_PAIRS / 2 and z > 3:
        transfer = LinearScorer(pairs, range(len(pairs))).margins(others, range(len(others)))
        share = f"{correct(transfer).mean():.0%} of {len(others):,} held-out pairs"
        figures.add("splits_agree", z_score(transfer), f"fitted to training pairs, a linear scorer orders {share}")
        noise = noise_of_training(margins, transfer)
    elif len(others) >= ENOUGH_PAIRS and z < CHANCE:
        own = cross_validated(others)
        if z_score(own) > 4 and len(pairs) >= len(others) / 2:
            words = f"a linear scorer orders {correct(own).mean():.0%} of held-out pairs, and {accuracy:.0%} of training pairs"
            figures.add("splits_agree", -z_score(own), words)
    if noise:
        figures.add(
            "label_noise", noise, f"fitted to them, a linear scorer orders {accuracy:.0%} of others, and {share}"
        )
    elif (noise := label_noise(margins)) is not None:
        figures.add("label_noise", noise, "errors of a linear scorer that do not get rarer the surer it is")


def noise_of_training(training: Array, held_out: Array) -> float | None:
    """Return the least share of flipped training labels, by a scorer that orders held-out pairs better than training ones.

    A scorer of accuracy a orders a (1 - f) + (1 - a) f of pairs of which a share f is flipped. From the gap less three
    standard errors; None where nothing is left.
    """
    accuracies = [float(correct(margins).mean()) for margins in (training, held_out)]
    error = sum(0.25 / len(margins) for margins in (training, held_out)) ** 0.5
    gap = accuracies[1] - accuracies[0] - 3 * error
    return gap / (2 * accuracies[1] - 1) if gap > 0 else None


def judge_agreement(pairs: Pairs, gold: GoldFunction) -> tuple[float, float]:
    """Return the share of a few pairs that an independent judge orders as the labels do, and its standard errors above a half."""
    keep = range(0, len(pairs), -(-len(pairs) // JUDGED_PAIRS))
    scores = gold([text for i in keep for text in (pairs.better[i], pairs.worse[i])])
    differences = np.array(scores[::2], dtype=np.float64) - np.array(scores[1::2], dtype=np.float64)
    differences = differences[differences != 0]
    return float((differences > 0).mean()) if len(differences) else 0.5, z_score(differences) if len(
        differences
    ) else 0.0


def label_noise(margins: Array) -> float | None:
    """Return the least share of labels that are flipped at random; None where a scorer's own errors explain all errors.

    Flips leave errors that do not get rarer the surer a scorer is: P(right) = f + (1 - 2f) sigmoid(a |margin|). The share f is
    established where its likelihood ratio against f = 0 is beyond 1 in 100; returned is the lower end of its 95% interval.
    """
    if len(margins) < 4 * ENOUGH_PAIRS:
        return None
    right, size = correct(margins), np.abs(margins) / max(float(np.abs(margins).mean()), 1e-12)
    flipped, slope = np.linspace(0, 0.45, 46), np.geomspace(0.05, 50, 40)
    likelihood = np.array([[_likelihood(f, a, size, right) for a in slope] for f in flipped]).max(axis=1)
    if 2 * (likelihood.max() - likelihood[0]) < 6.63:
        return None
    return float(flipped[np.flatnonzero(2 * (likelihood.max() - likelihood) < 3.84)[0]])


def _likelihood(flipped: float, slope: float, size: Array, right: Array) -> float:
    chance = flipped + (1 - 2 * flipped) / (1 + np.exp(-slope * size))
    chance = np.clip(chance, 1e-9, 1 - 1e-9)
    return float((right * np.log(chance) + (1 - right) * np.log(1 - chance)).sum())


def rater_reliability(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the reliability of mean ratings: 1 - variance of a mean by its raters / variance of the means in a ranking."""
    within: list[float] = []
    between: list[float] = []
    for row in rows:
        lists = [[x for x in own if x is not None] for own in row.get("rater_ratings") or []]
        if len(lists) < 2 or min(map(len, lists)) < 2:
            continue
        within += [float(np.var(own, ddof=1) / len(own)) for own in lists]
        between.append(float(np.var([np.mean(own) for own in lists], ddof=1)))
    if len(between) < ENOUGH_PAIRS / 2:
        return None
    return 1 - float(np.mean(within)) / max(float(np.mean(between)), 1e-12)
