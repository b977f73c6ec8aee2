"""A drawing of the lineage of several runs: data on the left, policies on the right, an arrow from each input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.base.json_files import section
from rlhf.report.figures import number
from rlhf.report.run_folder import RunFolder

COLUMNS = ("data", "pretrain", "sft", "reward", "ppo")
BOX_WIDTH, BOX_HEIGHT = 196, 44
STEP_X, STEP_Y, MARGIN = 262, 62, 8
"""Pixels from one box to the next."""


class Node(NamedTuple):
    """A box."""

    key: str
    """Its identity: a hash, or a fingerprint."""
    kind: str
    """Its column: one of `COLUMNS`."""
    title: str
    detail: str


class Edge(NamedTuple):
    """An arrow between the boxes of two keys."""

    source: str
    target: str


def draw_lineage(nodes: Sequence[Node], edges: Sequence[Edge]) -> dict[str, Any]:
    """Return boxes and arrows with their places: `width` and `height` in pixels, `boxes`, `paths`; {} without nodes.

    Edges to or from other nodes than these are left out.
    """
    if not nodes:
        return {}
    used = [kind for kind in COLUMNS if any(node.kind == kind for node in nodes)]
    columns = [[node for node in nodes if node.kind == kind] for kind in used]
    tallest = max(map(len, columns))
    places: dict[str, tuple[float, float]] = {}
    for index, column in enumerate(columns):
        top = MARGIN + (tallest - len(column)) * STEP_Y / 2  # shorter columns are centred
        for row, node in enumerate(column):
            places[node.key] = (MARGIN + index * STEP_X, top + row * STEP_Y)
    boxes = [
        {**node._asdict(), "x": places[node.key][0], "y": places[node.key][1]} for column in columns for node in column
    ]
    paths = [_path(places[e.source], places[e.target]) for e in edges if e.source in places and e.target in places]
    width = 2 * MARGIN + (len(columns) - 1) * STEP_X + BOX_WIDTH
    height = 2 * MARGIN + (tallest - 1) * STEP_Y + BOX_HEIGHT
    return {"width": width, "height": height, "boxes": boxes, "paths": paths, "box": (BOX_WIDTH, BOX_HEIGHT)}


def _path(source: tuple[float, float], target: tuple[float, float]) -> str:
    """Return the SVG path of a curve from the right side of one box to the left side of another."""
    x1, y1 = source[0] + BOX_WIDTH, source[1] + BOX_HEIGHT / 2
    x2, y2 = target[0], target[1] + BOX_HEIGHT / 2
    bend = max((x2 - x1) / 2, 20)
    return f"M{x1:g},{y1:g} C{x1 + bend:g},{y1:g} {x2 - bend:g},{y2:g} {x2 - 3:g},{y2:g}"


def lineage(runs: Sequence[RunFolder]) -> tuple[list[Node], list[Edge]]:
    """Return data, base models and artefacts of all runs, each once, and an edge from each to what was made from it."""
    nodes: dict[str, Node] = {}
    edges: dict[Edge, None] = {}
    for run in runs:
        for stage in run.stages:
            manifest = run.manifests.get(stage, {})
            key = run.source(stage)["manifest"] or f"{run.label}/{stage}"
            title = f"{stage} of {run.label}"
            if manifest.get("name"):
                title = f"{stage}/{manifest['name']}@{manifest.get('version')}"
            detail = f"{key[:10]} · {run.label}" if manifest else "not registered"
            nodes[key] = Node(key, stage, title, detail)
            for node in _inputs(run, stage):
                nodes.setdefault(node.key, node)
                edges[Edge(node.key, key)] = None
    return list(nodes.values()), list(edges)


def _inputs(run: RunFolder, stage: str) -> list[Node]:
    """Return the boxes of what a stage was made from."""
    manifest = run.manifests.get(stage, {})
    inputs: list[Node] = []
    data = section(manifest, "data")
    if data.get("fingerprint"):
        place = Path(str(run.config(stage).get("dataset", "data"))).name
        rows = section(data, "rows")
        counts = ", ".join(f"{name} {number(count)}" for name, count in rows.items())
        inputs.append(Node(str(data["fingerprint"]), "data", f"{place} for {stage}", counts))
    name = str(manifest.get("base_model") or "")
    if stage == "sft" and name and not name.startswith("pretrain/"):  # which is among its parents
        inputs.append(Node(f"base {name}", "data", Path(name).name, "base model"))
    parents = run.parents(stage).items()
    return inputs + [Node(digest, reference.split("/")[0], reference, digest[:10]) for reference, digest in parents]
