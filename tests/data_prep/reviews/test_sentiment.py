"""The demo's data: parsing, splits, rater halves, grouping and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from rlhf.data_prep.demo.card import make_card, render, rows_fingerprint
from rlhf.data_prep.demo.sentiment import SETS, Sentence, Tables, build_tables, parse, rater_halves

Line = tuple[str, str, list[int]]
ToSource = Callable[[list[Line]], tuple[bytes, bytes]]
TRAINING = ("demonstrations/train", "comparisons/train", "prompts/train")


def tables_of(sentences: list[Sentence], seed: int = 0, k: int = 8) -> Tables:
    return build_tables(sentences, seed=seed, responses_per_prompt=k, evaluation_share=0.3)


def sentences_in(tables: Tables, name: str) -> list[str]:
    answers = [a for row in tables.rows[name] for a in row.get("responses", [row.get("completion", [])])]
    return [message["content"] for answer in answers for message in answer]


def prompts_in(tables: Tables, name: str) -> set[str]:
    return {row["prompt"][0]["content"] for row in tables.rows[name]}


@pytest.fixture
def sentences(lines: list[Line], to_source: ToSource) -> list[Sentence]:
    return parse(*to_source(lines)).sentences


@pytest.fixture(params=[0, 1, 2])
def tables(request: pytest.FixtureRequest, sentences: list[Sentence]) -> Tables:
    return tables_of(sentences, seed=request.param)


def test_good_lines_are_all_read(lines: list[Line], to_source: ToSource) -> None:
    """Bug: the last line, or a Windows line end, is lost or becomes part of the text."""
    parsed = parse(*to_source(lines))
    assert [(s.id, s.text, list(s.ratings)) for s in parsed.sentences] == lines
    assert parsed.rows_in == len(lines) and not parsed.dropped.counts and not parsed.dropped_ratings.counts


def test_no_evaluation_prompt_in_any_training_set(tables: Tables) -> None:
    """Bug: PPO is evaluated on prompts that a stage was trained on."""
    held_out = prompts_in(tables, "prompts/validation")
    assert held_out
    for name in TRAINING:
        assert not held_out & prompts_in(tables, name), name


def test_evaluation_words_differ_by_more_than_case(to_source: ToSource) -> None:
    """Bug: 'the' is held out while 'The' is trained on."""
    lines = [(f"{w}{i}", f"{w} film {i}", [1, 2]) for w in ("Fine", "fine", "Dull", "dull") for i in range(40)]
    for seed in range(20):
        tables = tables_of(parse(*to_source(lines)).sentences, seed)
        trained = {p.casefold() for name in TRAINING for p in prompts_in(tables, name)}
        assert not trained & {p.casefold() for p in prompts_in(tables, "prompts/validation")}


def test_no_sentence_in_two_sets(tables: Tables, sentences: list[Sentence]) -> None:
    """Bug: a sentence is trained on and tested on, or is lost without being counted."""
    used = Counter(text for name in SETS for text in sentences_in(tables, name))
    assert max(used.values()) == 1
    assert len(used) + tables.dropped_sentences.counts.total() == len(sentences)


def test_frequent_words_stay_in_training(to_source: ToSource) -> None:
    """Bug: the word that holds half of the data is held out by an unlucky hash."""
    lines = [(str(i), f"The film {i}", [1, 2]) for i in range(101)]
    sentences = parse(*to_source(lines)).sentences
    for seed in range(20):
        assert not tables_of(sentences, seed).rows["prompts/validation"]


def test_shares_of_the_split(to_source: ToSource) -> None:
    """Bug: bounds of the hash in the wrong order or place."""
    lines = [(str(i), f"The film {i}", [1, 2]) for i in range(4000)]
    tables = tables_of(parse(*to_source(lines)).sentences)
    expected = {"demonstrations/train": 0.45, "demonstrations/validation": 0.05}
    expected |= {"comparisons/train": 0.40, "comparisons/validation": 0.10}
    for name, share in expected.items():
        assert len(sentences_in(tables, name)) / 4000 == pytest.approx(share, abs=0.03)


def test_same_rows_whatever_the_order_of_lines(sentences: list[Sentence]) -> None:
    """Bug: the split depends on file order, a set's order or Python's salted hash()."""
    assert tables_of(sentences).rows == tables_of(sentences[::-1]).rows
    # a literal, so that a second process with another hash salt is held to the same value
    assert rows_fingerprint(tables_of(sentences).rows, {})[:16] == "ae66b1d5aeaf0678"


def test_seed_changes_the_split(sentences: list[Sentence]) -> None:
    """Bug: an option that does nothing."""
    first, second = (tables_of(sentences, seed) for seed in (0, 1))
    assert set(sentences_in(first, "comparisons/train")) != set(sentences_in(second, "comparisons/train"))
    assert prompts_in(first, "prompts/validation") != prompts_in(second, "prompts/validation")


def test_sentences_stay_in_their_set_when_rows_are_added(sentences: list[Sentence]) -> None:
    """Bug: a shuffle of everything: new data moves old test sentences into training."""
    before, after = tables_of(sentences[:300]), tables_of(sentences)
    for name in SETS[:4]:
        kept = set(sentences_in(before, name))
        elsewhere = {text for other in SETS[:4] if other != name for text in sentences_in(after, other)}
        assert not kept & elsewhere, name
    assert prompts_in(before, "prompts/validation") <= prompts_in(after, "prompts/validation")


@pytest.mark.parametrize("count", [2, 3, 15, 18])
def test_rater_halves_share_the_raters(count: int) -> None:
    """Bug: a rater's opinion is in the training and in the held-out rating; or the first half always trains."""
    firsts = set()
    for i in range(20):
        ratings = tuple(range(-4, 5))[:count] if count < 9 else tuple(j % 9 - 4 for j in range(count))
        first, second = rater_halves(Sentence(str(i), "The film", ratings), seed=0)
        assert sorted(first + second) == sorted(ratings)
        assert len(first) - len(second) in (0, 1)
        firsts.add(tuple(first))
    assert len(firsts) > 1


def test_comparison_ratings_are_means_of_the_halves(tables: Tables, sentences: list[Sentence]) -> None:
    """Bug: ratings that belong to another response of the row, or halves swapped."""
    by_text = {s.text: s for s in sentences}
    seeds = [s for s in (0, 1, 2) if tables_of(sentences, s).rows == tables.rows]
    for row in tables.rows["comparisons/train"]:
        for i, answer in enumerate(row["responses"]):
            sentence = by_text[answer[0]["content"]]
            first, second = rater_halves(sentence, seeds[0])
            assert row["ratings"][i] == sum(first) / len(first)
            assert row["ratings_held_out"][i] == sum(second) / len(second)
            assert row["ratings_all"][i] == sum(sentence.ratings) / len(sentence.ratings)
            assert (row["rater_ratings"][i], row["rater_ratings_held_out"][i]) == (first, second)


@pytest.mark.parametrize("k", [2, 5, 8])
def test_groups_have_one_prompt_and_at_most_k_responses(sentences: list[Sentence], k: int) -> None:
    """Bug: responses to different prompts are ranked against each other, or the option is not used."""
    tables = tables_of(sentences, k=k)
    rows = tables.rows["comparisons/train"] + tables.rows["comparisons/validation"]
    assert max(len(row["responses"]) for row in rows) == k
    assert min(len(row["responses"]) for row in rows) >= 2
    for row in rows:
        (word,) = {answer[0]["content"].split()[0] for answer in row["responses"]}
        assert row["prompt"] == [
            {"role": "user", "content": f'Write one sentence of a movie review that starts with "{word}"'}
        ]


def test_a_group_of_one_is_dropped_and_counted(to_source: ToSource) -> None:
    """Bug: a comparison of one response, or a sentence that vanishes."""
    lines = [(str(i), f"Word{i} film", [1, 2]) for i in range(100)]
    tables = tables_of(parse(*to_source(lines)).sentences)
    demonstrations = sum(len(tables.rows[f"demonstrations/{split}"]) for split in ("train", "validation"))
    assert not tables.rows["comparisons/train"] and not tables.rows["comparisons/validation"]
    assert tables.dropped_sentences.counts.total() == 100 - demonstrations > 0


def test_rare_and_odd_words_are_no_prompts(to_source: ToSource) -> None:
    """Bug: PPO is asked for sentences that start with '(Wendigo'."""
    lines = [(f"{w}{i}", f"{w} film {i}", [1, 2]) for w in ("(A)", "Fine", "''Fine''") for i in range(3)]
    lines += [("r1", "Rare film 1", [1, 2]), ("r2", "Rare film 2", [1, 2])]
    tables = tables_of(parse(*to_source(lines)).sentences)
    asked = prompts_in(tables, "prompts/train") | prompts_in(tables, "prompts/validation")
    assert {p.split('"')[1] for p in asked} == {"Fine", "''Fine''"}
    assert dict(tables.dropped_prompts.counts) == {
        "first word of fewer than 3 sentences": 1,
        "first word starts with punctuation": 1,
    }


GOOD = "1\t1.5\tThe film\n", "1\t1.5\t.5\t[1, 2]\n"


@pytest.mark.parametrize(
    ("text", "rating", "reason"),
    [
        (b"2\t1.5\tcaf\xe9\n", b"2\t1.5\t.5\t[1, 2]\n", "not UTF-8"),
        (b"2\t1.5\n", b"2\t1.5\t.5\t[1, 2]\n", "not 3 tab-separated fields"),
        (b"2\t1.5\tA film\n", b"", "no usable line of ratings with this id"),
        (b"2\t1.5\tA film\n", b"2\t1.5\t.5\t__import__('os')\n", "no usable line of ratings with this id"),
        (b"2\t1.5\tA film\n", b"2\t1.5\t.5\t[1, 2, 9]\n", "no usable line of ratings with this id"),
        (b"2\t1.5\tA film\n", b"2\t1\t.5\t[1]\n", "no usable line of ratings with this id"),
        (b"2\t1.0\tA film\n", b"2\t1.5\t.5\t[1, 2]\n", "stated mean is not the mean of the ratings"),
        (b"2\tnan\tA film\n", b"2\tnan\t.5\t[1, 2]\n", "stated mean is not the mean of the ratings"),
        (b"2\tx\tA film\n", b"2\t1.5\t.5\t[1, 2]\n", "mean is not a number"),
        (b"2\t1.5\t \n", b"2\t1.5\t.5\t[1, 2]\n", "empty sentence"),
        (b"2\t1.5\tThe  film \n", b"2\t1.5\t.5\t[1, 2]\n", "same sentence as an earlier line"),
        (b"1\t1.5\tA film\n", b"", "a second line with the same id"),
    ],
)
def test_bad_lines_are_dropped_and_counted(text: bytes, rating: bytes, reason: str) -> None:
    """Bug: one bad line ends the build, is evaluated as Python, or disappears without a count."""
    parsed = parse(GOOD[0].encode() + text, GOOD[1].encode() + rating)
    assert [s.text for s in parsed.sentences] == ["The film"]
    assert dict(parsed.dropped.counts) == {reason: 1}
    assert parsed.rows_in == 2
    assert len(parsed.dropped.examples[reason]) == 1


def test_bad_ratings_are_counted_by_their_own_reason() -> None:
    """Bug: the card says that a sentence has no ratings, but not why."""
    ratings = GOOD[1] + "2\t1\t.5\t[1]\n3\t1\t.5\tnothing\n4\t1.5\t.5\t[1, 2]\n"
    parsed = parse(GOOD[0].encode(), ratings.encode())
    assert dict(parsed.dropped_ratings.counts) == {
        "fewer than two raters": 1,
        "ratings are not a list of whole numbers from -4 to 4": 1,
        "no sentence with this id": 1,
    }


def test_card_adds_up(lines: list[Line], to_source: ToSource) -> None:
    """Bug: a card whose counts leave rows unexplained."""
    texts, ratings = to_source(lines)
    parsed = parse(texts + b"bad line\n9\t0\tcaf\xe9\n", ratings)
    tables = tables_of(parsed.sentences)
    source = {"data": "d", "package": "p", "licence": "l", "sha256": "s", "cite": "c"}
    card = make_card(parsed, tables, source=source, recipe={"seed": 0})
    dropped = sum(entry["count"] for entry in card["dropped"]["sentences"].values())
    assert sum(card["sentences_used"].values()) + dropped == card["sentences_read"] == len(lines) + 2
    assert card["rows"] == {name: len(tables.rows[name]) for name in SETS}
    for split in ("train", "validation"):
        histogram = card["comparisons_by_number_of_responses"][split]
        assert sum(histogram.values()) == card["rows"][f"comparisons/{split}"]
        assert sum(int(k) * n for k, n in histogram.items()) == card["sentences_used"][f"comparisons/{split}"]
        # by hand: all ordered pairs, each seen twice
        pairs = sum(
            abs(a - b) >= 1
            for row in tables.rows[f"comparisons/{split}"]
            for i, a in enumerate(row["ratings_all"])
            for j, b in enumerate(row["ratings_all"])
            if i != j
        )
        assert card["pairs_rated_at_least_1_apart"][split] * 2 == pairs
    assert sum(card["sentences_by_rounded_mean_rating"].values()) == len(lines)
    assert "not UTF-8 | 1 |" in render(card)


def test_fingerprint_follows_rows_and_recipe(sentences: list[Sentence]) -> None:
    """Bug: a fingerprint that misses a changed rating or option."""
    tables = tables_of(sentences)
    first = rows_fingerprint(tables.rows, {"seed": 0})
    assert first == rows_fingerprint(tables.rows, {"seed": 0})
    assert first != rows_fingerprint(tables.rows, {"seed": 1})
    tables.rows["comparisons/train"][0]["ratings"][0] += 0.5
    assert first != rows_fingerprint(tables.rows, {"seed": 0})
