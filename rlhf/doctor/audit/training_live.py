"""The audit beside a running supervised stage: what it records, when it recomputes, and where its statements go."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.base.errors import UserError
from rlhf.base.redaction import redact
from rlhf.config import TrainingConfig
from rlhf.doctor import statements
from rlhf.doctor.audit import training_quantities as q
from rlhf.doctor.audit.compare import rms
from rlhf.doctor.audit.plain_models import load_reward, model_folder
from rlhf.doctor.audit.sheet import FOLDER, Sheet
from rlhf.doctor.audit.training import SCORES, examine, kind_of
from rlhf.doctor.audit.training_record import TrainingRecorder
from rlhf.doctor.statements import Statement
from rlhf.models.compute import Compute
from rlhf.ppo.state import Order
from rlhf.registry import Artifact
from rlhf.run.memory import free_bytes

#: Free memory, as a multiple of the run's model, with which it is opened a second time.
ROOM = 2.0
#: Share of a run's time that the audits after the first may take together.
SHARE = 0.015
#: Registered scores that are compared with those of the trained model.
COMPARED = 16
TOKENIZER = "tokenizer"


class TrainingAudit:
    """The recorder of a run, and the examination of what it records.

    Args:
        folder: the stage's folder.
        parents: artefacts that the run starts from.
        report: is shown all statements, and may return an order to stop.
    """

    def __init__(
        self,
        trainer: Any,
        stage: str,
        config: TrainingConfig,
        folder: Path,
        compute: Compute,
        parents: Sequence[Artifact],
        report: Callable[[Sequence[Statement]], Order | None],
    ) -> None:
        self.trainer, self.stage, self.folder, self.compute, self.report = trainer, stage, folder, compute, report
        self.error: UserError | None = None
        self.size = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        options = redact(dataclasses.asdict(config))
        facts = {"stage": stage, "config": options, "sources": _sources(stage, config, compute, parents)}
        self.recorder = TrainingRecorder(trainer, facts, config.audit_steps, self.receive)
        self._started, self._spent, self._wrong = time.perf_counter(), 0.0, set[str]()
        self._rows = DataRows(getattr(trainer, "data_rows", None), config.dataset, stage)

    def receive(self, sheet: Sheet, control: Any) -> None:
        """Write and examine the sheet of the update that has just ended; have the trainer stop where that is ordered."""
        began = time.perf_counter()
        if sheet.facts["copies"]:
            self._rows.add(sheet, self.trainer.processing_class)
        with_model = (
            sheet.facts["model"] and self._has_time(began) and free_bytes(self.compute.device) > ROOM * self.size
        )
        if sheet.facts["model"]:
            self._write(sheet)
        results = examine(sheet, self.trainer.processing_class, with_model=with_model)
        new = [one for one in results if not one.passed and one.name not in self._wrong]
        self._wrong |= {one.name for one in new}
        results = results if sheet.facts["copies"] else new
        statements.append(self.folder, results)
        self._spent += time.perf_counter() - began
        order = self.report(results) if results else None
        if order is not None:
            self.error = UserError(order.reason)
            control.should_save = control.should_training_stop = True

    def _has_time(self, now: float) -> bool:
        """Return whether another audit keeps to its share of the run's time; the first always does."""
        return not self._spent or 2 * self._spent <= SHARE * (now - self._started)

    def _write(self, sheet: Sheet) -> None:
        """Write a sheet, and the tokenizer with the first."""
        place = self.folder / FOLDER / TOKENIZER
        sheet.facts["tokenizer"] = str(place.absolute())
        sheet.keep(self.folder)
        if self._spent == 0 and place.parent.is_dir():
            with contextlib.suppress(Exception):  # tokenizers raises no other; a full disk is said by the sheet
                self.trainer.processing_class.save_pretrained(place)


def _sources(stage: str, config: TrainingConfig, compute: Compute, parents: Sequence[Artifact]) -> dict[str, Any]:
    """Return where a run's model comes from, as JSON."""
    registry = Path(config.registry).absolute()
    options: Any = config
    base = str(parents[0].path.absolute()) if stage == "reward" else ""
    if stage == "sft":
        base = model_folder(options.model_name_or_path, registry)
    return {
        "registry": str(registry),
        "base": base,
        "policy": base if Path(base).is_dir() and base else "",
        "revision": getattr(options, "model_revision", None),
        "trust_remote_code": getattr(options, "trust_remote_code", False),
        "dtype": str(torch.float32 if stage == "pretrain" and not compute.bf16 else compute.dtype).removeprefix(
            "torch."
        ),
        "device": str(compute.device),
    }


class DataRows:
    """The data rows that a run's token rows were made of, and the ratings that their file holds."""

    def __init__(self, rows: Any, dataset: str, stage: str) -> None:
        self.rows, self.dataset, self.stage = rows, Path(dataset).expanduser(), stage
        self._answers: dict[str, list[int]] | None = None
        self._ratings: dict[str, list[float]] | None = None

    def add(self, sheet: Sheet, tokenizer: Any) -> None:
        """Add to each row of a sheet the data rows that it may have been made of, or the ratings in the file."""
        for micro in sheet.facts["microbatches"]:
            for row in micro["rows"]:
                if self.stage == "sft" and self.rows is not None:
                    row["candidates"] = self._candidates(row, tokenizer)
                elif self.stage == "reward" and "responses" in row:
                    row["file_ratings"] = self._file_ratings().get(_key(row["prompt"], row["responses"]))

    def _candidates(self, row: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
        """Return the data rows with the answer of a token row; where there is none, those whose answer it holds."""
        if self._answers is None:
            self._answers = defaultdict(list)
            for number, answer in enumerate(self.rows["completion"]):
                self._answers[_joined(answer[-1]["content"])].append(number)
        labelled = [token for token in row["labels"] if token != -100]
        numbers = self._answers.get(_joined(tokenizer.decode(labelled, skip_special_tokens=True)), [])
        if not numbers:
            text = _joined(tokenizer.decode(row["input_ids"], skip_special_tokens=True))
            inside = [answer for answer in self._answers if answer and answer in text]
            longest = max(inside, key=len, default=None)
            numbers = [] if longest is None else self._answers[longest]
        return [{name: self.rows[n][name] for name in ("prompt", "completion")} for n in numbers[:64]]

    def _file_ratings(self) -> dict[str, list[float]]:
        """Return the ratings in the data's own file by prompt and responses; none where it is of another form."""
        if self._ratings is None:
            self._ratings = {}
            for row in _plain_rows(self.dataset / "comparisons"):
                if all(isinstance(row.get(name), list) for name in ("prompt", "responses", "ratings")):
                    key = _key(row["prompt"], row["responses"])
                    if self._ratings.setdefault(key, row["ratings"]) != row["ratings"]:
                        self._ratings[key] = []  # rated twice
        return {key: ratings for key, ratings in self._ratings.items() if ratings}


def _plain_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of `train.parquet` or `train.jsonl` as they stand there."""
    if (file := folder / "train.parquet").is_file():
        from pyarrow import parquet

        return list(parquet.read_table(file).to_pylist())
    if (file := folder / "train.jsonl").is_file():
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return []


def _key(prompt: Any, responses: Any) -> str:
    texts = [[message["content"] for message in messages] for messages in (prompt, *responses)]
    return json.dumps(texts)


def _joined(text: str) -> str:
    return "".join(text.split())


def examine_published(
    artifact: Artifact,
    compute: Compute,
    quantization: str,
    trained: tuple[Sequence[Sequence[int]], Tensor],
    zero: Sequence[Sequence[int]],
) -> list[Statement]:
    """Return statements about a registered reward model: it scores as the trained one did, and its zero is where it should be.

    Args:
        trained: token rows with the scores (M,) of the model in memory.
        zero: token rows whose scores should be 0 on average.
    """
    rows, scores = trained
    plain = load_reward(artifact.path, artifact.path.parents[2], compute.dtype, compute.device, quantization)
    kind = kind_of(quantization, str(compute.dtype).removeprefix("torch."))
    with torch.no_grad():
        own, normalizing = plain.raw(rows[:COMPARED]), plain.raw(zero).double().cpu()
    scale = max(rms(scores[:COMPARED]), float(normalizing.std()))
    saved = q.SAVED_SCORES.compared(scores[:COMPARED], own, limit=SCORES[kind] * scale, step=0)
    config = artifact.manifest.config
    spread = float(normalizing.std()) if config["normalize_std"] and len(zero) > 1 else 1.0
    recorded = torch.tensor([artifact.manifest.reward_mean, artifact.manifest.reward_std], dtype=torch.float64)
    expected = torch.tensor([float(normalizing.mean()), spread], dtype=torch.float64)
    what = f"mean {recorded[0]:.4g} and spread {recorded[1]:.4g}, {expected[0]:.4g} and {expected[1]:.4g} expected"
    return [saved, q.NORMALIZATION.compared(recorded, expected, limit=SCORES[kind] * scale, step=0, what=what)]
