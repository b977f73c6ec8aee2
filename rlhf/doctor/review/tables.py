"""All limits of the review, as docs/doctor.md shows them."""

from __future__ import annotations

from rlhf.doctor.review.answer_limits import ANSWER_LIMITS, MEASURED_LIMITS
from rlhf.doctor.review.data_limits import DATA_LIMITS
from rlhf.doctor.review.limits import markdown_rows
from rlhf.doctor.review.ppo_limits import PPO_LIMITS
from rlhf.doctor.review.training_limits import TRAINING_LIMITS

#: Limits on options, and on the data that a stage loads; causes before consequences.
INPUT_LIMITS = (*DATA_LIMITS, *TRAINING_LIMITS, *PPO_LIMITS)
#: Limits on the answers, and those on options whose unit the answers decide.
ANSWER_TABLE = (*ANSWER_LIMITS, *MEASURED_LIMITS)
#: All limits, by the heading of their table.
TABLES = {
    "Data": DATA_LIMITS,
    "Options of training": TRAINING_LIMITS,
    "Options of PPO": PPO_LIMITS,
    "Answers of the SFT model and their scores, before PPO": ANSWER_LIMITS,
}
HEAD = "| name | stages | quantity | ordinary | findings | effect | source |\n|---|---|---|---|---|---|---|"


def markdown() -> str:
    """Return the tables of docs/doctor.md, with their headings."""
    return "\n\n".join(
        "\n".join([f"### {heading}", "", HEAD, *markdown_rows(limits)]) for heading, limits in TABLES.items()
    )


if __name__ == "__main__":
    print(markdown())
