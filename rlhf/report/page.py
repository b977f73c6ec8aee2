"""Single-file HTML pages that open from disk without a network."""

from __future__ import annotations

import base64
import contextlib
import gzip
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.base.errors import UserError
from rlhf.doctor.diagnosis import Diagnosis, diagnose
from rlhf.report import figures
from rlhf.report.run_folder import RunFolder

if TYPE_CHECKING:
    from jinja2 import Environment


def write_page(file: Path, template: str, *, charts: Sequence[Mapping[str, Any]], **content: Any) -> Path:
    """Render a template into a file, which is replaced as a whole, and return its path.

    Args:
        charts: if there are any, plotly.js is put in, which is most of the page's size.
        content: variables of the template.
    """
    plotly = _plotly_gzip_base64() if charts else ""
    page = _environment().get_template(template).render(plotly=plotly, charts=charts, **content)
    partial = file.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    return partial.replace(file)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader

    # autoescape is what keeps a <script> in a model's answer from running; no value is ever marked safe
    environment = Environment(
        loader=PackageLoader("rlhf.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(text=figures.number, score=figures.score, duration=figures.duration)
    return environment


@cache
def _plotly_gzip_base64() -> str:
    """Return plotly.js, 4.8 MB, as 2 MB of text, which the page inflates itself (`DecompressionStream`)."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode("utf-8"), compresslevel=9, mtime=0)).decode("ascii")


def diagnoses(run: RunFolder) -> list[Diagnosis]:
    """Return the doctor's diagnosis of each stage of a run; none of a stage without a log, which the page names as missing."""
    findings = []
    for place in run.places.values():
        with contextlib.suppress(UserError):
            findings += diagnose(place)
    return findings


def evenly_spaced(rows: Sequence[Any], count: int) -> list[Any]:
    """Return `count` of the rows at most; a choice by score would show the best and hide the rest."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]
