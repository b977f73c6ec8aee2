"""The ranking loss against a double loop in Python floats, and what its batches must not depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toys import build_model
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rlhf.models.sequences import length_sorted_batches
from rlhf.reward.ranking import Objective, RankingCollator, agreement, ordered_pairs, ranking_loss, score_rows


def naive_loss(
    scores: list[float],
    ratings: list[float],
    prompt: list[int],
    min_difference: float,
    *,
    margin: float = 0.0,
    smoothing: float = 0.0,
    centring: float = 0.0,
    confidence: dict[tuple[int, int], float] | None = None,
) -> float:
    """InstructGPT, equation 1, written as it stands: mean over prompts of 1/C(K,2) * sum over pairs of -log sigmoid; with
    Llama 2's margin, the cross entropy with a share of wrong labels, TRL's centring term, and a weight for each pair."""
    total, prompts = 0.0, sorted(set(prompt))
    for p in prompts:
        rows = [i for i in range(len(prompt)) if prompt[i] == p]
        pairs = math.comb(len(rows), 2)
        for i in rows:
            for j in rows:
                if ratings[i] > ratings[j] and ratings[i] - ratings[j] >= min_difference:
                    right = 1 / (1 + math.exp(-(scores[i] - scores[j] - margin * (ratings[i] - ratings[j]))))
                    cost = -(1 - smoothing) * math.log(right) - smoothing * math.log(1 - right)
                    cost += centring * (scores[i] + scores[j]) ** 2
                    total += (confidence or {}).get((i, j), 1.0) * cost / pairs
    return total / len(prompts)


def loss_of(scores: list[float], ratings: list[float], prompt: list[int], min_difference: float = 0.0) -> float:
    pairs = ordered_pairs(torch.tensor(ratings), torch.tensor(prompt), min_difference=min_difference)
    return float(ranking_loss(torch.tensor(scores), pairs, max(prompt) + 1))


@pytest.mark.parametrize("sizes", [[2], [3], [4], [2, 3, 4], [4, 2, 2], [1, 3]])
@pytest.mark.parametrize("min_difference", [0.0, 0.5, 1.0])
def test_loss_is_the_double_loop(sizes: list[int], min_difference: float) -> None:
    """Pairs across prompts, pairs counted twice, a prompt with many answers that outweighs the others, ties taken for wins."""
    generator = torch.Generator().manual_seed(sum(sizes))
    prompt = [p for p, size in enumerate(sizes) for _ in range(size)]
    scores = torch.randn(len(prompt), generator=generator).tolist()
    ratings = (torch.randint(0, 5, (len(prompt),), generator=generator) / 2).tolist()  # coarse: some of them tie
    if 1 in sizes:  # C(1, 2) is 0; such a prompt has no pairs and only counts in the mean
        expected = naive_loss(scores[1:], ratings[1:], [p - 1 for p in prompt[1:]], min_difference)
        expected *= (len(sizes) - 1) / len(sizes)
    else:
        expected = naive_loss(scores, ratings, prompt, min_difference)
    assert loss_of(scores, ratings, prompt, min_difference) == pytest.approx(expected, abs=1e-6)


def test_two_answers_are_the_pairwise_loss() -> None:
    """K = 2 has to be the textbook loss: -log sigmoid(1.5 - 0.5) = 0.3132617."""
    assert loss_of([1.5, 0.5], [1.0, 0.0], [0, 0]) == pytest.approx(0.3132617, abs=1e-6)
    assert loss_of([1.5, 0.5], [0.0, 1.0], [0, 0]) == pytest.approx(1.3132617, abs=1e-6)


def test_equal_scores_cost_log_two_whatever_k() -> None:
    """Without 1/C(K,2) a prompt with four answers would weigh six times one with two."""
    for k in (2, 3, 4, 8):
        assert loss_of([0.0] * k, [float(i) for i in range(k)], [0] * k) == pytest.approx(math.log(2), abs=1e-6)


def test_ties_and_small_differences_are_left_out() -> None:
    """A tie in either order would push two equal answers apart."""
    ratings, prompt = torch.tensor([2.0, 2.0, 1.5, 0.0]), torch.tensor([0, 0, 0, 0])
    pairs = ordered_pairs(ratings, prompt, min_difference=1.0)
    found = set(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True))
    assert found == {(0, 3), (1, 3), (2, 3)}
    assert pairs.weight.tolist() == pytest.approx([1 / 6] * 3)
    all_pairs = ordered_pairs(ratings, prompt)
    assert len(all_pairs.better) == 5 and (0, 1) not in set(
        zip(all_pairs.better.tolist(), all_pairs.worse.tolist(), strict=True)
    )


def test_a_difference_of_exactly_the_minimum_counts() -> None:
    """`>` for `>=` would drop every pair of neighbours on a scale of whole stars."""
    assert len(ordered_pairs(torch.tensor([2.0, 1.0]), torch.tensor([0, 0]), min_difference=1.0).better) == 1


def test_no_pairs_is_zero_with_a_gradient() -> None:
    """A batch of ties must give 0, not NaN from 0/0, and must not break the backward pass."""
    scores = torch.zeros(3, requires_grad=True)
    loss = ranking_loss(scores, ordered_pairs(torch.ones(3), torch.zeros(3, dtype=torch.long)), 1)
    loss.backward()
    assert float(loss.detach()) == 0 and scores.grad is not None and scores.grad.abs().sum() == 0


def test_order_of_rows_does_not_matter() -> None:
    """Only the ratings say which answer is better, not the place where it stands."""
    scores, ratings, prompt = [0.3, -1.0, 2.0, 0.1, 0.7], [1.0, 2.0, 0.0, 1.0, 0.0], [0, 0, 0, 1, 1]
    order = [4, 2, 0, 3, 1]
    shuffled = [[column[i] for i in order] for column in (scores, ratings, prompt)]
    assert loss_of(*shuffled) == pytest.approx(loss_of(scores, ratings, prompt), abs=1e-6)  # type: ignore[arg-type]


def test_huge_margins_stay_finite() -> None:
    """log(sigmoid(x)) overflows where logsigmoid does not."""
    assert loss_of([-200.0, 200.0], [1.0, 0.0], [0, 0]) == pytest.approx(400.0)


def test_gradient_raises_the_better_answer() -> None:
    """A sign error trains the model to prefer what people dislike, and its loss falls all the same on wrong labels."""
    scores = torch.zeros(2, requires_grad=True)
    ranking_loss(scores, ordered_pairs(torch.tensor([0.0, 1.0]), torch.tensor([0, 0])), 1).backward()
    assert scores.grad is not None and scores.grad.tolist() == pytest.approx([0.5, -0.5])


# What the loss can ask for besides


@pytest.mark.parametrize(
    "asked",
    [{"margin": 0.7}, {"smoothing": 0.2}, {"centring": 0.05}, {"margin": 0.4, "smoothing": 0.1, "centring": 0.01}],
    ids=lambda asked: "+".join(asked),
)
def test_margin_smoothing_and_centring_are_those_of_the_double_loop(asked: dict[str, float]) -> None:
    """A margin with the wrong sign asks for less than the order; smoothing both terms alike asks for nothing; centring the
    difference instead of the sum leaves the scores where they are."""
    generator = torch.Generator().manual_seed(3)
    prompt = [0, 0, 0, 1, 1, 2, 2, 2, 2]
    scores = torch.randn(len(prompt), generator=generator).tolist()
    ratings = (torch.randint(0, 6, (len(prompt),), generator=generator) / 2).tolist()
    pairs = ordered_pairs(torch.tensor(ratings), torch.tensor(prompt), min_difference=0.5)
    objective = Objective(
        margin_per_rating=asked.get("margin", 0.0),
        label_smoothing=asked.get("smoothing", 0.0),
        center_rewards_coefficient=asked.get("centring", 0.0),
    )
    got = float(ranking_loss(torch.tensor(scores), pairs, 3, objective))
    assert got == pytest.approx(naive_loss(scores, ratings, prompt, 0.5, **asked), abs=1e-5)
    assert abs(got - naive_loss(scores, ratings, prompt, 0.5)) > 0.01, "the option changes nothing"


def test_one_pair_is_the_loss_of_trl() -> None:
    """Of K = 2 the centring term and the margin have to be those of `trl.RewardTrainer`, whose names the options bear."""
    chosen, rejected, difference = torch.tensor([1.5]), torch.tensor([0.25]), 2.0
    theirs = -torch.nn.functional.logsigmoid(chosen - rejected - 0.3 * difference) + 0.01 * (chosen + rejected) ** 2
    pairs = ordered_pairs(torch.tensor([difference, 0.0]), torch.tensor([0, 0]))
    objective = Objective(margin_per_rating=0.3, center_rewards_coefficient=0.01)
    ours = ranking_loss(torch.cat([chosen, rejected]), pairs, 1, objective)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)


def test_agreement_by_hand() -> None:
    """Raters 2, 2, 2 against 1, 1, 1 agree wholly; 2, 0 against 1, 1 not at all; 3, 1 against 1, 0: 3 pairs of 4 for the
    first and one tie, so P = 3.5 / 4 and the weight .75. Where the second is better on the whole the weight is 0, not
    negative: such a pair would be trained the wrong way round."""
    assert agreement([[2, 2, 2], [1, 1, 1]])[0, 1] == 1.0
    assert agreement([[2, 0], [1, 1]])[0, 1] == 0.0
    weights = agreement([[3, 1], [1, 0]])
    assert weights.tolist() == [[0.0, 0.75], [0.0, 0.0]]
    assert agreement([[1], [0, 0, 2]])[0, 1] == pytest.approx(1 / 3), "responses may have different raters"


def test_confidence_weighs_each_pair_by_its_own_raters() -> None:
    """The matrix read the other way round, or one prompt's raters applied to another's pairs."""
    rows = [
        {"input_ids": [[1], [2], [3]], "ratings": [2.0, 1.0, 0.5], "rater_ratings": [[2, 2], [2, 0], [1, 0]]},
        {"input_ids": [[4], [5]], "ratings": [0.0, 1.0], "rater_ratings": [[0, 0, 0], [3, 0, 0]]},
    ]
    batch = RankingCollator(0, weight_by_agreement=True)(rows)
    scores = [0.2, -0.4, 0.9, 0.3, 0.1]
    pairs = ordered_pairs(batch["ratings"], batch["prompt"], confidence=batch["confidence"])
    confidence = {(0, 1): 0.5, (0, 2): 1.0, (1, 2): 0.25, (4, 3): 1 / 3}
    expected = naive_loss(scores, batch["ratings"].tolist(), batch["prompt"].tolist(), 0.0, confidence=confidence)
    assert float(ranking_loss(torch.tensor(scores), pairs, 2)) == pytest.approx(expected, abs=1e-6)
    assert "confidence" not in RankingCollator(0)(rows)


# Batches


def test_collator() -> None:
    """Answers and ratings that are flattened in different orders."""
    batch = RankingCollator(0)(
        [
            {"input_ids": [[5, 6, 7], [5, 8]], "ratings": [1, 2]},
            {"input_ids": [[9], [9, 0], [9, 1, 2]], "ratings": [0.5, 0.0, 3.0]},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 8, 0], [9, 0, 0], [9, 0, 0], [9, 1, 2]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 2, 1, 2, 3], "a pad token inside an answer is real"
    assert batch["prompt"].tolist() == [0, 0, 1, 1, 1]
    assert batch["ratings"].tolist() == [1.0, 2.0, 0.5, 0.0, 3.0]


def classifier() -> Any:
    """A toy sequence classifier in float64, so that differences are differences."""
    causal = build_model("llama", 50, dtype=torch.float64)
    assert isinstance(causal.config, LlamaConfig)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(
        LlamaConfig.from_dict({**causal.config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    )
    return model.double().eval()


def test_scores_keep_the_order_of_the_rows_and_do_not_see_their_neighbours() -> None:
    """Sorted by length and not sorted back, each answer gets another one's score. The oracle scores rows alone."""
    model, generator = classifier(), torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 50, (n,), generator=generator) for n in (3, 9, 1, 5, 9, 2)]
    width = 12
    ids = torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])
    mask = torch.arange(width)[None] < torch.tensor([len(row) for row in rows])[:, None]
    with torch.no_grad():
        alone = [float(model(row[None]).logits) for row in rows]
        for batch_size in (1, 2, 4, 6):
            scores = score_rows(model, ids, mask, length_sorted_batches(mask.sum(dim=1), batch_size))
            assert scores.tolist() == pytest.approx(alone, abs=1e-5)  # scores are fp32
    assert len({round(score, 3) for score in alone}) == 6, "alike scores would hide a wrong order"
