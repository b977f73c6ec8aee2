"""Near-duplicates: the similarity that was asked for, found with the probability that was promised, in any script."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prepared import Built, pairs, text

from rlhf.data_prep.prepare.dedup import Groups, band_rows, jaccard, near_duplicates, shingles
from rlhf.data_prep.prepare.staged import comparable

Build = Callable[..., Built]


def groups_of(texts: list[str], similarity: float, scratch: Path) -> list[int]:
    rows = [(t,) for t in texts]
    return near_duplicates(lambda start, stop: rows[start:stop], len(rows), similarity, scratch).tolist()


def naive(one: str, other: str) -> float:
    """Jaccard similarity of the sets of all runs of six bytes."""
    a, b = ({t[i : i + 6] for i in range(max(1, len(t) - 5))} for t in (one.encode(), other.encode()))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("one, other", [
    ("the river and the stone", "the river and the cloud"), ("abc", "abc"), ("abc", "abd"), ("", ""), ("abcdef", "abcdefg"),
    ("这部电影很好看我喜欢", "这部电影很好看我讨厌"), ("aaaaaaaaaaaa", "aaaaaaa"), ("é" * 9, "è" * 9),
])  # fmt: skip
def test_jaccard(one: str, other: str) -> None:
    """Catches: windows that run into the padding, or bytes in the wrong order, or one shingle too few."""
    assert jaccard(one, other) == pytest.approx(naive(one, other))
    assert len(shingles(one)) == max(1, len(one.encode()) - 5)


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_find_what_is_promised(similarity: float) -> None:
    """Catches: bands that miss one pair in ten just at the similarity that was asked for."""
    bands, rows = band_rows(similarity)
    assert bands * rows <= 128
    assert 1 - (1 - similarity**rows) ** bands >= 0.99


def edited(words: list[str], changes: int, generator: random.Random) -> list[str]:
    copy = list(words)
    for position in generator.sample(range(len(copy)), changes):
        copy[position] = f"new{generator.randrange(10**6)}"
    return copy


def test_planted_near_duplicates(tmp_path: Path) -> None:
    """Catches: near-duplicates that are missed, and texts that are called so and are not. What is one is counted exactly."""
    generator = random.Random(5)
    texts, of = [text(i, 60) for i in range(400)], {}
    for number in range(200):
        of[len(texts)] = number
        texts.append(" ".join(edited(texts[number].split(), generator.randrange(0, 9), generator)))
    found = groups_of(texts, 0.8, tmp_path)
    near = {copy for copy, original in of.items() if naive(texts[copy], texts[original]) >= 0.8}
    called = {row for row, first in enumerate(found) if first != row}
    assert 60 < len(near) < 190
    assert called <= near, "every pair is compared exactly"
    assert len(near - called) <= 2
    assert list(tmp_path.iterdir()) == [], "the file of bands is gone"


def test_chinese_needs_no_words(tmp_path: Path) -> None:
    """Catches: shingles of words between spaces: a Chinese text is one word, and with one character changed another one."""
    base = "今年冬天非常寒冷，河里的水都结了冰，孩子们在冰上滑来滑去，笑声传得很远，老人们坐在窗前喝着热茶。"
    texts = [
        base,
        base.replace("寒冷", "严寒"),
        "昨天我在图书馆读了一本关于海洋的书，里面有许多美丽的图片和有趣的故事。",
    ]
    assert groups_of(texts, 0.7, tmp_path) == [0, 0, 2]


def test_the_first_stands_for_its_group(tmp_path: Path) -> None:
    """Catches: a later copy kept instead of the first; a chain of similar texts that breaks in two."""
    a = text(1, 60)
    b = a.replace(a.split()[5], "other", 1)
    c = b.replace(b.split()[30], "third", 1)
    assert groups_of([text(2, 60), a, text(3, 60), c, b, a], 0.8, tmp_path) == [0, 1, 2, 1, 1, 1]


def test_every_part_has_to_be_similar(tmp_path: Path) -> None:
    """Catches: a long prompt that makes near-duplicates of two short answers, yes and no."""
    prompt = text(1, 100)
    rows = [(prompt, "yes, of course"), (prompt, "no, never at all"), (prompt, "yes, of course")]
    found = near_duplicates(lambda start, stop: rows[start:stop], 3, 0.8, tmp_path)
    assert found.tolist() == [0, 1, 0]


def test_groups() -> None:
    """Catches: joins that depend on their order, or a first that is not the smallest."""
    generator = random.Random(0)
    joins = [(generator.randrange(50), generator.randrange(50)) for _ in range(40)]
    groups, naive_sets = Groups(50), [{i} for i in range(50)]
    for one, other in joins:
        groups.join(one, other)
        union = naive_sets[one] | naive_sets[other]
        for member in union:
            naive_sets[member] = union
    assert groups.firsts().tolist() == [min(s) for s in naive_sets]
    assert np.array_equal(groups.firsts(), [groups.first(i) for i in range(50)])


def test_exact_copies_after_normalisation(build_data: Build) -> None:
    """Catches: a copy that differs in case, white space or the width of its letters counted as another row."""
    rows = [{"prompt": text(2 * i), "completion": text(2 * i + 1)} for i in range(40)]
    copy = {"prompt": "  " + rows[0]["prompt"].upper().replace(" ", "\n"), "completion": rows[0]["completion"]}
    wide = {
        "prompt": rows[1]["prompt"].translate({ord(c): ord(c) + 0xFEE0 for c in "abc"}),
        "completion": rows[1]["completion"],
    }
    built = build_data([*rows, copy, wide], validation_share=0.3, stages="shared", similarity=1.0)
    assert built.reasons("duplicates") == {"copy of an earlier row": 2}
    assert [bad["data"]["note"] for bad in built.rejected if bad["step"] == "duplicates"] == [
        "of rows.jsonl, row 1", "of rows.jsonl, row 2",
    ]  # fmt: skip
    assert comparable(" Ａ\n B ") == "a b"


def test_near_duplicates_are_dropped_with_their_twin(build_data: Build) -> None:
    """Catches: pairs that share a prompt but not the answers taken for copies; a drop that does not say of what."""
    rows = pairs(40)
    near = {**rows[3], "chosen": rows[3]["chosen"] + "!"}
    other_answers = {"prompt": rows[4]["prompt"], "chosen": text(900), "rejected": text(901)}
    built = build_data([*rows, near, other_answers], validation_share=0.3, stages="shared")
    (bad,) = (bad for bad in built.rejected if bad["step"] == "duplicates")
    assert (bad["row"], bad["reason"], bad["data"]["note"]) == (
        41,
        "near-duplicate of an earlier row",
        "of rows.jsonl, row 4",
    )
    assert len(built.rows("comparisons")) == 41
    off = build_data([*rows, near], folder="off", validation_share=0.3, stages="shared", similarity=1.0)
    assert len(off.rows("comparisons")) == 41
