"""Rankings as token rows, with counts of and reasons for rows that are left out."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import require
from rlhf.data_prep.load import NAMED_ROWS, Loaded
from rlhf.data_prep.ratings import is_clear
from rlhf.models.tokenization import check_rows, encode_prompt, encode_response


@dataclass(frozen=True)
class Encoded:
    """Tokenised rankings.

    Attributes:
        rows: the columns of the data, `input_ids` (K token lists, prompt and response), `prompt_length` and `lengths` (K,
            of the responses), in tokens.
        dropped: reason -> line or row numbers in the source of the rankings that were left out here.
        left_out: reason -> `count` and the first `rows` of all rankings that were left out, in loading too.
    """

    rows: Dataset
    dropped: dict[str, list[int]]
    left_out: dict[str, dict[str, Any]]


def encode_rankings(
    data: Loaded,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    min_responses: int = 2,
    min_rating_difference: float | None = None,
) -> Encoded:
    """Tokenise rankings.

    Args:
        max_length: longest prompt and response together, tokens; nothing is cut, because a cut response is another one.
        min_responses: smaller rankings are left out.
        min_rating_difference: least difference of the ratings of some pair; None keeps rankings of ties alone, which only an
            evaluation can use.

    Raises:
        UserError: nothing is left.
    """
    check_rows(tokenizer, ((row["prompt"], response) for row in data.rows for response in row["responses"]))
    rows: list[dict[str, Any]] = []
    dropped: defaultdict[str, list[int]] = defaultdict(list)
    for number, row in zip(data.numbers, data.rows, strict=True):
        prompt = encode_prompt(tokenizer, row["prompt"])
        ids = [prompt + encode_response(tokenizer, row["prompt"], response) for response in row["responses"]]
        spread = max(row["ratings"]) - min(row["ratings"])
        if len(prompt) >= max_length:
            dropped[f"prompt of {max_length} tokens or more"].append(number)
        elif max(map(len, ids)) > max_length:
            dropped[f"prompt and response of more than {max_length} tokens"].append(number)
        elif len(ids) < min_responses:
            dropped[f"fewer than {min_responses} responses"].append(number)
        elif min_rating_difference is not None and not is_clear(spread, min_rating_difference):
            dropped["no two ratings that differ enough"].append(number)
        else:
            lengths = [len(tokens) - len(prompt) for tokens in ids]
            rows.append({**row, "input_ids": ids, "prompt_length": len(prompt), "lengths": lengths})
    reasons = "; ".join(f"{reason}: {len(numbers)}" for reason, numbers in dropped.items())
    require(bool(rows), f"no comparison can be used with max_length={max_length} tokens ({reasons})")
    left_out = {
        **{reason: {"count": n, "rows": data.dropped_rows[reason]} for reason, n in data.dropped.items()},
        **{reason: {"count": len(numbers), "rows": numbers[:NAMED_ROWS]} for reason, numbers in dropped.items()},
    }
    return Encoded(Dataset.from_list(rows), dict(dropped), left_out)
