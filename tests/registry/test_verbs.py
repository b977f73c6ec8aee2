"""The registry's verbs: lineage, diff, tag, prune."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry.test_registry import FIELDS, chain, publish, rewrite_manifest
from toys import Call

from rlhf.base.errors import UserError
from rlhf.registry import Artifact, Registry
from rlhf.registry.lineage import ancestors, difference, prunable

Verb = Callable[..., Call]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def verb(call: Callable[..., Call], registry: Registry) -> Verb:
    """`verb("lineage", "ppo/demo")`"""
    return lambda *words: call("rlhf.sharing.__main__", *words, "--registry", registry.root)


def with_data(registry: Registry, stage: str, parents: tuple[Artifact, ...] = (), **config: Any) -> Artifact:
    return publish(registry, stage, parents, config={**FIELDS["config"], "dataset": "outputs/demo/data", **config})


def test_lineage_goes_down_to_the_data(registry: Registry, verb: Verb) -> None:
    """A tree that ends at the first models, so that nobody sees what data a policy comes from."""
    sft = with_data(registry, "sft")
    reward = with_data(registry, "reward", (sft,))
    ppo = with_data(registry, "ppo", (sft, reward))
    shown = verb("lineage", "ppo/demo")
    assert shown.code == 0, shown.err
    lines = [line.strip("│├└─ ") for line in shown.out.splitlines()]
    assert lines[0].startswith(f"ppo/demo@1  {ppo.hash[:12]}")
    assert [line.split()[0] for line in lines] == [
        *(
            "ppo/demo@1",
            "data",
            "sft/demo@1",
            "data",
            "base",
            "reward/demo@1",
            "data",
            "sft/demo@1",
            "data",
            "base",
            "made",
        ),
    ]
    assert "outputs/demo/data  ef  train 24" in shown.out and "pypi:smollm2-135m-instruct" in shown.out
    tree = json.loads(verb("lineage", "ppo/demo", "--json").out)
    assert tree["made_from"][1]["made_from"][0]["hash"] == sft.hash
    last = verb("lineage", "sft/demo").out.splitlines()[-1]
    assert sorted(last.removeprefix("made from it: ").split(", ")) == ["ppo/demo@1", "reward/demo@1"]
    order = [line.reference for line in ancestors(registry.lineage(ppo))]
    assert order == ["sft/demo@1", "reward/demo@1", "ppo/demo@1"], "parents before children, each once"


def test_lineage_marks_what_is_gone(registry: Registry, verb: Verb) -> None:
    """A parent that was made again in place passes for the one that the child was made from."""
    sft, _, _ = chain(registry)
    rewrite_manifest(sft, recipe="other")
    assert "was altered since" in verb("lineage", "ppo/demo").out


def test_diff_shows_what_differs_and_nothing_else(registry: Registry, verb: Verb) -> None:
    """A difference in nested data that is not shown; or two runs that differ in nothing but their folder and time."""
    first = publish(registry, config={"lr": 1e-4, "name": "a", "output_dir": "x"}, metrics={"loss": 1.25, "gone": 1.0})
    second = publish(
        registry,
        config={"lr": 2e-4, "name": "a", "output_dir": "y"},
        data={"fingerprint": "ef", "rows": {"train": 30}},
        metrics={"loss": 1.0},
    )
    assert [tuple(one) for one in difference(first, second)] == [
        ("data", "rows.train", 24, 30),
        ("config", "lr", 1e-4, 2e-4),
        ("metrics", "loss", 1.25, 1.0),
        ("metrics", "gone", 1.0, None),
    ]
    shown = verb("diff", "sft/demo@1", "sft/demo@2")
    assert shown.code == 0 and "-0.25" in shown.out and "0.0002" in shown.out and "output_dir" not in shown.out
    assert json.loads(verb("diff", "sft/demo@1", "sft/demo@2", "--json").out)[0]["name"] == "rows.train"
    assert "do not differ" in verb("diff", "sft/demo@1", "sft/demo@1").out
    assert "did you mean 'sft/demo'" in verb("diff", "sft/demo@1", "sft/dmo").complaint


def test_a_tag_stands_for_a_version(registry: Registry, verb: Verb) -> None:
    """A tag that changes an artefact's hash, stays on two versions, or is taken for a version's number."""
    first, second = publish(registry), publish(registry)
    assert verb("tag", "sft/demo@1", "best").code == 0
    assert registry.get("sft/demo@best") == first and registry.read("sft/demo@1").hash == first.hash
    verb("tag", "sft/demo", "best")
    assert registry.get("sft/demo@best") == second and registry.tags("sft", "demo") == {"best": 2}
    assert "does not have the tag" in verb("tag", "sft/demo@1", "best", "--remove").complaint
    assert "tags: best" in verb("show", "sft/demo@bst").complaint
    assert "no tag" in verb("tag", "sft/demo", "7").complaint
    assert verb("tag", "sft/demo", "best", "--remove").code == 0 and registry.tags("sft", "demo") == {}
    assert verb("verify").code == 0, "a tag is no stray file"
    (registry.root / "sft" / "demo" / "tags.json").write_text("[1")
    with pytest.raises(UserError, match="tag again"):
        registry.get("sft/demo@best")


def test_prune_spares_what_is_needed(registry: Registry, verb: Verb) -> None:
    """A policy whose SFT model is deleted under it: it cannot be loaded any more."""
    used = publish(registry)
    publish(registry, "ppo", [used])
    tagged, loose = publish(registry), publish(registry)
    publish(registry)
    registry.tag(tagged, "best")
    assert [a.reference for a in prunable(registry, ["sft/demo", "ppo/demo"], 1)] == [loose.reference]
    dry = verb("prune")
    assert "would delete sft/demo@3" in dry.out and "--yes" in dry.out and len(registry.versions("sft", "demo")) == 4
    done = verb("prune", "sft/demo", "--yes")
    assert "deleted sft/demo@3" in done.out and registry.versions("sft", "demo") == [1, 2, 4]
    assert verb("verify").code == 0
    assert publish(registry).version == 5
    assert "did you mean 'sft/demo'" in verb("prune", "sft/dem").complaint
    assert "from 1" in verb("prune", "--keep", "0").complaint


def test_prune_ends_a_deletion_that_was_killed(registry: Registry, verb: Verb) -> None:
    """Weights without a manifest, which no list shows and nothing removes."""
    half, whole = publish(registry), publish(registry)
    (half.path / "manifest.json").unlink()
    assert verb("prune").code == 0 and len(list(half.path.iterdir())) > 0, "a dry run deletes nothing"
    assert verb("prune", "--yes").code == 0
    assert list(half.path.iterdir()) == [] and registry.get("sft/demo") == whole
    assert publish(registry).version == 3, "its number is not used again"


def test_prune_takes_a_chain_from_its_end(registry: Registry, verb: Verb) -> None:
    """Parents that go before their children leave, for a moment or for ever, children that cannot be loaded."""
    old = chain(registry)
    chain(registry)
    doomed = prunable(registry, ["sft/demo", "reward/demo", "ppo/demo"], 1)
    assert [a.reference for a in doomed] == [old[2].reference, old[1].reference, old[0].reference]
    assert prunable(registry, ["sft/demo"], 1) == [], "its children stay"
    assert verb("prune", "--yes").code == 0 and verb("verify").code == 0
    assert {str(r) for r in registry.references()} == {"sft/demo@2", "reward/demo@2", "ppo/demo@2"}


@pytest.mark.parametrize("name", ["lineage", "diff", "tag", "export", "push", "pull", "reproduce"])
def test_an_unknown_artefact_offers_the_nearest(registry: Registry, verb: Verb, tmp_path: Path, name: str) -> None:
    """A traceback, or a bare `not found`, for a slip of the keyboard."""
    publish(registry)
    more = {
        "diff": ["sft/demo"],
        "tag": ["best"],
        "export": [tmp_path / "x"],
        "push": [tmp_path],
        "pull": [registry.root],
    }
    assert "did you mean 'sft/demo'" in verb(name, "sft/dmeo", *more.get(name, [])).complaint
