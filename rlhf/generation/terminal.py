"""Input and output of `rlhf chat` and `rlhf generate`: answers as text while they come, for a reader or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from rlhf.base import screen
from rlhf.base.errors import UserError
from rlhf.generation.chat_model import ChatModel
from rlhf.models.responses import Answer, single_answers
from rlhf.models.tokenization import decode_response

#: Called with the number of a model and the next piece of its text.
Show = Callable[[int, str], None]


def read_input(read: Callable[[], str]) -> str:
    """Return the result of `read`; raise `UserError` if standard input is not text."""
    try:
        return read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding.upper()} (byte {error.start + 1})") from error


class Stream(TextStreamer):
    """Shows an answer while its tokens come, whole words at a time, and stores the tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.show, self.tokens = show, list[int]()

    def put(self, value: Tensor) -> None:
        """Add the tokens of one step, (1,), or (0,) after the answer's end."""
        self.tokens += value.tolist()
        super().put(value.cpu())

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show text that cannot change any more."""
        if text:
            self.show(text)


def stream_answer(
    model: ChatModel,
    ids: Sequence[int],
    show: Callable[[str], None],
    *,
    seed: int,
    batch_slice: tuple[int, Sequence[int]] | None = None,
    stoppable: bool = False,
) -> Answer:
    """Sample an answer and show it while its tokens come; `seed` and `batch_slice` are those of `ChatModel.draw`.

    A stoppable answer ends on Ctrl-C with the tokens that it has by then.
    """
    stream = Stream(model.tokenizer, show)
    try:
        sampled = model.draw([ids], seed=seed, batch_slice=batch_slice, on_tokens=stream.put)
        (answer,) = single_answers(model.tokenizer, sampled)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        answer = Answer(decode_response(model.tokenizer, stream.tokens), stream.tokens, stopped=False)
    finally:
        stream.end()
    return answer


@contextmanager
def answer_view(names: Sequence[str]) -> Iterator[Show]:
    """Yield a function that shows pieces of answers: side by side on a terminal, one after the other in a pipe.

    A single model's answer has no label, so that a pipe contains nothing else.
    """
    if len(names) > 1 and sys.stdout.isatty():
        yield from _side_by_side(names)
        return
    current: int | None = None
    # A program gets the very text of the answers.
    output = sys.stdout if sys.stdout.isatty() else screen.raw(sys.stdout)

    def show(number: int, text: str) -> None:
        nonlocal current
        if len(names) > 1 and number != current:
            print(("\n" if current is not None else "") + f"[{names[number]}]", file=output)
        current = number
        print(text, end="", file=output, flush=True)

    try:
        yield show
    finally:
        print(file=output, flush=True)


def _side_by_side(names: Sequence[str]) -> Iterator[Show]:
    from rich.live import Live
    from rich.table import Column, Table
    from rich.text import Text

    texts = ["" for _ in names]

    def table() -> Table:
        page = Table(*(Column(Text(name), ratio=1) for name in names), expand=True)
        page.add_row(*map(Text, texts))
        return page

    with Live(table(), console=screen.console(), auto_refresh=False, vertical_overflow="visible") as live:

        def show(number: int, text: str) -> None:
            texts[number] += text
            live.update(table(), refresh=True)

        yield show


def score_line(names: Sequence[str], scores: Sequence[float]) -> str:
    """Return `score: sft/A@1 -0.12, ppo/B@1 +0.80`, or `score: -0.12` for one model."""
    parts = [f"{name} {score:+.2f}" for name, score in zip(names, scores, strict=True)]
    return f"score: {', '.join(parts) if len(parts) > 1 else format(scores[0], '+.2f')}"
