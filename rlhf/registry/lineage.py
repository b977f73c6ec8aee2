"""Relations of artefacts: ancestors, children, differences, and versions that can be deleted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.base.json_files import entries, section
from rlhf.registry.manifest import Artifact, Reference
from rlhf.registry.store import Lineage, Registry


class Difference(NamedTuple):
    """A setting or figure in which two artefacts differ; None where one of them lacks it."""

    section: str
    name: str
    first: Any
    second: Any


SECTIONS = ("parents", "data", "inputs", "config", "metrics", "model", "software")


def difference(first: Artifact, second: Artifact) -> list[Difference]:
    """Return the differences of two artefacts, by section; times and places are ignored."""
    a, b = _sections(first), _sections(second)
    return [
        Difference(section, name, a[section].get(name), b[section].get(name))
        for section in SECTIONS
        for name in dict.fromkeys(itertools.chain(a[section], b[section]))
        if a[section].get(name) != b[section].get(name)
    ]


def _sections(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Return a manifest by section, with nested names joined by dots."""
    m = artifact.manifest
    places = ("registry", "output_dir", "resume")
    model = ("kind", "base_model", "base_model_revision", "tokenizer_hash", "chat_template_hash", "pad_token_id")
    metrics = {name: value for name, value in m.metrics.items() if name != "phases"}
    phases = {f"seconds of {p['phase']}": p["seconds"] for p in entries(m.metrics, "phases")}
    return {
        "parents": {parent.stage: f"{parent.reference} {parent.hash[:12]}" for parent in m.parents},
        "data": dict(_flat(m.data)),
        "inputs": dict(m.inputs),
        "config": dict(_flat({name: value for name, value in m.config.items() if name not in places})),
        "metrics": dict(_flat({**metrics, **phases})),
        "model": {name: getattr(m, name) for name in (*model, "stop_token_ids", "reward_mean", "reward_std")},
        "software": {"code_commit": m.code_commit, **m.library_versions},
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def ancestors(line: Lineage) -> list[Lineage]:
    """Return an artefact's ancestors and the artefact itself, each once, parents before children."""
    above: dict[str, Lineage] = {}
    for parent in line.parents:
        above |= {one.reference: one for one in ancestors(parent)}
    return [*above.values(), line]


def children(registry: Registry, artifact: Artifact) -> list[Artifact]:
    """Return the artefacts that were made from this one."""
    return [other for other in registry.list() if artifact.hash in [parent.hash for parent in other.manifest.parents]]


def prunable(registry: Registry, names: Iterable[str], keep: int) -> list[Artifact]:
    """Return versions that can be deleted, children before their parents.

    Kept are the newest `keep` of each name, tagged versions, ancestors of kept ones, and versions with an unreadable manifest.

    Args:
        names: `STAGE/NAME` of the versions to consider.
    """
    artifacts = registry.list()
    chosen = set(names)
    newest: set[str] = set()
    for name in chosen:
        of_name = sorted((a for a in artifacts if f"{a.stage}/{a.name}" == name), key=lambda a: -a.version)
        newest |= {a.reference for a in of_name[:keep]}
    tagged = {f"{name}@{version}" for name in chosen for version in registry.tags(*name.split("/")).values()}
    candidates = {
        a.reference: a for a in artifacts if f"{a.stage}/{a.name}" in chosen and a.reference not in newest | tagged
    }
    needed = [a for a in artifacts if a.reference not in candidates]
    while needed:
        for parent in needed.pop().manifest.parents:
            spared = candidates.pop(str(parent.reference), None)
            if spared is not None:
                needed.append(spared)
    return sorted(candidates.values(), key=lambda a: (-_depth(a, candidates), a.reference))


def _depth(artifact: Artifact, among: Mapping[str, Artifact]) -> int:
    """Return the number of generations among these from the oldest ancestor to the artefact."""
    parents = [among[str(p.reference)] for p in artifact.manifest.parents if str(p.reference) in among]
    return 1 + max((_depth(parent, among) for parent in parents), default=0)


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def exact(artifact: Artifact) -> Reference:
    """Return the reference of an artefact, with its version."""
    return Reference(artifact.stage, artifact.name, artifact.version)


def data_lines(artifact: Artifact) -> list[str]:
    """Return a line for each data set and base model that an artefact was made from."""
    m = artifact.manifest
    rows = ", ".join(f"{name} {count:,}" for name, count in section(m.data, "rows").items())
    lines = (
        [f"data {m.config['dataset']}  {str(m.data.get('fingerprint'))[:12]}  {rows}"] if "dataset" in m.config else []
    )
    lines += [f"prepared data  {fingerprint[:12]}" for fingerprint in set(section(m.data, "prepared").values())]
    if not any(parent.stage in ("pretrain", "sft") for parent in m.parents):
        lines.append(f"base model {m.base_model}" + (f" at {m.base_model_revision}" if m.base_model_revision else ""))
    return lines


def as_tree(line: Lineage) -> dict[str, Any]:
    """Return the lineage as plain data: `reference`, `hash` and `created` or `problem`, `data`, `made_from`."""
    own: dict[str, Any] = {"reference": line.reference}
    if line.artifact is None:
        return {**own, "problem": line.problem}
    own |= {"hash": line.artifact.hash, "created": line.artifact.manifest.created, "data": data_lines(line.artifact)}
    return {**own, "made_from": [as_tree(parent) for parent in line.parents]}


def different_files(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Return the names of files whose checksums differ, or that only one of two artefacts has."""
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
