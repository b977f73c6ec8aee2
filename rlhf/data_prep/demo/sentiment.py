"""Rated movie-review sentences (Hutto & Gilbert, ICWSM 2014) as demonstrations, comparisons and prompts.

Everything here is pure: bytes in, rows and counts out. Every choice is a sha256 of the seed and the row's own content,
so it is the same on every machine and does not move when rows are added. (One exception: a first word that passes
`FREQUENT_WORD` sentences moves from evaluation to training.)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlhf.base.json_files import decode
from rlhf.data_prep.formats.rows import Messages, Row
from rlhf.data_prep.hashes import sha256, unit
from rlhf.data_prep.prepare.tally import Counts

PROMPT = 'Write one sentence of a movie review that starts with "{word}"'
#: First words with more sentences than this hold half of the data; they stay in training.
FREQUENT_WORD = 100
#: A first word becomes a prompt of PPO when it starts at least this many sentences: rarer ones are mostly names.
MIN_SENTENCES_PER_PROMPT = 3
#: Sets of sentences by the upper bound of their hash in [0, 1). Evaluation words only ever go to validation.
TRAINING_WORD_SETS = (
    (0.45, "demonstrations/train"),
    (0.50, "demonstrations/validation"),
    (0.90, "comparisons/train"),
    (1.00, "comparisons/validation"),
)
EVALUATION_WORD_SETS = ((0.50, "demonstrations/validation"), (1.00, "comparisons/validation"))
SETS = tuple(
    f"{kind}/{split}" for kind in ("demonstrations", "comparisons", "prompts") for split in ("train", "validation")
)


@dataclass(frozen=True)
class Sentence:
    """A sentence and the ratings of its raters, -4 (very negative) to 4 (very positive)."""

    id: str
    text: str
    ratings: tuple[int, ...]

    @property
    def word(self) -> str:
        """First word, which the prompt asks for."""
        return self.text.split(" ", 1)[0]


@dataclass(frozen=True)
class Parsed:
    """The sentences of the two source files.

    `rows_in` lines of text = `len(sentences)` + the counts in `dropped`; lines of ratings are counted apart.
    """

    sentences: list[Sentence]
    rows_in: int
    dropped: Counts
    dropped_ratings: Counts


@dataclass(frozen=True)
class Tables:
    """Rows of each of `SETS`, sentences left out of comparisons, and words that did not become prompts."""

    rows: dict[str, list[Row]]
    dropped_sentences: Counts
    dropped_prompts: Counts


class BadLine(ValueError):
    """Raised for a source line that cannot be used; its text is the reason under which it is counted."""


def parse(texts: bytes, ratings: bytes) -> Parsed:
    """Join the two tab-separated files on the sentence id.

    Args:
        texts: lines of id, mean, text.
        ratings: lines of id, mean, standard deviation, list of ratings.
    """
    dropped, dropped_ratings = Counts(_short), Counts(_short)
    rated: dict[str, tuple[float, tuple[int, ...]]] = {}
    for line in _lines(ratings):
        try:
            key, mean, _, values = _fields(line, 4)
            if key in rated:
                raise BadLine("a second line with the same id")
            rated[key] = _number(mean), _ratings(values)
        except BadLine as error:
            dropped_ratings.add(str(error), line.decode("utf-8", "replace"))

    lines = list(_lines(texts))
    sentences: dict[str, Sentence] = {}
    ids: set[str] = set()
    for line in lines:
        try:
            key, mean, text = _fields(line, 3)
            sentence = Sentence(key, " ".join(text.split()), _matching_ratings(_number(mean), rated.get(key)))
            if not sentence.text:
                raise BadLine("empty sentence")
            if key in ids:
                raise BadLine("a second line with the same id")
            if sentence.text in sentences:
                raise BadLine("same sentence as an earlier line")
            ids.add(key)
            sentences[sentence.text] = sentence
        except BadLine as error:
            dropped.add(str(error), line.decode("utf-8", "replace"))
    for key in rated.keys() - ids - {line.split(b"\t")[0].decode("utf-8", "replace") for line in lines}:
        dropped_ratings.add("no sentence with this id", key)
    return Parsed(list(sentences.values()), len(lines), dropped, dropped_ratings)


def _lines(content: bytes) -> Iterator[bytes]:
    return (line.rstrip(b"\r") for line in content.split(b"\n") if line.strip())


def _fields(line: bytes, count: int) -> list[str]:
    try:
        fields = line.decode("utf-8").split("\t")
    except UnicodeDecodeError as error:
        raise BadLine("not UTF-8") from error
    if len(fields) != count:
        raise BadLine(f"not {count} tab-separated fields")
    return fields


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise BadLine("mean is not a number") from error


def _ratings(text: str) -> tuple[int, ...]:
    try:
        values = decode(text)
    except ValueError as error:
        raise BadLine("ratings are not a list of whole numbers from -4 to 4") from error
    if not isinstance(values, list) or not all(type(v) is int and -4 <= v <= 4 for v in values):
        raise BadLine("ratings are not a list of whole numbers from -4 to 4")
    if len(values) < 2:
        raise BadLine("fewer than two raters")
    return tuple(values)


def _matching_ratings(mean: float, rated: tuple[float, tuple[int, ...]] | None) -> tuple[int, ...]:
    if rated is None:
        raise BadLine("no usable line of ratings with this id")
    stated, values = rated
    # not <=: a mean of nan must not pass
    if not (abs(mean - _mean(values)) <= 1e-3 and abs(stated - _mean(values)) <= 1e-3):
        raise BadLine("stated mean is not the mean of the ratings")
    return values


def rater_halves(sentence: Sentence, seed: int) -> tuple[list[int], list[int]]:
    """Return the ratings of two halves of the raters: the first trains the reward model, the second checks it.

    Raters are put in the order of a hash of (seed, sentence id, position); the first half has the odd one.
    """
    order = sorted(range(len(sentence.ratings)), key=lambda i: sha256(seed, "rater", sentence.id, i))
    middle = (len(order) + 1) // 2
    return [sentence.ratings[i] for i in order[:middle]], [sentence.ratings[i] for i in order[middle:]]


def evaluation_words(sentences: Iterable[Sentence], seed: int, share: float) -> set[str]:
    """Return about `share` of the first words, of whatever case: prompts on which nothing is trained."""
    counts = Counter(sentence.word.casefold() for sentence in sentences)
    return {w for w, n in counts.items() if n <= FREQUENT_WORD and unit(seed, "word", w) < share}


def assign(sentence: Sentence, held_out_words: set[str], seed: int) -> str:
    """Return the set of a sentence."""
    bounds = EVALUATION_WORD_SETS if sentence.word.casefold() in held_out_words else TRAINING_WORD_SETS
    position = unit(seed, "sentence", sentence.text)
    return next(name for upper, name in bounds if position < upper)


def build_tables(
    sentences: Sequence[Sentence], *, seed: int, responses_per_prompt: int, evaluation_share: float
) -> Tables:
    """Split sentences into the six sets. Rows come in the order of a hash, so that the first rows are a fair sample.

    Args:
        seed: of the split, the rater halves and the order.
        responses_per_prompt: most responses (K) in a comparison.
        evaluation_share: share of first words that are held out of all training.
    """
    held_out = evaluation_words(sentences, seed, evaluation_share)
    rows: dict[str, list[Row]] = {name: [] for name in SETS}
    dropped, dropped_prompts = Counts(_short), Counts(_short)
    groups: defaultdict[tuple[str, str], list[Sentence]] = defaultdict(list)
    for sentence in sorted(sentences, key=lambda s: sha256(seed, "order", s.text)):
        name = assign(sentence, held_out, seed)
        if name.startswith("demonstrations"):
            rows[name].append(_demonstration(sentence))
        else:
            groups[name, sentence.word].append(sentence)

    for (name, word), members in groups.items():
        for start in range(0, len(members), responses_per_prompt):
            group = members[start : start + responses_per_prompt]
            if len(group) == 1:
                dropped.add("alone with its first word in its set: nothing to compare with", group[0].text)
            else:
                rows[name].append(_comparison(word, group, seed))

    words = Counter(sentence.word for sentence in sentences)
    for word in sorted(words, key=lambda w: sha256(seed, "prompt", w)):
        if words[word] < MIN_SENTENCES_PER_PROMPT:
            dropped_prompts.add(f"first word of fewer than {MIN_SENTENCES_PER_PROMPT} sentences", word)
        elif not (word[0].isalnum() or word[0] in "\"'"):
            dropped_prompts.add("first word starts with punctuation", word)
        else:
            rows[f"prompts/{'validation' if word.casefold() in held_out else 'train'}"].append({"prompt": prompt(word)})
    for name in ("comparisons/train", "comparisons/validation"):
        rows[name].sort(key=lambda row: sha256(seed, "group", row["responses"][0][0]["content"]))
    return Tables(rows, dropped, dropped_prompts)


def prompt(word: str) -> Messages:
    """Return the request for a sentence that starts with `word`."""
    return [{"role": "user", "content": PROMPT.format(word=word)}]


def _answer(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def _demonstration(sentence: Sentence) -> Row:
    return {"prompt": prompt(sentence.word), "completion": _answer(sentence.text), "rating": _mean(sentence.ratings)}


def _comparison(word: str, group: Sequence[Sentence], seed: int) -> Row:
    halves = [rater_halves(sentence, seed) for sentence in group]
    return {
        "prompt": prompt(word),
        "responses": [_answer(sentence.text) for sentence in group],
        "ratings": [_mean(a) for a, _ in halves],
        "ratings_held_out": [_mean(b) for _, b in halves],
        "ratings_all": [_mean(sentence.ratings) for sentence in group],
        "rater_ratings": [a for a, _ in halves],
        "rater_ratings_held_out": [b for _, b in halves],
    }


def _short(example: str) -> str:
    return example[:120]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
