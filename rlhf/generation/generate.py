"""`rlhf generate --model ppo/demo --prompt "..."`: answers to prompts, as text that comes as it is made, or as JSON lines.

A line of the file: `number` of the prompt, from 1, `sample`, `model`, `prompt` (messages), `response`, `tokens` (their number,
the stop token included), `stopped`, and `score` where something scores; the figures of a check are beside it, in
`NAME.check.json`. The same seed gives the same answers, in either form and whatever the batch size: each answer has random
numbers of its own, the same for all models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError, run_command
from rlhf.config import parse_config
from rlhf.data_prep.formats.rows import Row
from rlhf.evaluation.checks import Figure, make_check, read_rows
from rlhf.generation.config import GenerateConfig
from rlhf.generation.page import say_aloud, score_line, spread
from rlhf.generation.speaker import Answer, Speaker, open_reward, open_speakers, read_input, scores
from rlhf.models.compute import Compute
from rlhf.models.sampling import SAMPLED_AT_ONCE
from rlhf.reward.sources import Source
from rlhf.run.progress import Progress


@dataclass(frozen=True)
class Block:
    """Answers whose random numbers one seed draws: those to some prompts, samples of one prompt together."""

    seed: int
    items: list[tuple[int, int]]
    """Number of the prompt, from 0, and of the sample."""


@dataclass(frozen=True)
class Work:
    """What there is to do, checked."""

    config: GenerateConfig
    rows: list[Row]
    """With a `prompt` of messages."""
    speakers: list[Speaker]
    prompts: list[list[list[int]]]
    """For each speaker the token ids of all prompts."""
    source: Source | None
    """What scores the answers."""

    @property
    def blocks(self) -> Iterator[Block]:
        """Of a fixed size: how many random numbers a seed draws must not depend on the batch size."""
        samples = self.config.samples_per_prompt
        step = max(SAMPLED_AT_ONCE // samples, 1)
        for first in range(0, len(self.rows), step):
            last = min(first + step, len(self.rows))
            items = [(row, sample) for row in range(first, last) for sample in range(samples)]
            yield Block(self.config.seed * 1_000_003 + first, items)


def run(config: GenerateConfig) -> None:
    """Reads the prompts, opens the models, and answers."""
    output = Path(config.output) if config.output else None
    for file in (output, _figures_file(output)) if output is not None else ():
        if file.exists():
            raise UserError(f"{file} is there already; give another --output")
    rows = _prompts(config)
    check = make_check(Path(str(config.prompts)), config.check, rows) if config.check else None
    compute = Compute.choose(config)
    speakers = open_speakers(config, compute)
    prompts = [_encoded(speaker, rows) for speaker in speakers]
    source = open_reward(config, speakers, compute, batch_size=config.per_device_eval_batch_size)
    work = Work(config, rows, speakers, prompts, source)
    said = dict(_show(work) if output is None else _write(work, output))
    if check is not None:
        answers = [[said[row, 0][number].text for row in range(len(rows))] for number in range(len(speakers))]
        _report(config, output, {s.name: check.figures(a, config.seed) for s, a in zip(speakers, answers, strict=True)})


def _report(config: GenerateConfig, output: Path | None, models: dict[str, dict[str, Figure]]) -> None:
    """Shows the figures of a check, and keeps them beside the answers: `check`, `prompts` and `models`, by name."""
    for model, figures in models.items():
        for name, figure in figures.items():
            print(f"{model} {name}: {_figure(figure)}", file=sys.stderr)
    if output is not None:
        content = {"check": config.check, "prompts": config.prompts, "models": models}
        _figures_file(output).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _figures_file(output: Path) -> Path:
    return output.with_suffix(".check.json")


def _figure(figure: Any) -> str:
    between = "" if figure["low"] is None else f" ({figure['low']:.3f} to {figure['high']:.3f})"
    return f"{figure['value']:.3f}{between}"


# Prompts


def _prompts(config: GenerateConfig) -> list[Row]:
    """Rows with a `prompt` of messages."""
    rows: list[Row]
    if config.prompts is None:
        if not config.prompt and sys.stdin.isatty():
            raise UserError("no prompt: give --prompt TEXT or --prompts FILE, or pipe a text in")
        texts = config.prompt or [read_input(sys.stdin.read).strip()]
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    elif config.prompts.endswith(".txt"):
        rows = [{"prompt": [{"role": "user", "content": line}]} for line in _lines(Path(config.prompts))]
    else:
        rows = read_rows(Path(config.prompts))
    if config.system:
        first = {"role": "system", "content": config.system}
        rows = [r if r["prompt"][0]["role"] == "system" else {**r, "prompt": [first, *r["prompt"]]} for r in rows]
    return rows


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts {file}: {error}") from error
    if not any(lines):
        raise UserError(f"{file} is empty: it holds no prompts")
    return [line for line in lines if line]


def _encoded(speaker: Speaker, rows: Sequence[Row]) -> list[list[int]]:
    """Token ids of all prompts; a bad one is named before anything is computed."""
    encoded = []
    for number, row in enumerate(rows, start=1):
        try:
            encoded.append(speaker.encode(row["prompt"]))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from error
    return encoded


# Answers


def _show(work: Work) -> Iterator[tuple[tuple[int, int], list[Answer]]]:
    """Shows the answers while they come; standard output holds nothing else. Yields each item with its answers."""
    names = [speaker.name for speaker in work.speakers]
    several = len(work.rows) * work.config.samples_per_prompt > 1
    for block in work.blocks:
        for place, (row, sample) in enumerate(block.items):
            if several:
                print(f"-- prompt {row + 1}, sample {sample + 1}", file=sys.stderr, flush=True)
            drawn, asked = (len(block.items), [place]), [ids[row] for ids in work.prompts]
            with spread(names) as show:
                answers = [
                    say_aloud(speaker, ids, partial(show, number), seed=block.seed, drawn=drawn)
                    for number, (speaker, ids) in enumerate(zip(work.speakers, asked, strict=True))
                ]
            if work.source is not None:
                found = scores(work.source, [work.rows[row]] * len(names), asked, answers)
                print(score_line(names, found), file=sys.stderr, flush=True)
            yield (row, sample), answers


def _write(work: Work, output: Path) -> Iterator[tuple[tuple[int, int], list[Answer]]]:
    """Writes the answers block by block: what is there when a call is interrupted is whole lines. Yields as `_show`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    total = len(work.rows) * work.config.samples_per_prompt * len(work.speakers)
    with output.open("x", encoding="utf-8") as file, Progress(total, "answers", unit="answer") as bar:
        for block in work.blocks:
            columns = [_column(work, block, number, bar) for number in range(len(work.speakers))]
            for place, (row, sample) in enumerate(block.items):
                for speaker, column in zip(work.speakers, columns, strict=True):
                    line = _line(work.rows[row], row, sample, speaker, *column[place])
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                yield (row, sample), [column[place][0] for column in columns]
            file.flush()


def _column(work: Work, block: Block, number: int, bar: Progress) -> list[tuple[Answer, float | None]]:
    """The answers of one speaker to a block, with their scores."""
    size, said = work.config.per_device_eval_batch_size, list[Answer]()
    asked = [work.prompts[number][row] for row, _ in block.items]
    for first in range(0, len(asked), size):
        batch = asked[first : first + size]
        drawn = (len(asked), range(first, first + len(batch)))
        said += work.speakers[number].say(batch, seed=block.seed, drawn=drawn)
        bar.update(len(batch))
    if work.source is None:
        return [(answer, None) for answer in said]
    found = scores(work.source, [work.rows[row] for row, _ in block.items], asked, said)
    return list(zip(said, found, strict=True))


def _line(row: Row, number: int, sample: int, speaker: Speaker, answer: Answer, score: float | None) -> dict[str, Any]:
    line = {
        "number": number + 1,
        "sample": sample,
        "model": speaker.name,
        "prompt": row["prompt"],
        "response": answer.text,
        "tokens": len(answer.tokens),
        "stopped": answer.stopped,
    }
    return line if score is None else {**line, "score": score}


def main() -> None:
    """Command line."""
    run(parse_config(GenerateConfig))


if __name__ == "__main__":
    run_command(main)
