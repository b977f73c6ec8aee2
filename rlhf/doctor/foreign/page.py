"""The tables of docs/foreign.md: `python -m rlhf.doctor.foreign.page` prints them."""

from __future__ import annotations

from rlhf.doctor.foreign import llama_factory, openrlhf, swift, trl, verl
from rlhf.doctor.foreign.figure import Figure, Kind

#: Kinds by the heading of their table.
PROJECTS: dict[str, tuple[Kind, ...]] = {
    "TRL": trl.KINDS,
    "verl": verl.KINDS,
    "OpenRLHF": openrlhf.KINDS,
    "ms-swift": swift.KINDS,
    "LLaMA-Factory": llama_factory.KINDS,
}
_HEAD = ("| trainer | theirs | ours | conversion | what differs | source |", "|---|---|---|---|---|---|")


def tables() -> str:
    """Return a table for each project, with a line for each of its figures; ms-swift's has those that TRL's lacks."""
    parts = []
    for project, kinds in PROJECTS.items():
        lines: dict[str, None] = {}
        for kind in kinds:
            known = [figure for one in trl.KINDS for figure in one.figures] if project == "ms-swift" else []
            lines |= dict.fromkeys(_row(kind, figure) for figure in kind.figures if figure not in known)
        parts.append("\n".join([f"### {project}", "", *_HEAD, *lines, ""]))
    return "\n".join(parts)


def _row(kind: Kind, figure: Figure) -> str:
    names = (" + " if figure.total else ", ").join(f"`{name}`" for name in figure.theirs)
    ours = ", ".join(f"`{name}`" for name in figure.ours) or f"none; near `{figure.near[0]}`"
    unfit = [f"not for {', '.join(f'`{check}`' for check in figure.unfit)}"] if figure.unfit else []
    limits = [
        f"`{check}` with {', '.join(f'{name} {value:g}' for name, value in limits.items())}"
        for check, limits in figure.limits.items()
    ]
    differs = "; ".join(filter(None, [figure.meaning, *unfit, *limits]))
    trainer = f"{kind.project.removeprefix('TRL ')}: {kind.trainer}" if kind is trl.OLD_PPO else kind.trainer
    return f"| {trainer} | {names} | {ours} | {figure.convert.text} | {differs} | {figure.source} |"


if __name__ == "__main__":
    print(tables())
