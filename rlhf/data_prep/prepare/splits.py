"""Groups, splits and stages of prompts; every choice is a hash of the rows' own content.

A *group* is a set of prompts that are near-duplicates or share their opening. The smallest of its members' hashes decides
its split: rows that arrive later can move a group from training to evaluation, never back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.base.errors import UserError
from rlhf.data_prep.hashes import units
from rlhf.data_prep.prepare.dedup import Groups, first_of_equal, near_duplicates
from rlhf.data_prep.prepare.plan import Plan
from rlhf.data_prep.prepare.recipe import KINDS, SPLITS, DataConfig
from rlhf.data_prep.prepare.staged import Staged

#: A group that holds more than this share of all prompts is a template, not a set of near-duplicates.
LARGEST_GROUP = 0.25
#: Fewest prompts whose largest group is looked at.
FEWEST_PROMPTS = 50


@dataclass(frozen=True)
class Prompts:
    """Groups of prompts; entry i belongs to staged row i, and is -1 where that row was out of the plan already."""

    near: np.ndarray
    """(N,) row of the first prompt of which this one is a near-duplicate, or its own."""
    group: np.ndarray
    """(N,) as `near`, with prompts of the same opening joined."""


def deduplicate(plan: Plan, config: DataConfig, scratch: Path) -> None:
    """Drop copies and near-duplicates of earlier rows, and rows that contradict each other.

    Rows that order the same responses differently, without naming raters, are all dropped: nothing shows which is right.
    Rows are near-duplicates when their prompts are, and their answers too.
    """
    _drop_contradictions(plan)
    rows, firsts = plan.rows, first_of_equal(plan.hashes("content"))
    later = firsts != np.arange(len(rows))
    twins = dict(zip(rows[later].tolist(), rows[firsts[later]].tolist(), strict=True))
    plan.drop(
        rows[later], "duplicates", "copy of an earlier row", lambda row: f"of {plan.staged.record(twins[row]).place}"
    )
    if config.similarity >= 1:
        return
    rows = plan.rows[plan.staged.split[plan.alive] < 0]  # one text divided among raters of several splits is no copy
    texts = _Texts(plan.staged, ["prompt_key", "answer_key"], rows)
    firsts = near_duplicates(texts, len(rows), config.similarity, scratch)
    later = firsts != np.arange(len(rows))
    twins = dict(zip(rows[later].tolist(), rows[firsts[later]].tolist(), strict=True))
    plan.drop(
        rows[later],
        "duplicates",
        "near-duplicate of an earlier row",
        lambda row: f"of {plan.staged.record(twins[row]).place}",
    )


def _drop_contradictions(plan: Plan) -> None:
    rows = plan.rows[(plan.staged.raters[plan.alive] == 0) & (plan.staged.serves[plan.alive] & 2 > 0)]
    items, contents = plan.staged.hashes["item"][rows], plan.staged.hashes["content"][rows]
    firsts = first_of_equal(items)
    contradicted = np.unique(firsts[contents != contents[firsts]])
    plan.drop(
        rows[np.isin(firsts, contradicted)], "duplicates", "the same responses are ordered differently in another row"
    )


class _Texts:
    """Columns of chosen staged rows, read from disk."""

    def __init__(self, staged: Staged, columns: Sequence[str], rows: np.ndarray) -> None:
        self.data = staged.rows.select_columns(list(columns)).data
        self.columns, self.rows = columns, rows

    def __call__(self, start: int, stop: int) -> list[tuple[str, ...]]:
        texts: list[tuple[str, ...]] = []
        rows = self.rows[start:stop]
        for part in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):  # runs of neighbours at once
            table = self.data.fast_slice(int(part[0]), len(part))
            texts += zip(*(table.column(name).to_pylist() for name in self.columns), strict=True)
        return texts


def group_prompts(plan: Plan, config: DataConfig, scratch: Path) -> Prompts:
    """Return the groups of the prompts.

    Raises:
        UserError: one group holds more than `LARGEST_GROUP` of all prompts, so that a split by groups means nothing.
    """
    rows, hashes = plan.rows, plan.hashes("prompt")
    firsts = first_of_equal(hashes)
    unique = np.flatnonzero(firsts == np.arange(len(rows)))
    texts = _Texts(plan.staged, ["prompt_key"], rows[unique])
    near = np.arange(len(unique))
    if config.similarity < 1:
        near = near_duplicates(texts, len(unique), config.similarity, scratch)
    groups = Groups(len(unique))
    openings = first_of_equal(plan.hashes("opening")[unique])
    for position, (one, other) in enumerate(zip(near.tolist(), openings.tolist(), strict=True)):
        groups.join(position, one)
        groups.join(position, other)
    joined = groups.firsts()
    _check_largest(plan, joined, rows[unique], config)
    position_of = np.searchsorted(unique, firsts)  # of the unique prompt that each row has
    spread = [np.full(len(plan.staged), -1, dtype=np.int64) for _ in range(2)]
    for target, firsts_of in zip(spread, (near, joined), strict=True):
        target[rows] = rows[unique[firsts_of[position_of]]]
    return Prompts(near=spread[0], group=spread[1])


def _check_largest(plan: Plan, groups: np.ndarray, rows: np.ndarray, config: DataConfig) -> None:
    sizes = np.bincount(groups) if len(groups) else np.zeros(1, dtype=np.int64)
    largest = int(sizes.argmax())
    if config.split_by == "prompt" and len(groups) >= FEWEST_PROMPTS and sizes[largest] > LARGEST_GROUP * len(groups):
        example = plan.staged.record(rows[largest]).opening[:60]
        raise UserError(
            f"{sizes[largest]:,} of {len(groups):,} prompts are near-duplicates of one another or share their opening "
            f"({example!r}...): they would all land in one split. If they share a template, raise similarity "
            f"(now {config.similarity:g}; 1 turns near-duplicates off)"
        )


def limit_prompts(plan: Plan, config: DataConfig) -> None:
    """Limit prompts with a common prefix to one, those of a user, and the rows of a source; a hash chooses which stay.

    The first two are from InstructGPT, appendix A.3.
    """
    if config.min_shared_prefix is not None:
        reason = f"shares its first {config.min_shared_prefix} characters with another prompt"
        _keep_lowest(plan, plan.staged.hashes["prefix"], 1, config.seed, "prefix", reason)
    if config.max_prompts_per_user is not None:
        reason = f"more than {config.max_prompts_per_user} prompts of the same user"
        _keep_lowest(plan, plan.staged.hashes["user"], config.max_prompts_per_user, config.seed, "user", reason)
    for number, source in enumerate(config.sources):
        rows = plan.rows[plan.staged.source[plan.alive] == number]
        if source.limit is not None and len(rows) > source.limit:
            order = np.argsort(units(plan.staged.hashes["content"][rows], config.seed, "limit"), kind="stable")
            plan.drop(np.sort(rows[order[source.limit :]]), "limits", f"more than {source.limit} rows of {source.name}")


def _keep_lowest(plan: Plan, owners: np.ndarray, most: int, seed: int, purpose: str, reason: str) -> None:
    """Drop all but the `most` prompts of lowest hash of each owner, with all their rows; owner 0 is nobody."""
    rows = plan.rows[owners[plan.alive] != 0]
    if len(rows) == 0:
        return
    prompts = plan.staged.hashes["prompt"][rows]
    order = np.lexsort((prompts, units(prompts, seed, purpose), owners[rows]))
    owner, prompt = owners[rows][order], prompts[order]
    new_owner = np.r_[True, owner[1:] != owner[:-1]]
    new_prompt = new_owner | np.r_[True, prompt[1:] != prompt[:-1]]
    number = np.cumsum(new_prompt)  # counted over all owners; less those of earlier owners
    place = number - np.maximum.accumulate(np.where(new_owner, number, 0)) + 1
    plan.drop(np.sort(rows[order[place > most]]), "limits", reason)


def assign_splits(plan: Plan, prompts: Prompts, config: DataConfig) -> None:
    """Give every row its split: by its prompt group, or by its user or document; a rater's split stays.

    Raises:
        UserError: no row of a source names a user or document, and the split is by these.
    """
    rows = plan.rows
    positions = _lowest_in_group(plan, prompts, config.seed)
    if config.split_by in ("user", "document"):
        owners = plan.hashes(config.split_by)
        _check_named(plan, owners, config)
        positions = np.where(owners != 0, units(owners, config.seed, "split"), positions)
    test, held_out = config.test_share, config.test_share + config.validation_share
    split = np.where(positions < test, 2, np.where(positions < held_out, 1, 0)).astype(np.int8)
    fixed = plan.staged.split[rows]
    # A prompt that is held out trains nothing, whoever rated it.
    contrary = (fixed == SPLITS.index("train")) & (split != SPLITS.index("train"))
    plan.split[rows] = np.where(fixed >= 0, fixed, split)
    plan.drop(rows[contrary], "splits", "rated by a rater of training, but its prompt is held out")


def _lowest_in_group(plan: Plan, prompts: Prompts, seed: int) -> np.ndarray:
    """Return (n,) for each row of the plan the lowest number in [0, 1) of the prompts in its group."""
    own = units(plan.hashes("prompt"), seed, "split")
    lowest = np.ones(len(plan.staged))
    np.minimum.at(lowest, prompts.group[plan.rows], own)
    return lowest[prompts.group[plan.rows]]


def _check_named(plan: Plan, owners: np.ndarray, config: DataConfig) -> None:
    source = plan.staged.source[plan.alive]
    for number, of in enumerate(config.sources):
        if (source == number).any() and not owners[source == number].any():
            raise UserError(
                f"split_by {config.split_by}: no row of source {of.name} names one; map a column "
                f"(columns: {{{config.split_by}: THEIRS}}), or split by prompt"
            )


def assign_stages(plan: Plan, prompts: Prompts, config: DataConfig) -> None:
    """Decide the kinds of each row. Disjoint: every group serves one of the stages that its rows could serve.

    Weighted rendezvous hashing chooses it, so that a stage more or less moves no more groups than it must.
    """
    rows = plan.rows
    can = np.stack([plan.staged.serves[rows] & (1 << k) > 0 for k in range(len(KINDS))], axis=1)
    plan.becomes[rows] = can
    if config.stages == "disjoint":
        chosen = _stage_of_group(plan, prompts, can, config)
        for k, kind in enumerate(KINDS):
            elsewhere = rows[(chosen == k) & ~can[:, k]]
            plan.drop(elsewhere, "stages", f"its prompt serves {kind}, which this row cannot")
        plan.becomes[rows] &= chosen[:, None] == np.arange(len(KINDS))
        plan.becomes[~plan.alive] = False
    _check_useful(plan)


def drop_repeated_prompts(plan: Plan) -> None:
    """Take rows out of the prompts whose prompt is among them already."""
    copies = plan.rows[plan.becomes[plan.rows, KINDS.index("prompts")]]
    later = copies[first_of_equal(plan.staged.hashes["prompt"][copies]) != np.arange(len(copies))]
    plan.take_out(later, "prompts", "stages", "its prompt is among the prompts already")


def _stage_of_group(plan: Plan, prompts: Prompts, can: np.ndarray, config: DataConfig) -> np.ndarray:
    """Return (n,) the number of the kind that each row's group serves, -1 for none."""
    group = prompts.group[plan.rows]
    available = np.zeros((len(plan.staged), len(KINDS)), dtype=bool)
    np.logical_or.at(available, group, can)
    # The member of lowest position stands for the group, as in the splits.
    key = (_lowest_in_group(plan, prompts, config.seed) * 2.0**53).astype(np.uint64)
    cost = np.full(can.shape, np.inf)
    for k, weight in enumerate(config.stage_weights):
        if weight > 0:
            chance = np.maximum(units(key, config.seed, f"stage {KINDS[k]}"), 2.0**-53)
            cost[:, k] = np.where(available[group, k], -np.log(chance) / weight, np.inf)
    return np.where(np.isfinite(cost).any(axis=1), cost.argmin(axis=1), -1)


def _check_useful(plan: Plan) -> None:
    """Drop rows that become nothing, with the reason."""
    useless = plan.rows[~plan.becomes[plan.rows].any(axis=1)]
    counts = np.array([len(record.responses) for record in plan.staged.records(useless)], dtype=np.int64)
    plan.drop(useless[counts > 1], "stages", "no two of its responses differ by enough, and it may become nothing else")
    plan.drop(useless[counts <= 1], "stages", "its source's uses, or a weight of 0, leave nothing that it could become")


def check_sizes(plan: Plan) -> None:
    """Raise `UserError` for a kind with rows for training and none for validation, or the reverse: its stage could not run."""
    sets = plan.sets()
    if not any(len(rows) for rows in sets.values()):
        raise UserError(f"no row is left: {plan.tally.reasons()}")
    for kind in KINDS:
        sizes = {split: len(sets[f"{kind}/{split}"]) for split in SPLITS}
        if sum(sizes.values()) and not (sizes["train"] and sizes["validation"]):
            rows = np.concatenate([sets[f"{kind}/{split}"] for split in SPLITS])
            if kind == "comparisons" and all(record.labelled for record in plan.staged.records(rows)):
                plan.take_out(rows, kind, "labels", "too few prompts with good and bad answers for comparisons")
                continue
            missing = "train" if not sizes["train"] else "validation"
            raise UserError(
                f"no {kind} for {missing} ({', '.join(f'{split} {count}' for split, count in sizes.items())}): "
                "too few groups of prompts; change validation_share, test_share, seed or stage_weights, or leave "
                f"{kind} out of the sources' uses"
            )
