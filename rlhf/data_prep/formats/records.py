"""The form of a row between reading and writing: a prompt, its responses, and their ratings."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.data_prep.formats.rows import Malformed, Messages, Untrainable, check_turns, is_blank
from rlhf.models.messages import PARTS

#: Bits of `Record.serves`.
DEMONSTRATION, COMPARISON, PROMPT = 1, 2, 4


@dataclass(kw_only=True, slots=True)
class Record:
    """R responses to a prompt, rated by A raters.

    Raises:
        Malformed: turns out of order, or numbers that do not fit the responses.
        Untrainable: an empty prompt.
    """

    prompt: Messages
    """The turns up to the answer."""
    responses: list[str] = field(default_factory=list)
    """(R,) texts that could be the answer."""
    parts: list[str] = field(default_factory=list)
    """(R,) parts of each response beyond its text, as `rlhf.models.messages` holds them; empty where none has any."""
    ratings: list[float] | None = None
    """(R,) higher is better, or None."""
    ranked: bool = False
    """The ratings are ranks with the sign turned: only their order means something."""
    labelled: bool = False
    """The ratings are labels, 1 good and 0 bad, each of which means something alone."""
    raters: list[str] = field(default_factory=list)
    """(A,) names of the raters; empty where nobody is named."""
    rater_ratings: list[list[float | None]] = field(default_factory=list)
    """(R, A) each rater's rating of each response, None where a rater did not see it."""
    ratings_held_out: list[float] | None = None
    """(R,) mean ratings of raters who are held out."""
    confidence: float | None = None
    """Confidence of the rater, on the scale of the source."""
    id: str | None = None
    """Unique in its source, or None."""
    user: str | None = None
    """Author of the prompt."""
    document: str | None = None
    """Subject of the prompt: a post, an article, the tree of a conversation."""
    source: str = ""
    file: str = ""
    row: int = 0
    """Line or row in the file, from 1."""
    split: str | None = None
    """Set by the rater where splits are made of raters; otherwise None until the splits are made."""

    def __post_init__(self) -> None:
        if not any(m["role"] != "system" and not is_blank(m["content"]) for m in self.prompt):
            raise Untrainable("empty prompt")
        check_turns(self.prompt)
        if self.prompt[-1]["role"] not in ("user", "tool"):
            raise Malformed(f"roles out of order: the prompt ends with '{self.prompt[-1]['role']}'")
        if self.ratings is not None and len(self.ratings) != len(self.responses):
            raise Malformed(f"{len(self.responses)} responses but {len(self.ratings)} ratings")

    @property
    def place(self) -> str:
        """File and row, for messages."""
        return f"{self.file}, row {self.row}"

    @property
    def last_turn(self) -> str:
        """Text of the last turn of the prompt."""
        return self.prompt[-1]["content"]

    @property
    def opening(self) -> str:
        """First turn of the user; conversations that share it are one conversation at several depths."""
        return next((m["content"] for m in self.prompt if m["role"] != "system"), "")

    @property
    def best(self) -> str | None:
        """Text of the highest-rated response, the first of equals; None where there is no response."""
        return self.answer(self.best_place)[0]["content"] if self.responses else None

    @property
    def best_place(self) -> int:
        """Place of the highest-rated response, the first of equals."""
        return 0 if self.ratings is None else self.ratings.index(max(self.ratings))

    def answer(self, place: int) -> Messages:
        """Return a response as one assistant message."""
        message = {"role": "assistant", "content": self.responses[place]}
        return [{**message, PARTS: self.parts[place]} if self.parts and self.parts[place] else message]

    @property
    def whole_responses(self) -> list[str]:
        """(R,) texts of the responses with their parts, for comparing."""
        return [
            text + part for text, part in zip(self.responses, self.parts or [""] * len(self.responses), strict=True)
        ]

    @property
    def serves(self) -> int:
        """Bits of the kinds that the record could become."""
        compared = self.ratings is not None and len(set(self.ratings)) > 1
        # equal ratings name no good response, labels do
        good = bool(self.responses) and (
            self.ratings is None or (max(self.ratings) > 0.5 if self.labelled else compared)
        )
        return PROMPT | (DEMONSTRATION if good else 0) | (COMPARISON if compared else 0)


def ranks_of(ratings: list[float]) -> list[int]:
    """Return ranks, 1 for the best; equals share a rank, and the next one counts them: 3, 5, 5, 1 -> 3, 1, 1, 4."""
    return [1 + sum(other > rating for other in ratings) for rating in ratings]
