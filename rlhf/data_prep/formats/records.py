"""The one form between reading and writing: a prompt with no, one or several responses, and what people said of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.data_prep.formats.rows import Malformed, Messages, Untrainable, check_turns

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
    ratings: list[float] | None = None
    """(R,) higher is better, or None."""
    ranked: bool = False
    """The ratings are ranks with the sign turned: only their order means something."""
    raters: list[str] = field(default_factory=list)
    """(A,) who rated; empty where nobody is named."""
    rater_ratings: list[list[float | None]] = field(default_factory=list)
    """(R, A) each rater's rating of each response, None where a rater did not see it."""
    ratings_held_out: list[float] | None = None
    """(R,) mean ratings of raters who are held out."""
    confidence: float | None = None
    """How sure the rater was, on the scale of the source."""
    id: str | None = None
    """Unique in its source, or None."""
    user: str | None = None
    """Who wrote the prompt."""
    document: str | None = None
    """What the prompt is about: a post, an article, the tree of a conversation."""
    source: str = ""
    file: str = ""
    row: int = 0
    """Line or row in the file, from 1."""
    split: str | None = None
    """Set by the rater where splits are made of raters; otherwise None until the splits are made."""

    def __post_init__(self) -> None:
        if not any(m["role"] != "system" and m["content"].strip() for m in self.prompt):
            raise Untrainable("empty prompt")
        check_turns(self.prompt)
        if self.prompt[-1]["role"] not in ("user", "tool"):
            raise Malformed(f"roles out of order: the prompt ends with '{self.prompt[-1]['role']}'")
        if self.ratings is not None and len(self.ratings) != len(self.responses):
            raise Malformed(f"{len(self.responses)} responses but {len(self.ratings)} ratings")

    @property
    def place(self) -> str:
        """Where it came from, for messages."""
        return f"{self.file}, row {self.row}"

    @property
    def last_turn(self) -> str:
        """What the answer answers."""
        return self.prompt[-1]["content"]

    @property
    def opening(self) -> str:
        """The first turn of the user: conversations that share it are one conversation at several depths."""
        return next((m["content"] for m in self.prompt if m["role"] != "system"), "")

    @property
    def best(self) -> str | None:
        """The response that people liked best, the first of equals; None when there is none."""
        if not self.responses:
            return None
        return self.responses[0 if self.ratings is None else self.ratings.index(max(self.ratings))]

    @property
    def serves(self) -> int:
        """Which kinds it could become, as bits."""
        compared = self.ratings is not None and len(set(self.ratings)) > 1
        liked = bool(self.responses) and (self.ratings is None or compared)  # of equals, nobody said which is good
        return PROMPT | (DEMONSTRATION if liked else 0) | (COMPARISON if compared else 0)


def ranks_of(ratings: list[float]) -> list[int]:
    """1 for the best; equals share a rank, and the next one counts them: 3, 5, 5, 1 -> 3, 1, 1, 4."""
    return [1 + sum(other > rating for other in ratings) for rating in ratings]
