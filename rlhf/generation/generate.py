"""`rlhf generate --model ppo/demo --prompt "..."`: answers to prompts, as text while they are sampled, or as JSON lines.

A line of the file has `number` of the prompt, from 1, `sample`, `model`, `prompt` (messages), `response`, `tokens` (their
count, including the stop token), `stopped`, and `score` if there is a reward; the figures of a check are in
`NAME.check.json`. A seed leads to the same answers in either form and with any batch size: each answer has random numbers
of its own, the same for all models.
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
from rlhf.base.text_files import text_lines
from rlhf.config import parse_config
from rlhf.data_prep.formats.rows import Row
from rlhf.data_prep.load import load_rows
from rlhf.evaluation.checks import Figure, make_check, read_rows
from rlhf.generation.chat_model import ChatModel, open_models, open_reward, scores
from rlhf.generation.config import GenerateConfig
from rlhf.generation.terminal import answer_view, read_input, score_line, stream_answer
from rlhf.models.compute import Compute
from rlhf.models.responses import Answer, Answers, sample_in_batches
from rlhf.models.sampling import SAMPLED_AT_ONCE, Sampled
from rlhf.reward.sources import Source
from rlhf.run.progress import Progress


@dataclass(frozen=True)
class Block:
    """Answers whose random numbers come from one seed: all samples of some prompts."""

    seed: int
    items: list[tuple[int, int]]
    """Numbers of the prompt, from 0, and of the sample."""


@dataclass(frozen=True)
class Work:
    """Checked prompts and opened models."""

    config: GenerateConfig
    rows: list[Row]
    """With a `prompt` of messages."""
    models: list[ChatModel]
    prompts: list[list[list[int]]]
    """For each model the token ids of all prompts."""
    source: Source | None
    """The reward that scores the answers."""

    @property
    def blocks(self) -> Iterator[Block]:
        """Blocks of a fixed size, because the count of random numbers from a seed must not depend on the batch size."""
        samples = self.config.samples_per_prompt
        step = max(SAMPLED_AT_ONCE // samples, 1)
        for first in range(0, len(self.rows), step):
            last = min(first + step, len(self.rows))
            items = [(row, sample) for row in range(first, last) for sample in range(samples)]
            yield Block(self.config.seed * 1_000_003 + first, items)


def run(config: GenerateConfig) -> None:
    """Read the prompts, open the models, and sample the answers."""
    output = Path(config.output) if config.output else None
    for file in (output, _figures_file(output)) if output is not None else ():
        if file.exists():
            raise UserError(f"{file} exists already; give another --output")
    rows = _prompts(config)
    check = make_check(Path(str(config.dataset)), config.check, rows) if config.check else None
    compute = Compute.choose(config)
    models = open_models(config, compute)
    prompts = [_encoded(model, rows) for model in models]
    source = open_reward(config, models, compute, batch_size=config.per_device_eval_batch_size)
    work = Work(config, rows, models, prompts, source)
    answers = dict(_show(work) if output is None else _write(work, output))
    if check is not None:
        texts = [[answers[row, 0][number].text for row in range(len(rows))] for number in range(len(models))]
        _report(config, output, {m.name: check.figures(t, config.seed) for m, t in zip(models, texts, strict=True)})


def _report(config: GenerateConfig, output: Path | None, models: dict[str, dict[str, Figure]]) -> None:
    """Print the figures of a check, and write them beside the answers: `check`, `prompts`, and `models` by name."""
    for model, figures in models.items():
        for name, figure in figures.items():
            print(f"{model} {name}: {_figure(figure)}", file=sys.stderr)
    if output is not None:
        content = {"check": config.check, "prompts": config.dataset, "models": models}
        _figures_file(output).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _figures_file(output: Path) -> Path:
    return output.with_suffix(".check.json")


def _figure(figure: Any) -> str:
    between = "" if figure["low"] is None else f" ({figure['low']:.3f} to {figure['high']:.3f})"
    return f"{figure['value']:.3f}{between}"


# Prompts


def _prompts(config: GenerateConfig) -> list[Row]:
    """Return rows with a `prompt` of messages."""
    rows: list[Row]
    if config.dataset is None:
        if not config.prompt and sys.stdin.isatty():
            raise UserError("no prompt: give --prompt TEXT or --dataset FILE, or pipe a text in")
        texts = config.prompt or [read_input(sys.stdin.read).strip()]
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    elif config.dataset.endswith(".txt"):
        rows = [{"prompt": [{"role": "user", "content": line}]} for line in _lines(Path(config.dataset))]
    elif Path(config.dataset).is_dir():
        rows = load_rows(config.dataset, "validation", kind="prompts").rows.to_list()
    else:
        rows = read_rows(Path(config.dataset))
    if config.system:
        first = {"role": "system", "content": config.system}
        rows = [r if r["prompt"][0]["role"] == "system" else {**r, "prompt": [first, *r["prompt"]]} for r in rows]
    return rows


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in text_lines(file)]
    except OSError as error:
        raise UserError(f"cannot read the prompts {file}: {error}") from error
    if not any(lines):
        raise UserError(f"{file} is empty: it contains no prompts")
    return [line for line in lines if line]


def _encoded(model: ChatModel, rows: Sequence[Row]) -> list[list[int]]:
    """Return the token ids of all prompts; raise `UserError` with the number of a bad one."""
    encoded = []
    for number, row in enumerate(rows, start=1):
        try:
            encoded.append(model.encode(row["prompt"]))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from error
    return encoded


# Answers


def _show(work: Work) -> Iterator[tuple[tuple[int, int], list[Answer]]]:
    """Show the answers while they come, and nothing else, on standard output; yield each item with its answers."""
    names = [model.name for model in work.models]
    several = len(work.rows) * work.config.samples_per_prompt > 1
    for block in work.blocks:
        for place, (row, sample) in enumerate(block.items):
            if several:
                print(f"-- prompt {row + 1}, sample {sample + 1}", file=sys.stderr, flush=True)
            batch_slice, prompts = (len(block.items), [place]), [ids[row] for ids in work.prompts]
            with answer_view(names) as show:
                answers = [
                    stream_answer(model, ids, partial(show, number), seed=block.seed, batch_slice=batch_slice)
                    for number, (model, ids) in enumerate(zip(work.models, prompts, strict=True))
                ]
            if work.source is not None:
                values = scores(work.source, [work.rows[row]] * len(names), prompts, Answers.of(answers))
                print(score_line(names, values), file=sys.stderr, flush=True)
            yield (row, sample), answers


def _write(work: Work, output: Path) -> Iterator[tuple[tuple[int, int], list[Answer]]]:
    """Write the answers block by block, so that an interrupted call leaves whole lines; yield each item with its answers."""
    output.parent.mkdir(parents=True, exist_ok=True)
    total = len(work.rows) * work.config.samples_per_prompt * len(work.models)
    with output.open("x", encoding="utf-8") as file, Progress(total, "answers", unit="answer") as bar:
        for block in work.blocks:
            columns = [_column(work, block, number, bar) for number in range(len(work.models))]
            for place, (row, sample) in enumerate(block.items):
                for model, column in zip(work.models, columns, strict=True):
                    line = _line(work.rows[row], row, sample, model.name, *column[place])
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                yield (row, sample), [column[place][0] for column in columns]
            file.flush()


def _column(work: Work, block: Block, number: int, bar: Progress) -> list[tuple[Answer, float | None]]:
    """Return the answers of one model to a block, with their scores."""
    model, prompts = work.models[number], [work.prompts[number][row] for row, _ in block.items]

    def draw(batch: Sequence[Sequence[int]], first: int) -> Sampled:
        return model.draw(batch, seed=block.seed, batch_slice=(len(prompts), range(first, first + len(batch))))

    size = work.config.per_device_eval_batch_size
    answers = sample_in_batches(model.tokenizer, prompts, draw, at_once=size, on_batch=bar.update)
    values: Sequence[float | None] = [None] * len(prompts)
    if work.source is not None:
        values = scores(work.source, [work.rows[row] for row, _ in block.items], prompts, answers)
    return list(zip(answers.rows, values, strict=True))


def _line(row: Row, number: int, sample: int, model: str, answer: Answer, score: float | None) -> dict[str, Any]:
    line = {
        "number": number + 1,
        "sample": sample,
        "model": model,
        "prompt": row["prompt"],
        "response": answer.text,
        "tokens": len(answer.tokens),
        "stopped": answer.stopped,
    }
    return line if score is None else {**line, "score": score}


def main() -> None:
    """Run the command line."""
    run(parse_config(GenerateConfig))


if __name__ == "__main__":
    run_command(main)
