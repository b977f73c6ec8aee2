"""Recomputes a sheet of a supervised stage: a statement for each quantity, each from the recorded inputs of its own step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from rlhf.doctor.audit import plain_training as plain
from rlhf.doctor.audit import training_quantities as q
from rlhf.doctor.audit.compare import NotExamined, Quantity, chain, rms
from rlhf.doctor.audit.plain_models import undisturbed
from rlhf.doctor.audit.plain_optimizer import moment, share_of_peak
from rlhf.doctor.audit.plain_text import IGNORED, labels_of, render_pair
from rlhf.doctor.audit.sheet import Sheet
from rlhf.doctor.audit.training_models import Twin
from rlhf.doctor.statements import Statement

#: Shares by which a loss, scores and a gradient may differ, by the kind of products that they are made of.
LOSS = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 0.01, "8bit": 0.05}
SCORES = {"float64": 1e-5, "float32": 1e-3, "bfloat16": 0.1, "8bit": 0.2}
GRADIENT = {"float64": 1e-4, "float32": 5e-3, "bfloat16": 0.15, "8bit": 0.4}
#: The same for a ranking loss, whose gradient is made of differences between like answers: their rounding weighs more.
RANKING_GRADIENT = {**GRADIENT, "bfloat16": 0.35, "8bit": 0.6}
#: A gradient may differ by this multiple of what bf16 does to the plain one, up to a largest share: where it is a difference of
#: like numbers, ways to compute it that are equally right round by several times as much as each other.
ROUNDINGS, LARGEST = 8.0, 0.5
#: Least norm of a gradient that is compared by itself, as a share of the largest.
NOISE = 0.02


def examine(sheet: Sheet, tokenizer: Any = None, *, with_model: bool = True) -> list[Statement]:
    """Return a statement for each quantity of a sheet.

    Args:
        tokenizer: the run's; None: the one that was saved beside the sheet.
        with_model: open the model anew; without it, what needs it is not examined.
    """
    saved = sheet.facts.get("tokenizer")
    if tokenizer is None and saved and Path(saved).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=False)
    with undisturbed():
        return chain(Examination(sheet, tokenizer, with_model=with_model).statements())


def kind_of(quantization: str, dtype: str) -> str:
    """Return the kind of products that a run computes with; TRL trains adapters on quantised bases in bf16."""
    return {"8bit": "8bit", "4bit": "bfloat16"}.get(quantization, dtype)


class Examination:
    """The quantities of one sheet."""

    def __init__(self, sheet: Sheet, tokenizer: Any, *, with_model: bool) -> None:
        self.sheet, self.step, self.facts, self.tokenizer = sheet, sheet.update, sheet.facts, tokenizer
        self.config: dict[str, Any] = sheet.facts["config"]
        self.stage: str = sheet.facts["stage"]
        self.microbatches: list[dict[str, Any]] = sheet.facts["microbatches"]
        self.with_model = with_model and bool(sheet.facts["model"])
        self.kind = kind_of(self.config["quantization"], self.facts["sources"]["dtype"])

    def statements(self) -> Iterator[Statement]:
        """Yield the statements in causal order."""
        light: dict[Quantity, Callable[[], Statement]] = {
            q.ROWS_DRAWN: self.rows_drawn,
            q.GRADIENTS_ZEROED: self.gradients_zeroed,
            q.LEARNING_RATE: self.learning_rate,
        }
        if not self.facts["copies"]:
            computed = light
        elif self.stage == "reward":
            computed = {q.TOKENS: self.response_tokens, q.RATINGS: self.ratings, q.PADDING: self.padding}
            computed |= {q.DROPOUT: self.dropout, q.FROZEN_WEIGHTS: self.frozen_weights, q.SCORES: self.scores}
            computed |= {q.RANKING_LOSS: self.ranking_loss}
        else:
            computed = {q.TOKENS: self.answer_tokens, q.PADDING: self.padding, q.LABELS: self.labels}
            computed |= {q.DROPOUT: self.dropout, q.FROZEN_WEIGHTS: self.frozen_weights, q.SFT_LOSS: self.token_loss}
        if self.facts["copies"]:
            computed = {q.ROWS_DRAWN: self.rows_drawn, **computed}
            computed |= {q.GRADIENTS_ZEROED: self.gradients_zeroed, q.GRADIENT: self.gradient}
            computed |= {q.GRADIENT_CLIPPING: self.clipping, q.LEARNING_RATE: self.learning_rate}
            computed |= {q.OPTIMIZER_STEP: self.optimizer_step}
        for quantity, function in computed.items():
            try:
                yield function()
            except NotExamined as reason:
                yield quantity.agrees(f"not examined: {reason}", self.step)
            except Exception as error:  # a run does not end because its audit cannot be made
                yield quantity.agrees(f"not examined: {type(error).__name__}: {error}", self.step)

    # Rows

    def rows_drawn(self) -> Statement:
        """Each row comes once in an epoch."""
        problem = self.facts["drawn"]
        return (
            q.ROWS_DRAWN.differs(problem, self.step) if problem else q.ROWS_DRAWN.agrees("each row is new", self.step)
        )

    def answer_tokens(self) -> Statement:
        """Each row is a demonstration as the template writes it."""
        if self.stage == "pretrain":
            raise NotExamined("blocks of text have no template")
        wrong, count, limit = [], 0, self.config["max_length"]
        for number, micro in enumerate(self.microbatches):
            for row, (ids, _) in zip(micro["rows"], self._rows(number), strict=False):
                expected = [head + tail for head, tail in self._pairs(row)]
                count += 1
                if ids not in expected or len(ids) > limit:
                    wrong.append(self._difference(ids, expected))
        return self._counted(q.TOKENS, wrong, count, "rows")

    def response_tokens(self) -> Statement:
        """Each response is trained on with its prompt as the template writes them."""
        self._require_rows()
        wrong, count = [], 0
        for number, micro in enumerate(self.microbatches):
            trained = [ids for ids, _ in self._rows(number)]
            expected = [
                [*itertools.chain(*self._pair(row["prompt"], answer))]
                for row in micro["rows"]
                for answer in row["responses"]
            ]
            if len(trained) != len(expected):
                wrong.append(f"{len(trained)} rows in place of {len(expected)} responses")
            pairs = list(zip(trained, expected, strict=False))
            count += len(pairs)
            wrong += [self._difference(ids, [own]) for ids, own in pairs if ids != own]
        return self._counted(q.TOKENS, wrong, count, "responses")

    def ratings(self) -> Statement:
        """The ratings of a batch are those of its data rows, in their order."""
        self._require_rows()
        wrong, count = [], 0
        for number, micro in enumerate(self.microbatches):
            recorded = self.sheet.tensors[f"inputs/{number}/ratings"].tolist()
            expected = [rating for row in micro["rows"] for rating in row.get("file_ratings") or row["ratings"]]
            count += len(expected)
            if not _same_order(recorded, expected):
                wrong.append(f"{_few(recorded)} in place of {_few(expected)}")
        return self._counted(q.RATINGS, wrong, count, "ratings")

    def padding(self) -> Statement:
        """Masks cover rows and nothing else."""
        wrong, count = [], 0
        for number, micro in enumerate(self.microbatches):
            inputs = self.sheet.group(f"inputs/{number}")
            if "attention_mask" not in inputs or not micro["rows"]:
                raise NotExamined("there is no padding" if self.stage == "pretrain" else "the batch has no rows")
            rows = [row["input_ids"] for row in micro["rows"]]
            rows = [ids for row in rows for ids in row] if self.stage == "reward" else rows
            for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"].bool(), rows, strict=False):
                count += 1
                if ids[mask].tolist() != list(row) or int(mask.int().diff().abs().sum()) > 1:
                    wrong.append(f"{int(mask.sum())} tokens of {len(row)}")
        return self._counted(q.PADDING, wrong, count, "rows")

    def labels(self) -> Statement:
        """Labels are the answer's tokens, and nothing else has a loss."""
        if self.stage == "pretrain":
            raise NotExamined("all tokens but the first are predicted")
        wrong, count = [], 0
        for number, micro in enumerate(self.microbatches):
            for row, (ids, labels) in zip(micro["rows"], self._rows(number), strict=False):
                expected = [labels_of(head, tail) for head, tail in self._pairs(row) if head + tail == ids]
                count += 1
                if expected and labels not in expected:
                    wrong.append(f"{_few(labels[-6:])} at the end in place of {_few(expected[0][-6:])}")
            inputs = self.sheet.group(f"inputs/{number}")
            if bool((inputs["labels"][~inputs["attention_mask"].bool()] != IGNORED).any()):
                wrong.append("padding has a loss")
        return self._counted(q.LABELS, wrong, count, "rows")

    # The model

    def dropout(self) -> Statement:
        """Adapters drop the share that the options say."""
        share, expected = self.facts["dropout"]["adapters"], self.config.get("lora_dropout", 0.0)
        training = all(micro["is_training"] for micro in self.microbatches)
        measured = f"{_few(share)} of the adapters' inputs, {expected:g} by the options"
        if share != [expected] or not training:
            return q.DROPOUT.differs(measured if training else f"{measured}; the model is not in training", self.step)
        return q.DROPOUT.agrees(measured, self.step)

    def frozen_weights(self) -> Statement:
        """The base is that of the registry, and stays."""
        first, before, after = (self.facts[f"frozen_{name}"] for name in ("first", "before", "after"))
        if moved := sorted(name for name in first if not first[name] == before.get(name) == after.get(name)):
            return q.FROZEN_WEIGHTS.differs(f"{len(moved)} of {len(first)} weights have moved: {moved[0]}", self.step)
        if not first:
            raise NotExamined("all weights train")
        if not self.with_model:
            return q.FROZEN_WEIGHTS.agrees(f"{len(first)} weights as they were", self.step)
        other, count = self.twin.differing(self.sheet.group("frozen"))
        measured = f"{len(other)} of {count} weights are not those of {self.facts['sources']['base']}"
        if other:
            return q.FROZEN_WEIGHTS.differs(f"{measured}: {other[0]}", self.step)
        return q.FROZEN_WEIGHTS.agrees(measured, self.step)

    @cached_property
    def twin(self) -> Twin:
        """The model with the recorded weights."""
        return Twin(self.sheet)

    def _require_model(self) -> None:
        if not self.with_model:
            raise NotExamined("the model is not opened for this sheet")
        if not self.sheet.group("weights"):
            raise NotExamined("the trained weights are too large for a sheet")
        if self.facts["dropout"]["largest"]:
            raise NotExamined(f"dropout of {self.facts['dropout']['largest']:g} draws random numbers")

    def scores(self) -> Statement:
        """The model's scores are read at the last token."""
        self._require_model()
        recorded, expected = self._recorded_scores(), self.own_scores.detach()
        if recorded is None and self.sheet.group(f"scores/{self.last}"):
            return q.SCORES.differs("other rows passed through the model than those of the batch", self.step)
        if recorded is None:
            raise NotExamined("the batch did not pass through the model's forward pass")
        limit = SCORES[self.kind] * max(rms(expected), self.twin.usual_score)
        return q.SCORES.compared(recorded, expected, limit=limit, step=self.step, detail=self._place(recorded, limit))

    def _place(self, recorded: Tensor, limit: float) -> str:
        """Return where wrong scores are read instead, if it is at one place in all rows."""
        rows = [ids for ids, _ in self._rows(self.last)]
        by_token = self.twin.by_token
        for back in range(1, 4):
            moved = torch.stack(
                [scores[max(0, len(row) - 1 - back)] for scores, row in zip(by_token, rows, strict=True)]
            )
            if rms(moved - recorded) <= limit:
                return f"they are those of the token {back} before it"
        return ""

    @property
    def last(self) -> int:
        """The microbatch whose loss is recomputed; the last, after which the gradient is whole."""
        return len(self.microbatches) - 1

    @cached_property
    def own_scores(self) -> Tensor:
        """Plain scores of the last microbatch, with a gradient."""
        return self.twin.scores([ids for ids, _ in self._rows(self.last)])

    def _recorded_scores(self) -> Tensor | None:
        """Return the scores that the model gave the rows of the last microbatch, in the batch's order."""
        group, by_row = self.sheet.group(f"scores/{self.last}"), {}
        for number in range(len(group) // 3):
            ids, mask, logits = (group[f"{number}/{name}"] for name in ("ids", "mask", "logits"))
            for row, real, score in zip(ids, mask.bool(), logits.view(len(ids), -1)[:, 0], strict=True):
                by_row[tuple(row[real].tolist())] = score
        rows = [tuple(ids) for ids, _ in self._rows(self.last)]
        return torch.stack([by_row[row] for row in rows]) if all(row in by_row for row in rows) else None

    def ranking_loss(self) -> Statement:
        """The loss of the recorded scores and ratings."""
        scores = self._recorded_scores()
        if scores is None:
            self._require_model()
            scores = self.own_scores.detach()
        recorded, expected = float(self.microbatches[self.last]["loss"]), float(self._ranking_loss(scores.double()))
        return self._loss(q.RANKING_LOSS, recorded, expected, self._other_ranking(scores.double(), recorded))

    def _ranking_loss(self, scores: Tensor, *, swapped: bool = False) -> Tensor:
        """Return the ranking loss of the last microbatch's scores, as a share of the update's."""
        inputs = self.sheet.group(f"inputs/{self.last}")
        loss = plain.ranking_loss(
            -scores if swapped else scores, inputs["ratings"], inputs["prompt"], self.config, inputs.get("confidence")
        )
        return loss / len(self.microbatches)

    def _other_ranking(self, scores: Tensor, recorded: float) -> str:
        """Return what the recorded loss is instead, if it is known."""
        right, swapped = float(self._ranking_loss(scores)), float(self._ranking_loss(scores, swapped=True))
        names = {
            "it is the loss of the pairs the other way round": swapped,
            "it has the wrong sign": -right,
            "it is not divided by the number of microbatches": right * len(self.microbatches),
        }
        return next((text for text, value in names.items() if math.isclose(value, recorded, rel_tol=1e-3)), "")

    def token_loss(self) -> Statement:
        """The loss of the last microbatch's labels, over all labelled tokens of the update."""
        self._require_model()
        recorded = float(self.microbatches[self.last]["loss"])
        losses = [part.detach().double() for part in self.own_losses]
        expected = float(torch.cat(losses).sum()) / self._divisor()
        means = float(torch.stack([part.mean() for part in losses if len(part)]).mean())
        own = sum(map(len, losses))
        names = {
            "it is the mean over rows of each row's mean": means / len(self.microbatches),
            "it is divided by its own tokens": float(torch.cat(losses).sum()) / own,
            "it has the wrong sign": -expected,
        }
        close = (text for text, value in names.items() if math.isclose(value, recorded, rel_tol=LOSS[self.kind] / 2))
        return self._loss(q.SFT_LOSS, recorded, expected, detail=next(close, ""))

    def _loss(self, quantity: Quantity, recorded: float, expected: float, detail: str) -> Statement:
        limit = LOSS[self.kind] * max(abs(expected), 1e-3)
        values = torch.tensor([recorded]), torch.tensor([expected])
        what = f"{recorded:.5g}, {expected:.5g} expected"
        return quantity.compared(*values, limit=limit, step=self.step, what=what, detail=detail)

    def _divisor(self) -> float:
        """Return what the sum of the last microbatch's token losses is divided by."""
        if self.stage == "pretrain":
            return float(sum(map(len, self.own_losses)) * len(self.microbatches))
        labels = [self.sheet.tensors[f"inputs/{n}/labels"] for n in range(len(self.microbatches))]
        return float(sum(int((part[:, 1:] != IGNORED).sum()) for part in labels))

    @cached_property
    def own_losses(self) -> list[Tensor]:
        """Plain losses of each row's labelled tokens in the last microbatch, with a gradient."""
        return self.twin.token_losses(self._rows(self.last))

    # The update

    def gradients_zeroed(self) -> Statement:
        """Look for what is left of the gradients of the update before."""
        norm = max(float(self.facts.get("leftover_before", 0.0)), float(self.facts["leftover_after"]))
        measured = f"norm {norm:.3g} between updates (limit 0)"
        return (
            q.GRADIENTS_ZEROED.differs(measured, self.step) if norm else q.GRADIENTS_ZEROED.agrees(measured, self.step)
        )

    def gradient(self) -> Statement:
        """Compare what the last microbatch has added to the gradients with those of the plain loss."""
        self._require_model()
        total, earlier = self.sheet.group("gradient/all"), self.sheet.group("gradient/earlier")
        expected = self.own_gradients
        none = {name: torch.zeros(tensor.shape) for name, tensor in expected.items()}
        added = {name: total.get(name, none[name]) - earlier.get(name, none[name]) for name in expected}
        limit = (RANKING_GRADIENT if self.stage == "reward" else GRADIENT)[self.kind]
        off, limits = _distances(added, expected), dict.fromkeys(expected, limit)
        if self.kind == "bfloat16" and any(off[name] > limits[name] for name in off):
            rounding = _distances(self._in_fp32().own_gradients, expected)
            limits = {name: max(limit, min(ROUNDINGS * rounding[name], LARGEST)) for name in limits}
        worst = max(off, key=lambda name: off[name] / limits[name])
        measured = f"{worst} is off by {off[worst]:.2g} of its norm (limit {limits[worst]:.2g})"
        if off[worst] <= limits[worst]:
            return q.GRADIENT.agrees(measured, self.step)
        return q.GRADIENT.differs(measured, self.step, self._scale(added, expected))

    @cached_property
    def own_gradients(self) -> dict[str, Tensor]:
        """Gradients of the plain loss of the last microbatch, also of tensors where none arrived."""
        chosen = list(self.sheet.group("before/weight"))
        if unknown := [name for name in chosen if name not in self.twin.parameters]:
            raise NotExamined(f"{unknown[0]} is no weight that can be opened plainly")
        if not chosen:
            raise NotExamined("no tensor was copied")
        if self.stage == "reward":
            loss = self._ranking_loss(self.own_scores)
        else:
            loss = torch.cat(self.own_losses).sum() / self._divisor()
        return self.twin.gradients(loss, chosen)

    def _in_fp32(self) -> Examination:
        """Return the examination of the same sheet by a model in fp32."""
        facts = {**self.facts, "sources": {**self.facts["sources"], "dtype": "float32"}}
        sheet = Sheet(self.sheet.update, facts, self.sheet.tensors)
        return Examination(sheet, self.tokenizer, with_model=self.with_model)

    def _scale(self, added: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
        one, other = (torch.cat([g[name].double().flatten().cpu() for name in expected]) for g in (added, expected))
        factor = float(one @ other / max(float(other @ other), 1e-300))
        cosine = float(one @ other / max(float(one.norm() * other.norm()), 1e-300))
        return (
            f"it is {factor:.3g} times as large, in the same direction"
            if cosine > 0.98
            else f"its cosine is {cosine:.2f}"
        )

    def clipping(self) -> Statement:
        """The gradients are scaled to the largest norm."""
        norm, largest = float(self.facts["norm"]), self.config["max_grad_norm"]
        factor = min(1.0, largest / (norm + 1e-6))
        total, clipped = self.sheet.group("gradient/all"), self.sheet.group("clipped")
        names = [name for name in total if name in clipped]
        if not names:
            raise NotExamined("there are no gradients")
        expected = torch.cat([factor * total[name].double().flatten() for name in names])
        recorded = torch.cat([clipped[name].double().flatten() for name in names])
        what = f"norm {norm:.6g}, scaled by {factor:.6g}"
        limit = max(1e-4, max(torch.finfo(clipped[name].dtype).eps for name in names)) * max(rms(expected), 1e-12)
        if rms(recorded - expected) <= limit:
            return q.GRADIENT_CLIPPING.agrees(what, self.step)
        actual = rms(recorded) / max(rms(expected) / factor, 1e-300)
        return q.GRADIENT_CLIPPING.differs(f"{what}; they were scaled by {actual:.6g}", self.step)

    def learning_rate(self) -> Statement:
        """The step size is the schedule's."""
        rates, steps = self.facts["rates"], plain.updates(self.facts["num_rows"], self.config)
        expected = self.config["learning_rate"] * share_of_peak(self.step - 1, steps, self.config, start=0.0)
        measured = f"{rates[0]:.4g}, {expected:.4g} expected at update {self.step} of {steps}"
        if all(math.isclose(rate, expected, rel_tol=1e-4, abs_tol=1e-12) for rate in rates):
            return q.LEARNING_RATE.agrees(measured, self.step)
        return q.LEARNING_RATE.differs(measured, self.step)

    def optimizer_step(self) -> Statement:
        """Weights and moments after the step are AdamW's."""
        before, after, clipped = (self.sheet.group(name) for name in ("before", "after", "clipped"))
        rate, worst, count = float(self.facts["rates"][0]), ("", 0.0), 0
        for name, gradient in clipped.items():
            pair = before[f"weight/{name}"], after[f"weight/{name}"]
            steps = int(after[f"step/{name}"]) if f"step/{name}" in after else self.step
            moments = [moment(before, name, which, gradient) for which in (1, 2)]
            for part, ratio in plain.off_adamw(pair, gradient, moments, after, name, steps, rate, self.config):
                worst = max(worst, (part, ratio), key=lambda w: w[1])
            count += 1
        if not count:
            raise NotExamined("there are no gradients")
        if worst[1] <= 1:
            return q.OPTIMIZER_STEP.agrees(f"{count} weights with their moments, step size {rate:.3g}", self.step)
        return q.OPTIMIZER_STEP.differs(f"{worst[0]} is {worst[1]:.3g} times as far off as rounding can be", self.step)

    # Helpers

    def _rows(self, number: int) -> list[tuple[list[int], list[int]]]:
        """Return tokens and labels of the rows of a microbatch, without padding."""
        inputs = self.sheet.group(f"inputs/{number}")
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        labels = inputs.get("labels", ids)
        return [(row[m].tolist(), own[m].tolist()) for row, m, own in zip(ids, mask, labels, strict=True)]

    def _pairs(self, row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
        """Return prompt and answer of the data rows that a row may have been made of."""
        if "candidates" not in row:
            raise NotExamined("the data rows are not known")
        return [self._pair(one["prompt"], one["completion"]) for one in row["candidates"]]

    def _pair(self, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
        if self.tokenizer is None:
            raise NotExamined("there is no tokenizer")
        try:
            return render_pair(self.tokenizer, prompt, answer)
        except Exception as error:  # a template may raise anything
            raise NotExamined(f"the chat template refuses a row: {error}") from error

    def _require_rows(self) -> None:
        if not all(micro["rows"] and "responses" in micro["rows"][0] for micro in self.microbatches):
            raise NotExamined("the data rows are not known")

    def _difference(self, ids: list[int], expected: list[list[int]]) -> str:
        """Return where a row leaves what it should be."""
        if not expected:
            return f"{self.tokenizer.decode(ids)!r:.80} is in no data row"
        near = max(expected, key=lambda one: sum(a == b for a, b in zip(one, ids, strict=False)))
        place = next((i for i, (a, b) in enumerate(zip(near, ids, strict=False)) if a != b), min(len(near), len(ids)))
        shown = [self.tokenizer.decode(row[place : place + 6]) for row in (ids, near)]
        return f"{len(ids)} tokens in place of {len(near)}: {shown[0]!r} at place {place} in place of {shown[1]!r}"

    def _counted(self, quantity: Quantity, wrong: list[str], count: int, what: str) -> Statement:
        if wrong:
            return quantity.differs(f"{len(wrong)} of {count} {what} differ; the first: {wrong[0]}", self.step)
        if not count:
            raise NotExamined(f"there are no {what}")
        return quantity.agrees(f"{count} {what} are as expected", self.step)


def _same_order(recorded: list[float], expected: list[float]) -> bool:
    return len(recorded) == len(expected) and all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=plain.TIE) for a, b in zip(recorded, expected, strict=True)
    )


def _few(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values[:6]) + (", ..." if len(values) > 6 else "")


def _distances(some: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return by how much each gradient differs, as a share of its norm, or of a small share of the largest one's."""
    own = {name: tensor.double().cpu() for name, tensor in expected.items()}
    least = NOISE * max(rms(tensor) * math.sqrt(tensor.numel()) for tensor in own.values())
    return {
        name: float((some[name].double().cpu() - tensor).norm()) / max(float(tensor.norm()), least, 1e-12)
        for name, tensor in own.items()
    }
