"""Task checks: the answers of a model to a user's own rows, compared with references by the field's libraries."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base import intervals
from rlhf.base.errors import UserError, did_you_mean, require
from rlhf.base.intervals import Array
from rlhf.config import CHECKS
from rlhf.data_prep.formats.files import is_readable, read_file
from rlhf.data_prep.formats.rows import Malformed, Messages, Row, Untrainable, as_prompt, as_response, show_value
from rlhf.models.base import context_length
from rlhf.models.sampling import sample
from rlhf.models.sequences import pad
from rlhf.models.tokenization import decode_response, stop_token_ids

Figure = dict[str, float | None] | None
_LONGEST_ROW = 100_000_000
_MARKS = string.punctuation + "。，、；：？！“”‘’（）《》"
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")


@dataclass(frozen=True)
class Check:
    """A file of rows with references."""

    name: str
    """The file's name without its ending."""
    kind: str
    """One of `rlhf.config.evaluation.CHECKS`."""
    prompts: list[Messages]
    references: list[list[str]]
    """For each prompt what would be right; any will do."""

    def figures(self, texts: Sequence[str], seed: int = 0) -> dict[str, Figure]:
        """The figures of one answer to each prompt, with 95% intervals over rows; none of a single row."""
        return _MEASURES[self.kind](self.references, texts, seed)


# Reading


def read_checks(options: Sequence[str]) -> list[Check]:
    """The checks that `KIND=FILE` name.

    Raises:
        UserError: no such kind or file, two files of one name, or a row without a prompt or reference; it is named.
    """
    checks = [_read_check(text) for text in options]
    names = [check.name for check in checks]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"two checks are called {', '.join(twice)}; rename a file")
    return checks


def _read_check(text: str) -> Check:
    kind, equals, path = text.partition("=")
    if kind not in CHECKS or not equals or not path:
        raise UserError(
            f"'{text}' is no check{did_you_mean(kind, CHECKS)}; write KIND=FILE, KIND one of {', '.join(CHECKS)}"
        )
    rows = read_rows(Path(path))
    return make_check(Path(path), kind, rows)


def make_check(file: Path, kind: str, rows: Sequence[Row]) -> Check:
    """A check of rows that `read_rows` read from a file. Raises `UserError` where a row has no usable reference."""
    references = []
    for number, row in enumerate(rows, start=1):
        try:
            references.append(_references(row))
        except (Malformed, Untrainable) as error:
            raise UserError(f"{file}, row {number}: {error}") from error
        if kind == "classification" and len(references[-1]) > 1:
            raise UserError(f"{file}, row {number}: a row of a classification has one reference, its label")
    if kind == "classification":
        _require_distinct(file, [label.strip() for (label,) in references])
    return Check(file.stem, kind, [row["prompt"] for row in rows], references)


def _require_distinct(file: Path, labels: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for number, label in enumerate(labels, start=1):
        other = first.setdefault(_folded(label), label)
        require(
            other == label,
            f"{file}, row {number}: the label '{label}' is '{other}' but for case or spaces, which do not count in answers; "
            "write both alike",
        )


def read_rows(file: Path) -> list[Row]:
    """Rows with a `prompt` of messages out of a data file, their other columns as they are.

    Raises:
        UserError: no such file, another format, nothing in it, or a row without a usable prompt.
    """
    if not file.is_file():
        siblings = [str(path) for path in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"no file {file}{did_you_mean(str(file), siblings)}")
    if not is_readable(file):
        raise UserError(f"cannot read {file}: give a .jsonl, .json, .csv or .parquet file")
    rows = []
    for line in read_file(file, _LONGEST_ROW):
        try:
            if line.problem or not isinstance(line.value, dict):
                raise Malformed(line.problem or f"an object is needed, got {show_value(line.value)}")
            row = line.value
            name = "messages" if row.get("prompt") is None and "messages" in row else "prompt"
            if row.get(name) is None:
                raise Malformed(f"no column prompt; there are {', '.join(row)}")
            rows.append({**row, "prompt": as_prompt(row[name], name)})
        except (Malformed, Untrainable) as error:
            raise UserError(f"{file}, row {line.number}: {error}") from error
    return rows


def _references(row: Row) -> list[str]:
    if row.get("reference") is None and row.get("completion") is not None:
        return [as_response(row["completion"], "completion")[0]["content"]]
    given = row.get("reference")
    texts = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise Malformed(f"'reference' must be a text or a list of texts, got {show_value(given)}")
    return list(texts)


# Answers


@torch.no_grad()
def likeliest_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    length: int,
    batch_size: int,
) -> list[str]:
    """One answer to each prompt (token ids), of the likeliest tokens, `length` at most.

    Raises:
        UserError: a prompt leaves no room for the answer.
    """
    longest, context = max(map(len, prompts)), context_length(model)
    require(
        longest + length <= context,
        f"a prompt of {longest} tokens with check_length={length} does not fit into the model's context of {context} tokens",
    )
    texts: list[str] = []
    for first in range(0, len(prompts), batch_size):
        ids, mask = pad(prompts[first : first + batch_size], int(tokenizer.pad_token_id), side="left")
        sampled = sample(
            model,
            ids.to(model.device),
            mask.to(model.device),
            max_new_tokens=length,
            temperature=0.0,
            stop_token_ids=stop_token_ids(tokenizer),
            pad_token_id=int(tokenizer.pad_token_id),
            generator=torch.Generator(),  # asked, and not used
        )
        rows = zip(sampled.responses, sampled.mask, strict=True)
        texts += [decode_response(tokenizer, row[real].tolist()) for row, real in rows]
    return texts


# Figures


def summarisation(references: Sequence[Sequence[str]], texts: Sequence[str], seed: int) -> dict[str, Figure]:
    """ROUGE-1, -2 and -L (F), the best reference of each row."""
    from rouge_score.rouge_scorer import RougeScorer

    # The library's own tokens are Latin letters and digits only: a Chinese summary would score 0 whatever it says.
    characters = _Characters() if _is_chinese(references) else None
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True, tokenizer=characters)
    rows = [scorer.score_multi(list(right), text) for right, text in zip(references, texts, strict=True)]
    return {name: _mean([row[name].fmeasure for row in rows], seed) for name in names}


def translation(references: Sequence[Sequence[str]], texts: Sequence[str], seed: int) -> dict[str, Figure]:
    """BLEU and chrF of the whole file, 0 to 100, with sacrebleu's own bootstrap (which has a seed of its own)."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    most = max(map(len, references))
    streams: Any = [[right[i] if i < len(right) else None for right in references] for i in range(most)]
    metrics = {"bleu": BLEU(tokenize="zh" if _is_chinese(references) else "13a"), "chrf": CHRF()}
    found: dict[str, Figure] = {}
    for name, metric in metrics.items():
        several = len(texts) > 1
        score: Any = metric.corpus_score(list(texts), streams, n_bootstrap=intervals.DRAWS if several else 1)
        low, high = (float(score._mean - score._ci), float(score._mean + score._ci)) if several else (None, None)
        found[name] = {"value": float(score.score), "low": low, "high": high}
    return found


def question_answering(references: Sequence[Sequence[str]], texts: Sequence[str], seed: int) -> dict[str, Figure]:
    """Exact match and F1 over words, the best reference of each row (SQuAD; Rajpurkar et al. 2016)."""
    pairs = list(zip(references, texts, strict=True))
    exact = [max(_words(text) == _words(one) for one in right) for right, text in pairs]
    overlap = [max(_overlap(_words(text), _words(one)) for one in right) for right, text in pairs]
    return {"exact_match": _mean(exact, seed), "f1": _mean(overlap, seed)}


def classification(references: Sequence[Sequence[str]], texts: Sequence[str], seed: int) -> dict[str, Figure]:
    """Accuracy, and F1 a label averaged over the labels; an answer that names no label is wrong, and is of none."""
    from sklearn.metrics import f1_score

    labels = sorted({_folded(label) for (label,) in references})
    right = np.array([labels.index(_folded(label)) for (label,) in references])
    named = np.array([_named(text, labels) for text in texts])

    def macro_f1(times: Array) -> float:
        among = list(range(len(labels)))
        # A label that a draw misses, and no answer in it names, has no F1: as 0 it would pull every interval down.
        return float(f1_score(right, named, labels=among, average="macro", sample_weight=times, zero_division=np.nan))

    low = high = None
    if len(texts) > 1:
        drawn = [macro_f1(times) for rows in intervals.draws(len(texts), seed) for times in rows]
        low, high = intervals.interval(np.array(drawn))
    figure: Figure = {"value": macro_f1(np.ones(len(texts))), "low": low, "high": high}
    return {"accuracy": _mean(right == named, seed), "macro_f1": figure}


_MEASURES: dict[str, Callable[[Sequence[Sequence[str]], Sequence[str], int], dict[str, Figure]]] = {
    "summarisation": summarisation,
    "translation": translation,
    "question_answering": question_answering,
    "classification": classification,
}


def _mean(values: Any, seed: int) -> Figure:
    return intervals.mean(np.asarray(values, dtype=float), np.arange(len(values)), seed)


def _words(text: str) -> list[str]:
    """Words without case, punctuation and articles; Han characters one by one."""
    spaced = _HAN.sub(lambda found: f" {found[0]} ", text.lower())
    bare = "".join(c for c in spaced if c not in _MARKS)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _overlap(said: list[str], right: list[str]) -> float:
    """F1 of two bags of words; two empty ones are alike."""
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right)) if said or right else 1.0


def _folded(text: str) -> str:
    """Without case, and with single spaces: all that does not count in a label. `A`, `+1` and `C++` are labels, too."""
    return " ".join(text.casefold().split())


def _named(text: str, labels: Sequence[str]) -> int:
    """The number of the label that an answer is or begins with, of several the longest, or -1. Marks before it do not count."""
    said = _folded(text)
    for start in range(len(said) - len(said.lstrip(_MARKS + " ")) + 1):
        found = [
            (len(label), number)
            for number, label in enumerate(labels)
            if said.startswith(label, start) and _ends_word(said, start + len(label))
        ]
        if found:
            return max(found)[1]
    return -1


def _ends_word(said: str, at: int) -> bool:
    """Whether what is said up to `at` is whole words: marks, then a space or the end, follow. Han characters are words."""
    rest = said[at:].lstrip(_MARKS)
    return not rest or rest[0] == " " or bool(_HAN.match(rest) or _HAN.match(said[at - 1]))


def _is_chinese(references: Sequence[Sequence[str]]) -> bool:
    return any(_HAN.search(text) for right in references for text in right)


class _Characters:
    """Han characters one by one, other words whole, for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        """Tokens without punctuation."""
        return _words(text)
