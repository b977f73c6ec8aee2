"""Task checks: a model's answers to a user's own rows, compared with references by the field's libraries."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.base import intervals
from rlhf.base.errors import UserError, did_you_mean, require
from rlhf.base.intervals import Array
from rlhf.config import CHECKS
from rlhf.data_prep.formats.files import is_readable, read_file
from rlhf.data_prep.formats.rows import Malformed, Messages, Row, Untrainable, as_prompt, as_response, show_value
from rlhf.data_prep.stage_rows import check_unicode
from rlhf.models.base import context_length
from rlhf.models.responses import answer_prompts

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
    """For each prompt the right answers, any of which will do."""

    def figures(self, texts: Sequence[str], seed: int = 0) -> dict[str, Figure]:
        """Return the figures of one answer to each prompt, with 95% intervals over rows; a single row has none."""
        return _MEASURES[self.kind](self.references, texts, seed)


# Reading


def read_checks(options: Sequence[str]) -> list[Check]:
    """Return the checks that options `KIND=FILE` name.

    Raises:
        UserError: no such kind or file, two files of one name, or a row without a prompt or reference.
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
            f"'{text}' is not a check{did_you_mean(kind, CHECKS)}; write KIND=FILE, KIND one of {', '.join(CHECKS)}"
        )
    rows = read_rows(Path(path))
    return make_check(Path(path), kind, rows)


def make_check(file: Path, kind: str, rows: Sequence[Row]) -> Check:
    """Return a check of rows that `read_rows` read; raise `UserError` for a row without a usable reference."""
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
            f"{file}, row {number}: the label '{label}' differs from '{other}' only in case or spaces, which do not count in "
            "answers; write both the same way",
        )


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a data file, `prompt` as messages and other columns unchanged.

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
            check_unicode(row)
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
    reference = row.get("reference")
    texts = reference if isinstance(reference, list) else [reference]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise Malformed(f"'reference' must be a text or a list of texts, got {show_value(reference)}")
    return list(texts)


# Answers


def likeliest_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    length: int,
    batch_size: int,
) -> list[str]:
    """Return one answer of the likeliest tokens, at most `length`, to each prompt (token ids).

    Raises:
        UserError: a prompt leaves no room for the answer.
    """
    longest, context = max(map(len, prompts)), context_length(model)
    require(
        longest + length <= context,
        f"a prompt of {longest} tokens with check_length={length} does not fit into the model's context of {context} tokens",
    )
    return answer_prompts(model, tokenizer, prompts, response_length=length, temperature=0.0, at_once=batch_size).texts


# Figures


def summarisation(references: Sequence[Sequence[str]], texts: Sequence[str], seed: int) -> dict[str, Figure]:
    """Return ROUGE-1, -2 and -L (F), by the best reference of each row."""
    from rouge_score.rouge_scorer import RougeScorer

    # The library's own tokens are Latin letters and digits only: any Chinese summary would score 0.
    characters = _Characters() if _is_chinese(references) else None
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=True, tokenizer=characters)
    rows = [scorer.score_multi(list(right), text) for right, text in zip(references, texts, strict=True)]
    return {name: _mean([row[name].fmeasure for row in rows], seed) for name in names}


def translation(references: Sequence[Sequence[str]], texts: Sequence[str], seed: int) -> dict[str, Figure]:
    """Return BLEU and chrF of the whole file, 0 to 100, with sacrebleu's bootstrap, which has its own seed."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    most = max(map(len, references))
    streams: Any = [[right[i] if i < len(right) else None for right in references] for i in range(most)]
    metrics = {"bleu": BLEU(tokenize="zh" if _is_chinese(references) else "13a"), "chrf": CHRF()}
    figures: dict[str, Figure] = {}
    for name, metric in metrics.items():
        several = len(texts) > 1
        score: Any = metric.corpus_score(list(texts), streams, n_bootstrap=intervals.DRAWS if several else 1)
        low, high = (float(score._mean - score._ci), float(score._mean + score._ci)) if several else (None, None)
        figures[name] = {"value": float(score.score), "low": low, "high": high}
    return figures


def question_answering(references: Sequence[Sequence[str]], texts: Sequence[str], seed: int) -> dict[str, Figure]:
    """Return exact match and F1 over words, by the best reference of each row (SQuAD; Rajpurkar et al. 2016)."""
    pairs = list(zip(references, texts, strict=True))
    exact = [max(_words(text) == _words(one) for one in right) for right, text in pairs]
    overlap = [max(_overlap(_words(text), _words(one)) for one in right) for right, text in pairs]
    return {"exact_match": _mean(exact, seed), "f1": _mean(overlap, seed)}


def classification(references: Sequence[Sequence[str]], texts: Sequence[str], seed: int) -> dict[str, Figure]:
    """Return accuracy and macro F1; an answer that names no label is wrong, and counts for no label."""
    from sklearn.metrics import f1_score

    labels = sorted({_folded(label) for (label,) in references})
    right = np.array([labels.index(_folded(label)) for (label,) in references])
    named = np.array([_named(text, labels) for text in texts])

    def macro_f1(times: Array) -> float:
        among = list(range(len(labels)))
        # A label that is neither right nor named in a draw has no F1: as 0 it would pull every interval down.
        return float(f1_score(right, named, labels=among, average="macro", sample_weight=times, zero_division=np.nan))

    low = high = None
    if len(texts) > 1:
        draws = [macro_f1(times) for rows in intervals.draws(len(texts), seed) for times in rows]
        low, high = intervals.interval(np.array(draws))
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
    """Return words without case, punctuation and articles; Han characters one by one."""
    spaced = _HAN.sub(lambda match: f" {match[0]} ", text.lower())
    bare = "".join(c for c in spaced if c not in _MARKS)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _overlap(words: list[str], right: list[str]) -> float:
    """Return the F1 of two bags of words, 1 for two empty ones."""
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right)) if words or right else 1.0


def _folded(text: str) -> str:
    """Return a label without case and with single spaces; punctuation stays, as `+1` and `C++` are labels, too."""
    return " ".join(text.casefold().split())


def _named(text: str, labels: Sequence[str]) -> int:
    """Return the number of the longest label at the beginning of an answer, after any marks, or -1."""
    answer = _folded(text)
    for start in range(len(answer) - len(answer.lstrip(_MARKS + " ")) + 1):
        matches = [
            (len(label), number)
            for number, label in enumerate(labels)
            if answer.startswith(label, start) and _ends_word(answer, start + len(label))
        ]
        if matches:
            return max(matches)[1]
    return -1


def _ends_word(text: str, end: int) -> bool:
    """Return whether a word ends at `end`: only marks, then a space or the end follow. A Han character is a word."""
    rest = text[end:].lstrip(_MARKS)
    return not rest or rest[0] == " " or bool(_HAN.match(rest) or _HAN.match(text[end - 1]))


def _is_chinese(references: Sequence[Sequence[str]]) -> bool:
    return any(_HAN.search(text) for right in references for text in right)


class _Characters:
    """Tokenizer for rouge-score: Han characters one by one, other words whole."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return _words(text)
