"""Chat templates as texts: the named ones, files, and what is settled before a model is trained with one.

A settled template writes the BOS token once if the model is used to it, and a date that does not change any more.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from pathlib import Path

from rlhf.base.errors import UserError, did_you_mean
from rlhf.base.text_files import read_text

#: Templates for models without one, or whose own adds an unwanted system prompt.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # For models pretrained here: their vocabulary has no tokens for turns, so words mark them.
    "dialogue": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    # For base models: contents follow each other, with the stop token after the answer (TL;DR style).
    "plain": (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
#: The line break is no text: it ends a comment, and lets a block at the beginning of the template stay there.
_WRITE_BOS = "{{ bos_token }}{# the model is used to one BOS token #}\n"
_DATE_FUNCTION = "strftime_now"
_DIRECTIVE = re.compile(r"(?<!\{)%[-_0^#]?[A-Za-z]")


def template_text(name: str) -> str:
    """Return the Jinja text of a template's name in `TEMPLATES` or of a file, without a byte order mark.

    Raises:
        UserError: there is none, or the file is no text, as of `read_text`.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not Path(name).is_file():
        raise UserError(
            f"no chat template '{name}'{did_you_mean(name, TEMPLATES)}: give a file or one of {sorted(TEMPLATES)}"
        )
    return re.sub("\r\n?", "\n", read_text(Path(name)))


def writing_bos(text: str) -> str:
    """Return a template that writes the BOS token before what this one writes."""
    return _WRITE_BOS + text


def writes_date(text: str) -> bool:
    """Return whether a template asks for today's date."""
    return _DATE_FUNCTION in text


def with_date(text: str, day: date) -> str:
    """Return a template in which a day stands in for today, at midnight.

    A macro takes the place of the function that returns the date: it knows the parts of a date that the template names.
    """
    midnight = datetime(day.year, day.month, day.day)
    parts = {directive: midnight.strftime(directive) for directive in _DIRECTIVE.findall(text)}
    replaced = "".join(f" | replace({directive!r}, {value!r})" for directive, value in parts.items())
    macro = f"{{% macro {_DATE_FUNCTION}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
    return f"{{# {day.isoformat()} is the day of the training #}}{macro}\n{text}"
