"""Cleaning in named steps, each optional and counted: some mend texts, others drop rows.

docs/data.md describes each step.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import ftfy

from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.prepare.personal import CODE, replace_personal_data, replacements
from rlhf.data_prep.prepare.recipe import CLEANING_STEPS, Options
from rlhf.data_prep.prepare.tally import Tally
from rlhf.models.messages import PARTS, map_texts

_FTFY = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    uncurl_quotes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    fix_line_breaks=False,
    remove_control_chars=False,
)
# Not the joiners U+200C and U+200D: Persian, Indic scripts and emoji need them.
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
)
_BLOCK_TAGS = "p|br|div|li|ul|ol|tr|table|h[1-6]|blockquote|hr|pre"
_TAG = re.compile(
    rf"<(?:/?(?P<block>{_BLOCK_TAGS})|/?(?:a|abbr|b|big|code|em|font|i|img|s|small|span|strong|sub|sup|tbody|td|th|thead|u))"
    r"(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_WIDE = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}
_WIDE[0x3000] = 0x20
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003134f]")
_KANA_OR_HANGUL = re.compile("[\u3040-\u30ff\u31f0-\u31ff\uac00-\ud7af]")
_TEMPLATE = re.compile(
    r"<\|[a-z_]{2,30}\|>|\[/?INST\]|<</?SYS>>|</?s>(?=\s|$)|<(?:start|end)_of_turn>|(?:^|\n\n)(?:Human|Assistant):"
    r"|### (?:Instruction|Response):"
)
_TEMPLATE_WORDS = re.compile(
    r"\b(?:human|user|assistant|system|response|answer|output|tl;dr|n/a|none|null|nan)\b:?|<[^<>]*>", re.IGNORECASE
)


#: Letters of a text from which its language can be told.
FEWEST_LETTERS = 20


class Dropped(Exception):
    """Raised for a row that a step takes out; its text is the reason."""


def fix_encoding(text: str) -> str:
    """Return the text with wrong decoding, such as "cafÃ©", mended, in Unicode NFC."""
    return text if text.isascii() else ftfy.fix_text(text, _FTFY)


def fix_control(text: str) -> str:
    """Return the text without control and invisible characters; line and paragraph separators become line ends."""
    if text.isprintable():
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    return _CONTROL.sub("", text)


def strip_html(text: str) -> str:
    """Return the text without the usual tags, entities resolved; code between backticks stays as it is."""
    if "<" not in text and "&" not in text:
        return text
    parts = CODE.split(text)
    return "".join(part if i % 2 else _strip_tags(part) for i, part in enumerate(parts))


def _strip_tags(text: str) -> str:
    text = _TAG.sub(lambda match: "\n" if match["block"] else "", _HIDDEN.sub("", text))
    return re.sub(r"\n{3,}", "\n\n", html.unescape(text))


def fix_width(text: str) -> str:
    """Return the text with plain letters, digits and spaces for full-width ones."""
    return text.translate(_WIDE)


@cache
def _opencc(name: str) -> Any:
    import opencc

    return opencc.OpenCC(name)


def _converted(text: str, name: str) -> str:
    return _opencc(name).convert(text) if _HAN.search(text) and not _KANA_OR_HANGUL.search(text) else text


def to_simplified(text: str) -> str:
    """Return the text in simplified Chinese characters; Japanese and Korean texts stay."""
    return _converted(text, "t2s")


def to_traditional(text: str) -> str:
    """Return the text in traditional Chinese characters; Japanese and Korean texts stay."""
    return _converted(text, "s2t")


MENDING: dict[str, Callable[[str], str]] = {
    "encoding": fix_encoding,
    "control": fix_control,
    "html": strip_html,
    "width": fix_width,
    "simplified": to_simplified,
    "traditional": to_traditional,
    "personal": replace_personal_data,
}


def check_template(record: Record) -> Record:
    """Return the record; raise `Dropped` where a text holds marks of a chat template."""
    for text in _texts(record):
        if mark := _TEMPLATE.search(text):
            raise Dropped(f"holds the mark '{mark[0].strip()}' of a template")
    return record


def check_empty(record: Record) -> Record:
    """Return the record less responses without content; raise `Dropped` where too few are left."""
    full = [has_content(text) for text in record.whole_responses]
    if all(full):
        return record
    return without_responses(record, full, "empty or template-only answer")


def has_content(text: str) -> bool:
    """Return True for a text with a letter, digit or symbol such as an emoji beyond the words of a template."""
    return any(
        unicodedata.category(c)[0] in "LN" or unicodedata.category(c) == "So" for c in _TEMPLATE_WORDS.sub("", text)
    )


DROPPING: dict[str, Callable[[Record], Record]] = {"template": check_template, "empty": check_empty}


def without_responses(record: Record, keep: Sequence[bool], reason: str) -> Record:
    """Return the record with some responses only; raise `Dropped(reason)` where none, or no second one of several, is left."""
    if sum(keep) < min(2, len(record.responses)):
        raise Dropped(reason)

    def select(values: Any) -> Any:
        return values and [value for value, stays in zip(values, keep, strict=True) if stays]

    return replace(
        record,
        responses=select(record.responses),
        parts=select(record.parts),
        ratings=select(record.ratings),
        rater_ratings=select(record.rater_ratings),
        ratings_held_out=select(record.ratings_held_out),
    )


def clean(record: Record, options: Options, tally: Tally) -> Record:
    """Return the record after all chosen steps, in their order.

    Args:
        tally: counts, by step, the rows that were changed.

    Raises:
        Dropped: a step takes the row out.
    """
    for step in CLEANING_STEPS:
        if step not in options.clean:
            continue
        record = DROPPING[step](record) if step in DROPPING else _mended(record, step, tally)
    if options.languages:
        check_language(record, options.languages)
    return record


def _mended(record: Record, step: str, tally: Tally) -> Record:
    mend = MENDING[step]
    texts, parts = _texts(record), [*(message.get(PARTS, "") for message in record.prompt), *record.parts]
    mended, mended_parts = [mend(text) for text in texts], [map_texts(part, mend) for part in parts]
    old, new = [*texts, *parts], [*mended, *mended_parts]
    if old == new:
        return record
    tally.changed(step, {kind: f"{record.place}: {example}" for kind, example in _examples(step, old, new).items()})
    turns = len(record.prompt)
    prompt = [
        {**message, "content": text, **({PARTS: part} if part else {})}
        for message, text, part in zip(record.prompt, mended[:turns], mended_parts[:turns], strict=True)
    ]
    return replace(record, prompt=prompt, responses=mended[turns:], parts=mended_parts[turns:])


def _examples(step: str, texts: Sequence[str], mended: Sequence[str]) -> dict[str, str]:
    """Return the first change of each kind, with a little around it; personal data are shown by their form."""
    if step == "personal":
        return {of.mark: str(of) for text in reversed(texts) for of in reversed(replacements(text)[1])}
    old, new = next(pair for pair in zip(texts, mended, strict=True) if pair[0] != pair[1])
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, at - 15)
    return {step: f"{old[start : at + 25]!r} -> {new[start : at + 25]!r}"}


def check_language(record: Record, languages: Sequence[str]) -> None:
    """Raise `Dropped` for a record in another language, by py3langid (97 languages, its model is in the package).

    It judges the last turn and the best response together. Texts of fewer than `FEWEST_LETTERS` letters and without
    Chinese characters pass.
    """
    import py3langid

    text = f"{record.last_turn}\n{record.best or ''}"
    if sum(character.isalpha() for character in text) < FEWEST_LETTERS and not _HAN.search(text):
        return
    language = py3langid.classify(text)[0]
    if language not in languages:
        raise Dropped(f"language {language}")


def _texts(record: Record) -> list[str]:
    return [*(message["content"] for message in record.prompt), *record.responses]
