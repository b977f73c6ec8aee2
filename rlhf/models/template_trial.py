"""A trial of chat templates from outside, in a process with limits: a template is a program, and may never end.

transformers renders templates in a sandbox that keeps them from files and functions, but not from time and memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable

from rlhf.base.assets import cache_dir
from rlhf.base.errors import UserError
from rlhf.models.templates import TEMPLATES

SECONDS = 10
"""Time that a template may take for the conversations of its trial."""
MEGABYTES = 1024
"""Memory that a template may take in its trial."""
CHARACTERS = 1 << 20
"""Longest text that a template may make of a conversation of a few words."""
_PASSED, _TOO_LONG = 0, 3
_CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello to you."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Now we go on."},
    ],
]
_PROGRAM = f"""
import sys
sys.path = [place for place in sys.path if place]  # not the working directory
import json
from pathlib import Path
from transformers.utils.chat_template_utils import render_jinja_template
try:
    import resource
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    memory, cpu = held + ({MEGABYTES} << 20), int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + {SECONDS}
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except (ImportError, OSError, ValueError):  # a system without limits: the parent's clock is left
    pass
given = json.load(sys.stdin)
for conversation in given["conversations"]:
    for header in (True, False):
        try:
            texts, _ = render_jinja_template(
                conversations=[conversation], chat_template=given["template"], add_generation_prompt=header
            )
        except MemoryError:
            raise
        except Exception:  # a conversation that it refuses, or an error that is named where it is loaded
            continue
        if len(texts[0]) > {CHARACTERS}:
            sys.exit({_TOO_LONG})
"""


def try_templates(texts: Iterable[str], origin: str) -> None:
    """Render short conversations with each template in a process of its own; one that passed is not tried again.

    Args:
        origin: what the templates belong to, in messages.

    Raises:
        UserError: a template takes too much time or memory, or makes too long a text.
    """
    for text in texts:
        mark = cache_dir() / "templates" / hashlib.sha256(text.encode(errors="replace")).hexdigest()
        if text in TEMPLATES.values() or mark.exists():
            continue
        if not _passes(text):
            raise UserError(
                f"the chat template of {origin} is not used: for a few words it takes more than {SECONDS} s or "
                f"{MEGABYTES} MB, or writes more than {CHARACTERS:,} characters; give another --chat_template"
            )
        with contextlib.suppress(OSError):  # it is tried again next time
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _passes(text: str) -> bool:
    task = json.dumps({"template": text, "conversations": _CONVERSATIONS})
    try:
        process = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            input=task,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=3 * SECONDS,  # by the clock, on a busy machine
        )
    except subprocess.TimeoutExpired:
        return False
    return process.returncode == _PASSED
