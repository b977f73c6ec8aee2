"""Splits, stages, limits and the leak gate: what belongs together stays together, and nothing held out is trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared import Built, pairs, text

from rlhf.base.errors import UserError
from rlhf.data_prep import DataConfig, Source
from rlhf.data_prep.hashes import units
from rlhf.data_prep.prepare import build
from rlhf.data_prep.prepare.leaks import forbidden_pairs
from rlhf.data_prep.prepare.plan import Plan
from rlhf.data_prep.prepare.recipe import KINDS, SPLITS
from rlhf.data_prep.prepare.splits import Prompts, assign_stages

Build = Callable[..., Built]
HELD_OUT = ("validation", "test")


@pytest.mark.parametrize("seed", [0, 1])
def test_no_prompt_on_two_sides(build_data: Build, seed: int) -> None:
    """Catches: PPO evaluated on prompts that SFT or the reward model was trained on; the same prompt in two stages."""
    rows = [{**row, "prompt": text(i % 60)} for i, row in enumerate(pairs(240))]
    built = build_data(rows, seed=seed, validation_share=0.2, test_share=0.1)
    trained = {kind: built.prompts(kind, "train") for kind in KINDS}
    for kind in KINDS:
        assert trained[kind]
        for other in KINDS:
            assert not trained[kind] & built.prompts(other, *HELD_OUT)
            assert kind == other or not trained[kind] & trained[other]
    assert not built.prompts("prompts", "validation") & built.prompts("prompts", "test")
    assert sum(len(built.rows(kind)) for kind in KINDS) + len(built.rejected) == 240
    assert built.card["records_used"] == 240 - len(built.rejected)


def test_splits_do_not_move_when_rows_are_added(build_data: Build) -> None:
    """Catches: a split by row number or by a shuffled list: yesterday's evaluation rows are trained on today."""
    rows = pairs(200)
    before = build_data(rows[:120], validation_share=0.2, test_share=0.1).places
    after = build_data(rows[::-1], folder="more", validation_share=0.2, test_share=0.1).places
    assert len(before) == 120 and {p: after[p] for p in before} == before
    other_seed = build_data(rows[:120], folder="seed", seed=1, validation_share=0.2, test_share=0.1).places
    assert sum(before[p].split("/")[1] != other_seed[p].split("/")[1] for p in before) > 20


def test_near_duplicates_and_follow_ups_stay_together(build_data: Build) -> None:
    """Catches: "What is X?" in training and "what is X" in evaluation; a conversation whose later turns are held out while its
    opening is trained on."""
    families = []
    for i in range(60):
        prompt = text(i, 20)
        opening = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text(500 + i)}]
        families.append({
            "plain": {"prompt": [{"role": "user", "content": prompt}]},
            "near": {"prompt": [{"role": "user", "content": prompt + "?!"}]},
            "later": {"prompt": [*opening, {"role": "user", "content": f"and {text(900 + i)}"}]},
        })  # fmt: skip
    rows = [
        {**row, "completion": text(2000 + 3 * i + k)}
        for i, f in enumerate(families)
        for k, row in enumerate(f.values())
    ]
    built = build_data(rows, validation_share=0.3)
    places = built.places
    last = [[f[name]["prompt"][-1]["content"] for name in ("plain", "near", "later")] for f in families]
    found = [{places[p] for p in family if p in places} for family in last]
    assert all(len(where) == 1 for where in found)
    assert len({next(iter(where)) for where in found}) >= 4, "they are not all in one place"
    assert built.card["splits"]["groups_of_prompts"] == 60


def test_stage_weights_and_availability(build_data: Build) -> None:
    """Catches: weights that are not read; a group sent to a stage that its rows cannot serve."""
    rows = pairs(400)
    shares = Counter(p.split("/")[0] for p in build_data(rows, stage_weights=[1, 1, 2]).places.values())
    assert shares["prompts"] / 400 == pytest.approx(0.5, abs=0.08) and shares["demonstrations"] / 400 == pytest.approx(
        0.25, abs=0.07
    )
    none = build_data(rows, folder="none", stage_weights=[0, 1, 1])
    assert none.rows("demonstrations") == [] and not (none.folder / "demonstrations").exists()
    only = build_data([{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows], folder="only")
    assert only.rows("comparisons") == [] and len(only.places) == 400


def test_shared_stages(build_data: Build) -> None:
    """Catches: `shared` that still divides the prompts."""
    built = build_data(pairs(60), stages="shared", validation_share=0.3)
    assert built.prompts("demonstrations") == built.prompts("comparisons") == built.prompts("prompts")
    assert built.prompts("demonstrations", "train") == built.prompts("prompts", "train")


def test_uses_of_a_source(tmp_path: Path, write_jsonl: Callable[..., Path], build_data: Build) -> None:
    """Catches: responses of weak models, meant for comparisons only, that become demonstrations."""
    weak = Source(path=str(write_jsonl(pairs(60), "weak.jsonl")), uses=["comparisons"])
    good = [{"prompt": text(i), "completion": text(i + 1)} for i in range(5000, 5060)]
    good_source = Source(path=str(write_jsonl(good, "good.jsonl")), uses=["demonstrations"])
    built = build_data(None, weak, good_source, validation_share=0.3)
    assert {row["source"] for row in built.rows("comparisons")} == {"weak.jsonl"}
    assert {row["source"] for row in built.rows("demonstrations")} == {"good.jsonl"}
    assert built.rows("prompts") == [] and built.rejected == []


def test_split_by_user_and_document(build_data: Build) -> None:
    """Catches: one user's rows on both sides: the model is tested on people that it knows."""
    rows = [{**row, "user": f"u{i % 25}", "document": f"d{i % 40}"} for i, row in enumerate(pairs(300))]
    owner = {row["prompt"]: row for row in rows}
    for what in ("user", "document"):
        built = build_data(rows, folder=what, split_by=what, validation_share=0.3, test_share=0.1)
        splits: dict[str, set[str]] = {}
        for prompt, place in built.places.items():
            splits.setdefault(owner[prompt][what], set()).add(place.split("/")[1])
        assert all(len(found) == 1 for found in splits.values()) and set.union(*splits.values()) >= {
            "train",
            "validation",
        }


def test_one_template_for_all_is_refused(build_data: Build) -> None:
    """Catches: prompts that share a long template, all of them one "near-duplicate" group in one split."""
    frame = text(1, 60)
    rows = [{"prompt": f"{frame} {i}", "completion": text(i)} for i in range(100)]
    with pytest.raises(
        UserError, match=r"100 of 100 prompts are near-duplicates .* raise similarity \(now 0.8; 1 turns"
    ):
        build_data(rows)
    assert len(build_data(rows, similarity=1.0, validation_share=0.2).places) == 100


def test_too_few_rows_for_a_split(build_data: Build) -> None:
    """Catches: an empty validation file that a stage trips over an hour later."""
    with pytest.raises(UserError, match=r"no \w+ for (train|validation) \(train \d, .* change validation_share"):
        build_data(pairs(3))
    with pytest.raises(UserError, match="no row is left"):
        build_data([{"prompt": "<|im_start|>", "completion": "a"}])


def test_hash_positions_are_uniform_and_fixed() -> None:
    """Catches: another hash on another machine or version: every split would move; or one that crowds on one side."""
    values = units(np.arange(1, 20001, dtype=np.uint64), 0, "split")
    assert np.histogram(values, bins=10, range=(0, 1))[0] == pytest.approx([2000] * 10, abs=200)
    assert values[:3].tolist() == units(np.array([1, 2, 3], dtype=np.uint64), 0, "split").tolist()
    assert not np.array_equal(values, units(np.arange(1, 20001, dtype=np.uint64), 0, "order"))
    assert round(float(values[0]), 12) == 0.050280074545, "as it was when the first data set was split by it"


# Limits


def test_most_prompts_of_a_user(build_data: Build) -> None:
    """Catches: a limit of rows in place of prompts; or one user of a thousand rows who outweighs the rest."""
    rows = [
        {**row, "prompt": text(i % 45), "user": "busy" if i % 45 < 30 else f"u{i % 45}"}
        for i, row in enumerate(pairs(90))
    ]
    built = build_data(rows, stages="shared", validation_share=0.3, max_prompts_per_user=10, similarity=1.0)
    prompts = built.prompts("comparisons")
    assert len(prompts & {text(i) for i in range(30)}) == 10 and len(prompts & {text(i) for i in range(30, 45)}) == 15
    assert built.reasons("limits") == {"more than 10 prompts of the same user": 40}


def test_long_common_prefix(build_data: Build) -> None:
    """Catches: two pairs of one prompt taken for two prompts with a common prefix; short prompts that have no prefix dropped."""
    frame = "Translate the following sentence into French, and keep its tone: "
    rows = [{"prompt": frame + text(i), "completion": text(i + 99)} for i in range(10)]
    rows += [{"prompt": text(i, 4), "completion": text(i + 99)} for i in range(100, 140)]
    rows += [{"prompt": text(100, 4), "completion": text(7777)}]
    built = build_data(rows, stages="shared", validation_share=0.3, min_shared_prefix=len(frame))
    assert len([p for p in built.prompts("prompts") if p.startswith("Translate")]) == 1
    assert built.reasons("limits") == {f"shares its first {len(frame)} characters with another prompt": 9}
    assert len(built.rows("demonstrations")) == 42


def test_limit_of_a_source(write_jsonl: Callable[..., Path], build_data: Build) -> None:
    """Catches: the first rows of a sorted file taken for a sample."""
    source = Source(path=str(write_jsonl(pairs(120), "many.jsonl")), limit=40)
    built = build_data(None, source, stages="shared", validation_share=0.3)
    assert len(built.rows("prompts")) == 40
    assert built.prompts("prompts") != {row["prompt"] for row in pairs(40)}


# Mix


def test_mix_has_the_proportions_of_the_weights(write_jsonl: Callable[..., Path], build_data: Build) -> None:
    """Catches: weights that are not read, rows repeated to reach a share, held-out rows thinned with the rest."""
    a = Source(path=str(write_jsonl(pairs(300), "a.jsonl")), weight=3)
    b = Source(path=str(write_jsonl(pairs(300, first=1000), "b.jsonl")), weight=1)
    mixed = build_data(None, a, b, stages="shared", validation_share=0.2)
    plain = build_data(
        None, Source(path=a.path), Source(path=b.path), folder="plain", stages="shared", validation_share=0.2
    )
    for kind in KINDS:
        counts = Counter(row["source"] for row in mixed.rows(kind, "train"))
        all_of_a = len([row for row in plain.rows(kind, "train") if row["source"] == "a.jsonl"])
        assert counts == {"a.jsonl": all_of_a, "b.jsonl": all_of_a // 3}
        assert mixed.card["mix"][kind] == dict(counts)
        assert len(mixed.prompts(kind, "train")) == len(mixed.rows(kind, "train"))
        assert mixed.prompts(kind, "validation") == plain.prompts(kind, "validation")


# The leak gate


def leaky(count: int = 200) -> list[dict[str, Any]]:
    """Users whose prompts are other users' prompts, or nearly: a split by user has them on both sides."""
    rows = pairs(count)
    exact = [{**row, "prompt": rows[i]["prompt"]} for i, row in enumerate(pairs(20, first=1000))]
    near = [{**row, "prompt": rows[20 + i]["prompt"] + "?"} for i, row in enumerate(pairs(20, first=2000))]
    return [{**row, "user": f"u{i}"} for i, row in enumerate([*rows, *exact, *near])]


def test_gate_refuses_with_the_rows(tmp_path: Path, build_data: Build) -> None:
    """Catches: a gate that never closes, misses near-duplicates, or does not say which rows; data published all the same."""
    options: dict[str, Any] = {"split_by": "user", "validation_share": 0.3, "stages": "shared"}
    with pytest.raises(
        UserError, match=r"the leak gate found prompts on both sides of \d+ borders .*rows.jsonl, row .*on_leak: drop"
    ):
        build_data(leaky(), **options)
    assert not (tmp_path / "out").exists()
    lines = [json.loads(line) for line in (tmp_path / "out.leaks.jsonl").read_text().splitlines()]
    twins = {(line["prompt"], line["twin"]) for line in lines}
    assert any(one == other for one, other in twins) and any(one != other for one, other in twins)
    assert all(one.rstrip("?") == other.rstrip("?") for one, other in twins)
    assert all(len({place.split("/")[-1] for place in list(line)[:2]}) == 2 for line in lines)


def test_gate_can_drop_or_note(tmp_path: Path, build_data: Build) -> None:
    """Catches: `drop` that takes the held-out row, or leaves one of the two; `allow` that says nothing."""
    options: dict[str, Any] = {"split_by": "user", "validation_share": 0.3, "stages": "shared"}
    allowed = build_data(leaky(), on_leak="allow", **options)
    dropped = build_data(leaky(), folder="drop", on_leak="drop", **options)
    train, held_out = allowed.prompts("comparisons", "train"), allowed.prompts("comparisons", *HELD_OUT)
    assert train & held_out
    assert any(not o["allowed"] and o["near"] for o in allowed.card["leaks"]["overlaps"].values())
    assert "LEAK, let pass" in (allowed.folder / "card.md").read_text()
    bare = [
        {p.rstrip("?") for p in dropped.prompts("comparisons", *s)} for s in (("train",), ("validation",), ("test",))
    ]
    assert not bare[0] & bare[1] and not bare[0] & bare[2] and not bare[1] & bare[2]
    assert dropped.prompts("comparisons", "test") == allowed.prompts("comparisons", "test")
    assert all(o["allowed"] for o in dropped.card["leaks"]["overlaps"].values())
    assert sum(dropped.reasons("leaks").values()) > 5


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that are called disjoint get every prompt that they can serve, so that the gate alone can find it."""

    def share(plan: Plan, prompts: Prompts, config: DataConfig) -> None:
        assign_stages(plan, prompts, replace(config, stages="shared"))

    monkeypatch.setattr(build, "assign_stages", share)


def test_gate_refuses_prompts_that_two_stages_train_on(
    tmp_path: Path, careless: None, write_jsonl: Callable[..., Path], build_data: Build
) -> None:
    """Catches: a gate that looks only between splits: the policy is optimised on prompts that its reward model has learned."""
    borders = [f"{one}/train / {other}/train" for one, other in combinations(KINDS, 2)]
    with pytest.raises(
        UserError, match=r"on both sides of 3 borders \(comparisons/train and demonstrations/train: \d+"
    ):
        build_data(pairs(60), validation_share=0.3)
    lines = [json.loads(line) for line in (tmp_path / "out.leaks.jsonl").read_text().splitlines()]
    assert {frozenset(list(line)[:2]) for line in lines} == {frozenset(border.split(" / ")) for border in borders}
    own = [
        Source(path=str(write_jsonl(pairs(60, first=1000 * k), f"{kind}.jsonl")), uses=[kind])
        for k, kind in enumerate(KINDS, start=1)
    ]
    dropped = build_data(pairs(60), *own, folder="drop", validation_share=0.3, on_leak="drop")
    trained = [dropped.prompts(kind, "train") for kind in KINDS]
    assert sum(map(len, trained)) == len(set.union(*trained)) > 0
    allowed = build_data(pairs(60), folder="allow", validation_share=0.3, on_leak="allow")
    assert [allowed.card["leaks"]["overlaps"][border]["allowed"] for border in borders] == [False] * 3


@pytest.mark.parametrize(
    ("stages", "split_by"), [("disjoint", "prompt"), ("shared", "prompt"), ("disjoint", "rater"), ("shared", "rater")]
)
def test_every_border_of_the_gate(stages: Any, split_by: Any) -> None:
    """Catches: a border that the gate lets pass, or closes, against docs/data.md; or rows dropped from the held-out side."""
    config = DataConfig(sources=[Source(path="x")], stages=stages, split_by=split_by)
    names = [f"{kind}/{split}" for kind in KINDS for split in SPLITS]
    forbidden = list(forbidden_pairs(names, config))
    for one, other in combinations(names, 2):
        splits = {one.split("/")[1], other.split("/")[1]}
        refused = len(splits) == 2 or (splits == {"train"} and stages == "disjoint")
        if split_by == "rater" and {"comparisons/validation", "comparisons/test"} & {one, other}:
            refused = False
        assert [(one, other) in forbidden, (other, one) in forbidden].count(True) == refused, (one, other)
    assert all(SPLITS.index(keeps.split("/")[1]) >= SPLITS.index(loses.split("/")[1]) for keeps, loses in forbidden)


def test_stages_that_may_share_prompts(write_jsonl: Callable[..., Path], build_data: Build) -> None:
    """Catches: a split by user that gives one prompt to two stages; or a refusal where stages are shared on purpose."""
    prompts = [text(i) for i in range(60)]
    demonstrations = [{"prompt": p, "completion": text(i + 500), "user": f"a{i}"} for i, p in enumerate(prompts)]
    questions = [{"prompt": p + " ", "user": f"b{i}"} for i, p in enumerate(prompts)]
    sources = [
        Source(path=str(write_jsonl(demonstrations, "d.jsonl")), uses=["demonstrations"]),
        Source(path=str(write_jsonl(questions, "p.jsonl")), uses=["prompts"]),
    ]
    # groups serve one stage: with both kinds at hand, the gate has nothing to refuse between stages
    disjoint = build_data(None, *sources, split_by="user", validation_share=0.3, on_leak="allow")
    overlaps = disjoint.card["leaks"]["overlaps"]
    assert not any("demonstrations/train" in pair and "prompts/train" in pair for pair in overlaps)
    shared = build_data(None, *sources, folder="shared", validation_share=0.3, stages="shared")
    assert shared.card["leaks"]["overlaps"]["demonstrations/train / prompts/train"]["allowed"]


# Counts of what became of the rows


def test_a_count_that_shrinks_is_explained(build_data: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """2,312 pairs became 807 training comparisons, and nothing said that the other stages have their prompts."""
    rows = [*pairs(240), *pairs(10)]
    card = build_data(rows, validation_share=0.2, test_share=0.1, similarity=1.0).card
    for kind in KINDS:
        counts = card["uses"][kind]
        assert counts["possible"] == 250 and counts["left_out"]["duplicates"] == 10
        assert {split: counts[split] for split in SPLITS} == {s: card["rows"].get(f"{kind}/{s}", 0) for s in SPLITS}
        assert counts["possible"] - sum(counts["left_out"].values()) == sum(counts[split] for split in SPLITS)
    given = card["uses"]["comparisons"]["left_out"]["stages"]
    shown = capsys.readouterr().err
    assert f"data: 250 rows could be comparisons; {card['rows']['comparisons/train']} train" in shown
    assert f"data:   {given} left out: prompts are shared out, and theirs serve another stage (stages: shared" in shown
    shared = build_data(rows, folder="shared", similarity=1.0, stages="shared").card["uses"]["comparisons"]
    assert "stages" not in shared["left_out"]


def test_every_step_that_leaves_rows_out_is_explained(build_data: Build) -> None:
    """Catches: a step that narrows a set and has no count, so that the counts do not add up."""
    rows = [{**row, "prompt": text(i % 90)} for i, row in enumerate(pairs(240))]
    rows += [{**row, "prompt": text(200 + i % 3) + str(i), "user": "one"} for i, row in enumerate(pairs(40))]
    card = build_data(rows, validation_share=0.2, similarity=1.0, max_prompts_per_user=5, on_leak="drop").card
    assert card["uses"]["prompts"]["left_out"]["repeated"] > 0 and card["uses"]["prompts"]["left_out"]["limits"] == 35
    for counts in card["uses"].values():
        assert counts["possible"] - sum(counts["left_out"].values()) == sum(counts[split] for split in SPLITS)
