"""HTML pages that open from disk without a network."""

from __future__ import annotations

import base64
import gzip
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.report.figures import _duration, _score, _text


def _write_page(page: str, file: Path) -> Path:
    partial = file.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(file)
    return file


@cache
def _plotly_gzip_base64() -> str:
    """plotly.js, 4.8 MB, as 2 MB of text, which the page inflates itself (`DecompressionStream`)."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode("utf-8"), compresslevel=9, mtime=0)).decode("ascii")


def template(name: str) -> Any:
    """A page's template, which can show figures, scores and durations."""
    from jinja2 import Environment, PackageLoader

    # autoescape is what keeps a <script> in a model's answer from running; no value is ever marked safe
    environment = Environment(
        loader=PackageLoader("rlhf.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(text=_text, score=_score, duration=_duration)
    return environment.get_template(name)
