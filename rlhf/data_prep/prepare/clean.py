"""Cleaning in named steps, each switchable, each counted: steps that mend texts, and steps that drop rows.

| step | what it does |
|---|---|
| `encoding` | mends text that was decoded wrongly (ftfy), and brings it to Unicode NFC |
| `control` | takes out control and invisible characters; line ends become `\\n` |
| `html` | takes out tags and resolves entities, except inside code fences |
| `width` | full-width letters, digits and spaces become plain ones; Chinese punctuation stays |
| `simplified`, `traditional` | converts Chinese characters (OpenCC); texts with kana or hangul stay |
| `template` | drops rows whose texts hold marks of a chat template: it would be applied twice |
| `personal` | replaces e-mail, phone and card numbers, IP addresses and keys by marks |
| `empty` | drops responses without a letter, digit or emoji beyond the words of a template |
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
from rlhf.data_prep.prepare.personal import replace_personal_data
from rlhf.data_prep.prepare.recipe import CLEANING_STEPS, Options
from rlhf.data_prep.prepare.tally import Tally

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
_FENCE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
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
    """A row that a step takes out; the text is the reason."""


def fix_encoding(text: str) -> str:
    """Text decoded wrongly, such as "cafÃ©", as it was meant; NFC."""
    return text if text.isascii() else ftfy.fix_text(text, _FTFY)


def fix_control(text: str) -> str:
    """Without control and invisible characters; line and paragraph separators are line ends."""
    if text.isprintable():
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n")
    return _CONTROL.sub("", text)


def strip_html(text: str) -> str:
    """Without the usual tags, entities resolved; code between backticks stays as it is."""
    if "<" not in text and "&" not in text:
        return text
    parts = _FENCE.split(text)
    return "".join(part if i % 2 else _strip_tags(part) for i, part in enumerate(parts))


def _strip_tags(text: str) -> str:
    text = _TAG.sub(lambda match: "\n" if match["block"] else "", _HIDDEN.sub("", text))
    return re.sub(r"\n{3,}", "\n\n", html.unescape(text))


def fix_width(text: str) -> str:
    """Full-width letters, digits and spaces as plain ones."""
    return text.translate(_WIDE)


@cache
def _opencc(name: str) -> Any:
    import opencc

    return opencc.OpenCC(name)


def _converted(text: str, name: str) -> str:
    return _opencc(name).convert(text) if _HAN.search(text) and not _KANA_OR_HANGUL.search(text) else text


def to_simplified(text: str) -> str:
    """Traditional Chinese characters as simplified ones; Japanese and Korean texts as they are."""
    return _converted(text, "t2s")


def to_traditional(text: str) -> str:
    """Simplified Chinese characters as traditional ones; Japanese and Korean texts as they are."""
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
    """Refuses a record in which a text holds marks of a chat template."""
    for text in _texts(record):
        if mark := _TEMPLATE.search(text):
            raise Dropped(f"holds the mark '{mark[0].strip()}' of a template")
    return record


def check_empty(record: Record) -> Record:
    """Takes out responses without content; refuses the record when none, or no second one to compare with, is left."""
    if all(has_content(text) for text in record.responses):
        return record
    return without_responses(record, [has_content(text) for text in record.responses], "empty or template-only answer")


def has_content(text: str) -> bool:
    """Whether a letter, digit, or symbol such as an emoji is left beyond the words of a template."""
    return any(
        unicodedata.category(c)[0] in "LN" or unicodedata.category(c) == "So" for c in _TEMPLATE_WORDS.sub("", text)
    )


DROPPING: dict[str, Callable[[Record], Record]] = {"template": check_template, "empty": check_empty}


def without_responses(record: Record, keep: Sequence[bool], reason: str) -> Record:
    """The record with some responses only; `Dropped(reason)` when too few are left for what it was."""
    if sum(keep) < min(2, len(record.responses)):
        raise Dropped(reason)

    def kept(values: Any) -> Any:
        return None if values is None else [v for v, wanted in zip(values, keep, strict=True) if wanted]

    return replace(
        record,
        responses=kept(record.responses),
        ratings=kept(record.ratings),
        rater_ratings=kept(record.rater_ratings) if record.rater_ratings else [],
        ratings_held_out=kept(record.ratings_held_out),
    )


def clean(record: Record, options: Options, tally: Tally) -> Record:
    """The record after all chosen steps, in their order.

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
    before = _texts(record)
    after = [mend(text) for text in before]
    changed = next((i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new), None)
    if changed is None:
        return record
    tally.changed(step, f"{record.place}: {_difference(before[changed], after[changed], step)}")
    turns = len(record.prompt)
    prompt = [{**m, "content": text} for m, text in zip(record.prompt, after[:turns], strict=True)]
    return replace(record, prompt=prompt, responses=after[turns:])


def _difference(old: str, new: str, step: str) -> str:
    """The first place where two texts differ, with a little around it; what was personal is not shown."""
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, at - 15)
    shown = "" if step == "personal" else f"{old[start : at + 25]!r}"
    return f"{shown} -> {new[start : at + 25]!r}"


def check_language(record: Record, languages: Sequence[str]) -> None:
    """Refuses a record in another language, by py3langid (97 languages, its model is in the package).

    The last turn and the best response are looked at together; fewer than 20 letters and no Chinese character say too
    little, and pass.
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
