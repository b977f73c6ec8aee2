"""Independent scorers of the demo, on which nothing here is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from rlhf.base.errors import UserError, install


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(f"the VADER judge needs its package: {install('demo')}") from error
    return SentimentIntensityAnalyzer()


def vader(responses: Sequence[str]) -> list[float]:
    """Return VADER's compound sentiment of each text, -1 to 1: a lexicon and rules (Hutto & Gilbert, ICWSM 2014)."""
    return [float(_analyzer().polarity_scores(text)["compound"]) for text in responses]
