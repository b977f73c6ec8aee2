"""Answers on the way to the reader: as plain text, or several side by side on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rlhf.generation.speaker import Answer, Speaker, Stream
from rlhf.models.tokenization import decode_response

#: Called with the number of a model and the next piece of its text.
Show = Callable[[int, str], None]


def say_aloud(
    speaker: Speaker,
    ids: Sequence[int],
    show: Callable[[str], None],
    *,
    seed: int,
    drawn: tuple[int, Sequence[int]] | None = None,
    stoppable: bool = False,
) -> Answer:
    """An answer that is shown while it comes; `seed` and `drawn` as `Speaker.say` takes them.

    Stoppable, it ends on Ctrl-C, and what was said until then is the answer.
    """
    stream = Stream(speaker.tokenizer, show)
    try:
        (answer,) = speaker.say([ids], seed=seed, drawn=drawn, heard=stream.put)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        answer = Answer(decode_response(speaker.tokenizer, stream.tokens), stream.tokens, stopped=False)
    finally:
        stream.end()
    return answer


@contextmanager
def spread(names: Sequence[str]) -> Iterator[Show]:
    """Where pieces of text are shown: side by side on a terminal, one answer after the other in a pipe.

    A single model's text comes without its name, so that a pipe holds nothing else.
    """
    if len(names) > 1 and sys.stdout.isatty():
        yield from _side_by_side(names)
        return
    before: int | None = None

    def show(number: int, text: str) -> None:
        nonlocal before
        if len(names) > 1 and number != before:
            print(("\n" if before is not None else "") + f"[{names[number]}]")
        before = number
        print(text, end="", flush=True)

    try:
        yield show
    finally:
        print(flush=True)


def _side_by_side(names: Sequence[str]) -> Iterator[Show]:
    from rich.live import Live
    from rich.table import Column, Table
    from rich.text import Text

    texts = ["" for _ in names]

    def table() -> Table:
        page = Table(*(Column(Text(name), ratio=1) for name in names), expand=True)
        page.add_row(*map(Text, texts))
        return page

    with Live(table(), auto_refresh=False, vertical_overflow="visible") as live:

        def show(number: int, text: str) -> None:
            texts[number] += text
            live.update(table(), refresh=True)

        yield show


def score_line(names: Sequence[str], found: Sequence[float]) -> str:
    """`score: sft/A@1 -0.12, ppo/B@1 +0.80`; one model's without its name."""
    parts = [f"{name} {score:+.2f}" for name, score in zip(names, found, strict=True)]
    return f"score: {', '.join(parts) if len(parts) > 1 else format(found[0], '+.2f')}"
