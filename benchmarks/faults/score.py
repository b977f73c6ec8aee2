"""What the runs come to: faults detected, the right cause named first, clean runs with an alarm; and the tables of the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from faults.accepted import NAMES, Table

#: Between these lines of a page stands what `write_tables` writes.
BEGIN, END = "<!-- benchmarks/faults: begin -->", "<!-- benchmarks/faults: end -->"
#: What refuses a run by itself; a crash is no detection.
GUARDS = ("preflight", "guard")
GROUPS = {"tuned": "tuned on", "held_out": "held out"}

Row = dict[str, Any]


def judge(row: Mapping[str, Any], names: Table = NAMES) -> Row:
    """Return by what a run was found faulty, the cause named first, and whether it is the right one.

    A name of the table may have the kind of the finding before it: `audit/learning_rate`.
    """
    refused, found = row["refused"], row["findings"]
    tried = row.get("investigated", found)
    guard = refused if refused and refused["by"] in GUARDS else None
    by = [*([guard["by"]] if guard else []), *(["live"] if row["live"] else []), *(["afterwards"] if found else [])]
    says = bool(guard and any(word in guard["message"].lower() for word in row.get("words", ())))
    right_names = {name for cause in row.get("causes", ()) for name in names.get(cause, ())}

    def is_right(finding: Mapping[str, Any]) -> bool:
        return bool({finding["name"], f"{finding.get('kind')}/{finding['name']}"} & right_names)

    def first_is_right(findings: Iterable[Mapping[str, Any]]) -> bool:
        return says or any(map(is_right, list(findings)[:1]))

    return {
        "detected_by": by,
        "named": "refused" if says else found[0]["name"] if found else "refused" if guard else "nothing",
        "right": first_is_right(found),
        "right_at_all": says or any(map(is_right, found)),
        "right_by_symptoms": first_is_right(f for f in found if f.get("kind", "symptom") == "symptom"),
        "alarm_investigated": bool(by or tried),
        "right_investigated": first_is_right(tried),
    }


def share(rows: Sequence[bool]) -> Row:
    """Return a share of runs with its 95% interval (Wilson)."""
    from scipy.stats import binomtest

    if not rows:
        return {"of": 0}
    interval = binomtest(sum(rows), len(rows)).proportion_ci(method="wilson")
    figures = {"share": sum(rows) / len(rows), "low": interval.low, "high": interval.high}
    return {"runs": sum(rows), "of": len(rows), **{key: round(float(value), 4) for key, value in figures.items()}}


def rates(judged: Sequence[Row]) -> Row:
    """Return the rates of a group of faults; those of the right cause also by kind of fault, and without statements."""
    by_kind = {
        kind: share([row["right"] for row in judged if row["kind"] == kind])
        for kind in ("computation", "input", "outcome")
    }
    return {
        "detected": share([bool(row["detected_by"]) for row in judged]),
        "right_cause": share([row["right"] for row in judged]),
        "right_at_all": share([row["right_at_all"] for row in judged]),
        "right_by_symptoms": share([row["right_by_symptoms"] for row in judged]),
        "detected_investigated": share([row["alarm_investigated"] for row in judged]),
        "right_investigated": share([row["right_investigated"] for row in judged]),
        "right_cause_by_kind": by_kind,
    }


def summarise(rows: Sequence[Row], judges: Callable[[Row], Row] = judge) -> Row:
    """Return rates of each group, and each run with its verdict."""
    judged = [{**row, **judges(row)} for row in rows]
    groups = {group: rates([row for row in judged if row["group"] == group]) for group in GROUPS}
    clean = [row for row in judged if row["group"] == "clean"]
    seconds = round(sum(row.get("seconds", 0.0) for row in rows), 1)
    alarms = {
        "false_alarms": share([bool(row["detected_by"]) for row in clean]),
        "false_alarms_investigated": share([row["alarm_investigated"] for row in clean if "investigated" in row]),
    }
    return {**groups, **alarms, "seconds": seconds, "runs": judged}


# ---- tables ----------------------------------------------------------------------------------------------------------


def rates_table(summary: Row) -> str:
    """Return the rates as a table of Markdown."""
    lines = ["| | runs | of | share | 95% interval |", "|---|---|---|---|---|"]
    for group, label in reversed(GROUPS.items()):
        rate = summary[group]
        lines += [
            _rate_line(f"faults {label}: detected", rate["detected"]),
            _rate_line(f"faults {label}: right cause named first", rate["right_cause"]),
            *(_rate_line(f"... {kind} faults", one) for kind, one in rate["right_cause_by_kind"].items()),
            _rate_line("... by symptoms alone", rate["right_by_symptoms"]),
            _rate_line("... among the causes named", rate["right_at_all"]),
        ]
        if any("investigated" in row for row in summary["runs"]):
            lines += [
                _rate_line(f"faults {label}: detected, with experiments", rate["detected_investigated"]),
                _rate_line(f"faults {label}: right cause named first, with experiments", rate["right_investigated"]),
            ]
    lines += [
        _rate_line("clean runs with an alarm", summary["false_alarms"]),
        _rate_line("clean runs with an alarm, with experiments", summary["false_alarms_investigated"]),
    ]
    return "\n".join(filter(None, lines))


def _rate_line(label: str, rate: Mapping[str, Any]) -> str:
    if not rate["of"]:
        return ""
    return (
        f"| {label} | {rate['runs']} | {rate['of']} | {rate['share']:.0%} | {rate['low']:.0%} to {rate['high']:.0%} |"
    )


def runs_table(summary: Row, group: str) -> str:
    """Return each fault of a group, with what was named, as a table of Markdown."""
    lines = ["| fault | detected by | named first | right | also found |", "|---|---|---|---|---|"]
    for row in summary["runs"]:
        if row["group"] == group:
            also = dict.fromkeys(f["name"] for f in row["findings"] if f["name"] != row["named"])
            by, right = ", ".join(row["detected_by"]) or "nothing", "yes" if row["right"] else "no"
            lines.append(f"| {row['what']} | {by} | {row['named']} | {right} | {', '.join(also)} |")
    return "\n".join(lines)


def alarms(summary: Row) -> list[str]:
    """Return a line for each clean run with an alarm."""
    clean = [row for row in summary["runs"] if row["group"] == "clean" and row["detected_by"]]
    return [f"{row['name']}: {row['named']}" for row in clean]


def rivals_table(rivals: Mapping[str, Row]) -> str:
    """Return how other tools fared on the same runs, as a table of Markdown; a text is why one could not."""
    lines = [
        "| tool | faults | detected | right cause named first | clean runs with an alarm |",
        "|---|---|---|---|---|",
    ]
    for name, rival in rivals.items():
        if "not_run" in rival:
            lines.append(f"| {name} | - | {rival['not_run']} | - | - |")
            continue
        for group, label in reversed(GROUPS.items()):
            cells = [_fraction(rival[group][key]) for key in ("detected", "right_cause")]
            lines.append(f"| {name} | {label} | {' | '.join(cells)} | {_fraction(rival['false_alarms'])} |")
    return "\n".join(lines)


def _fraction(rate: Mapping[str, Any]) -> str:
    return f"{rate['runs']} of {rate['of']} ({rate['low']:.0%} to {rate['high']:.0%})" if rate["of"] else "-"


def tables(summary: Row) -> str:
    """Return all tables, as the page of the health checks has them."""
    parts = [rates_table(summary)]
    if summary.get("rivals"):
        parts.append(rivals_table(summary["rivals"]))
    for group, label in reversed(GROUPS.items()):
        if any(row["group"] == group for row in summary["runs"]):
            parts += [f"Faults {label}:", runs_table(summary, group)]
    if lines := alarms(summary):
        parts.append("Alarms on clean runs: " + "; ".join(lines) + ".")
    return "\n\n".join(parts)


def write_tables(page: Path, summary: Row) -> None:
    """Put the tables between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n{tables(summary)}\n{END}{tail}", encoding="utf-8")
