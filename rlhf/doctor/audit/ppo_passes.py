"""The quantities of a PPO sheet that need the models: each is compared with passes of models opened anew.

Legend: n rows, R padded response.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf.doctor.audit import plain_credit as plain
from rlhf.doctor.audit import quantities as q
from rlhf.doctor.audit.compare import NotExamined, Quantity, rms
from rlhf.doctor.audit.plain_roles import ROWS_AT_ONCE, Batch, Roles
from rlhf.doctor.audit.plain_text import decode_answer, render_pair
from rlhf.doctor.audit.sheet import Sheet
from rlhf.doctor.statements import Statement

#: Root mean square by which log-probabilities (nats) may differ, and values and scores as a share of their size, by compute type;
#: `8bit` is a base in 8 bits, which rounds its activations, too.
ROUNDING = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 0.05, "8bit": 0.15}
#: The type whose passes show how much a compute type rounds, and the multiple of that by which numbers may differ.
FINER = {"bfloat16": "float32", "float32": "float64"}
ROUNDINGS = 3.0
#: Share of the gradient by which it may differ in direction, and in length.
GRADIENT = {"float64": (1e-6, 1e-6), "float32": (2e-3, 1e-3), "bfloat16": (0.2, 0.05), "8bit": (0.4, 0.15)}
#: Room for rounding around the interval of random numbers that a token stands for.
UNIFORM = {"float64": 1e-4, "float32": 1e-3, "bfloat16": 0.02, "8bit": 0.05}
#: Share of tokens that lie in their intervals.
DRAWN = 0.95
#: Standard deviations by which the surprise of tokens may differ from their entropy.
SURPRISE = 5.0
#: Variance (nats squared) that is added to theirs: of a policy that is nearly sure, one rare token is many deviations.
RARE = 9.0
#: Most tokens of a minibatch whose gradient is computed again.
MOST_TOKENS = 16_384
#: Most bytes of models times tokens for which audits after that of the first update compute the gradient again.
LATER_GRADIENT = 1e11
FEW = 8


class Passes:
    """Passes over the first minibatch of a sheet."""

    def __init__(
        self, sheet: Sheet, prompts: Sequence[list[int]], responses: Sequence[list[int]], *, with_models: bool
    ) -> None:
        self.sheet, self.step, self.prompts, self.responses = sheet, sheet.update, prompts, responses
        self.config, self.sources = sheet.facts["config"], sheet.facts["sources"]
        self.with_models = with_models
        self.dtype = "8bit" if self.config["quantization"] == "8bit" else self.sources["dtype"]
        self.rollout = sheet.group("rollout")
        entries = sheet.facts["minibatches"]
        rows = [row for part in entries[0].get("rows", ()) for row in part] if entries else []
        self.rows: list[int] = rows or list(range(len(prompts)))
        tokens = sum(len(prompts[row]) + len(responses[row]) for row in self.rows)
        later = self.step > 1 and tokens * sheet.facts["model_bytes"] > LATER_GRADIENT
        self.too_long = tokens > MOST_TOKENS or later
        if self.too_long:
            self.rows = self.rows[:FEW]
        self.few = self.rows[:FEW]
        self.trains_policy = self.step > self.config["value_warmup_updates"]

    @cached_property
    def roles(self) -> Roles:
        """The models with the weights that made the rollout."""
        weights = self.sheet.group("weights")
        if not self.with_models:
            raise NotExamined("there is no room for the models beside the run's; afterwards: rlhf doctor audit RUN")
        if not weights:
            raise NotExamined("the trained weights are too large for a sheet")
        return Roles(weights, self.config, self.sources)

    def _batch(self, rows: Sequence[int]) -> Batch:
        return Batch([self.prompts[r] for r in rows], [self.responses[r] for r in rows], self.roles.device)

    def _batches(self, rows: Sequence[int]) -> list[tuple[list[int], Batch]]:
        parts = [list(rows[first : first + ROWS_AT_ONCE]) for first in range(0, len(rows), ROWS_AT_ONCE)]
        return [(part, self._batch(part)) for part in parts]

    @cached_property
    def trained(self) -> dict[str, list[Tensor]]:
        """Outputs `policy` and `value` of each row of the minibatch; the gradients are left at the parameters."""
        roles, config, credit = self.roles, self.config, self.sheet.group("credit")
        tokens = sum(len(self.responses[row]) for row in self.rows)
        outputs: dict[str, list[Tensor]] = {"policy": [], "value": []}
        for part, batch in self._batches(self.rows):
            width = batch.width
            with roles.role("policy") as model, self._gradients(self.trains_policy):
                new = roles.logprobs(model, batch, config["temperature"])
                outputs["policy"] += self._cut(new, part)
                if new.requires_grad:
                    old, advantages = (
                        self.rollout["logprobs"][part, :width],
                        credit["whitened_advantages"][part, :width],
                    )
                    loss = plain.policy_loss(
                        new, old.to(new.device), advantages.to(new.device), clip=config["clip_range"]
                    )
                    (torch.where(batch.real, loss, 0.0).sum() / tokens).backward()
            if "returns" not in credit:
                continue
            with roles.role(roles.value_role()) as model, self._gradients(True):
                values = roles.values(model, batch)
                outputs["value"] += self._cut(values, part)
                if values.requires_grad:
                    old, returns = self.rollout["values"][part, :width], credit["returns"][part, :width]
                    loss = plain.value_loss(
                        values, old.to(values.device), returns.to(values.device), clip=config["clip_range_value"]
                    )
                    (config["vf_coef"] * torch.where(batch.real, loss, 0.0).sum() / tokens).backward()
        if self.trains_policy and not self.too_long:
            self._train_texts()
        return outputs

    def _train_texts(self) -> None:
        """Add the gradient of the texts of PPO-ptx."""
        entries = self.sheet.facts["minibatches"]
        texts = entries[0].get("texts", []) if entries else []
        tokens = sum(len(answer) for _, answer in texts)
        for first in range(0, len(texts), ROWS_AT_ONCE):
            part = texts[first : first + ROWS_AT_ONCE]
            batch = Batch([prompt for prompt, _ in part], [answer for _, answer in part], self.roles.device)
            with self.roles.role("policy") as model, self._gradients(True):
                loss = -self.roles.logprobs(model, batch, 1.0).sum() / tokens
                (self.config["ptx_coef"] * loss).backward()

    @contextlib.contextmanager
    def _gradients(self, wanted: bool) -> Any:
        """Context in which the tensors that were chosen for the sheet have gradients, and no others."""
        for name, parameter in self.roles.parameters.items():
            parameter.requires_grad_(wanted and not self.too_long and name in self.chosen)
        with torch.set_grad_enabled(wanted and bool(self.chosen) and not self.too_long):
            yield

    @cached_property
    def chosen(self) -> list[str]:
        """The tensors that the recorder copied, with a gradient or without one."""
        return sorted(self.sheet.group("gradient/0").keys() | self.sheet.group("before/0/weight").keys())

    def _cut(self, x: Tensor, rows: Sequence[int]) -> list[Tensor]:
        return [row[: len(self.responses[r])].detach().cpu() for row, r in zip(x, rows, strict=True)]

    def _recorded(self, name: str, rows: Sequence[int]) -> Tensor:
        return torch.cat([self.rollout[name][row, : len(self.responses[row])] for row in rows])

    def rounding(self, name: str) -> float:
        """Return by how much the compute type itself moves numbers of a few rows: deep models and large weights round more."""
        if self.dtype not in FINER:
            return 0.0
        return self._roundings["values" if name == "values" else "policy"]

    @cached_property
    def _roundings(self) -> dict[str, float]:
        """Root mean square differences of log-probabilities and values to passes in a finer type."""
        roles, batch, sizes = self.roles, self._batch(self.few[: FEW // 2]), {}
        with_values = "returns" in self.sheet.group("credit")
        for what, role in {"policy": "policy", **({"values": roles.value_role()} if with_values else {})}.items():
            with roles.role(role) as model, torch.no_grad():
                pair = []
                for finer in (None, FINER[self.dtype]):
                    with roles.in_type(model, finer) as own:
                        temperature = self.config["temperature"]
                        x = roles.values(own, batch) if what == "values" else roles.logprobs(own, batch, temperature)
                        pair.append(x.double())
                sizes[what] = rms((pair[0] - pair[1])[batch.real])
        return sizes

    def _is_rough(self, *names: str) -> bool:
        """Return whether rounding alone moves numbers further than the limits for them."""
        return any(ROUNDINGS * self.rounding(name) > self._limit(name, self.rollout["values"]) for name in names)

    def _limit(self, name: str, values: Tensor) -> float:
        return ROUNDING[self.dtype] * (1.0 if name.endswith("logprobs") else max(rms(values), 0.1))

    def _compared(self, quantity: Quantity, name: str, expected: list[Tensor], rows: Sequence[int]) -> Statement:
        wanted = torch.cat(expected)
        limit, recorded = self._limit(name, wanted), self._recorded(name, rows)
        what = f"{len(wanted)} tokens of {len(rows)} responses"
        statement = quantity.compared(recorded, wanted, limit=limit, step=self.step, what=what)
        if not statement.passed:
            limit = max(limit, ROUNDINGS * self.rounding(name))
            statement = quantity.compared(recorded, wanted, limit=limit, step=self.step, what=what)
        return statement

    def old_logprobs(self) -> Statement:
        """Compare the old log-probabilities with the policy's."""
        return self._compared(q.OLD_LOGPROBS, "logprobs", self.trained["policy"], self.rows)

    @torch.no_grad()
    def ref_logprobs(self) -> Statement:
        """Compare the reference's log-probabilities with those of the registered SFT model."""
        expected: list[Tensor] = []
        with self.roles.role("reference") as model:
            for part, batch in self._batches(self.few):
                expected += self._cut(self.roles.logprobs(model, batch, self.config["temperature"]), part)
        return self._compared(q.REF_LOGPROBS, "ref_logprobs", expected, self.few)

    def values(self) -> Statement:
        """Compare the values with those of the value model."""
        if "returns" not in self.sheet.group("credit"):
            raise NotExamined("this estimator needs no values")
        return self._compared(q.VALUES, "values", self.trained["value"], self.rows)

    def raw_scores(self, tokenizer: Any) -> Statement:
        """Score responses by each reward, opened anew, and add them up."""
        names, weights = self.config["reward"], self.config["reward_weights"] or [1.0] * len(self.config["reward"])
        total = torch.zeros(len(self.few), dtype=torch.float64)
        for name, weight in zip(names, weights, strict=True):
            total += weight * self._scores(name, tokenizer).double().cpu()
        recorded = self.rollout["raw_scores"][self.few]
        exact = not any(name in self.sources["rewards"] for name in names)
        limit = 1e-5 * max(rms(total), 1.0) if exact else ROUNDING[self.dtype] * max(rms(total), 0.5)
        statement = q.RAW_SCORES.compared(
            recorded, total, limit=limit, step=self.step, what=f"scores of {len(self.few)} responses"
        )
        for name in names if not statement.passed else ():
            if ":" in name and name not in self.sources["rewards"] and not self._repeats(name, tokenizer):
                raise NotExamined(f"the function {name} does not give the same scores twice")
        return statement

    def _scores(self, name: str, tokenizer: Any) -> Tensor:
        """Return the scores of a few rows by one reward."""
        if name.startswith(("http://", "https://")):
            raise NotExamined("a reward is an endpoint, which is not asked again")
        if name in self.sources["rewards"]:
            return self.roles.scores(name, [self._reward_row(name, row, tokenizer) for row in self.few])
        if ":" not in name:
            raise NotExamined(f"the classifier {name} is not opened again")
        return torch.tensor(self._called(name, self._texts(tokenizer)), dtype=torch.float64)[self.few]

    def _reward_row(self, name: str, row: int, tokenizer: Any) -> list[int]:
        """Return the tokens that a registered reward model reads of a row."""
        source = self.sources["rewards"][name]
        if source["same_tokens"]:
            return [*self.prompts[row], *self.responses[row]]
        from transformers import AutoTokenizer

        own = AutoTokenizer.from_pretrained(source["path"], trust_remote_code=False)
        answer = [{"role": "assistant", "content": decode_answer(tokenizer, self.responses[row])}]
        prompt, response = render_pair(own, self._data(row)["prompt"], answer)
        return [*prompt, *response]

    def _data(self, row: int) -> dict[str, Any]:
        data: dict[str, Any] = self.sheet.facts["rows"][str(int(self.rollout["prompt"][row]))]
        return data

    def _texts(self, tokenizer: Any) -> list[str]:
        return [decode_answer(tokenizer, response) for response in self.responses]

    def _repeats(self, name: str, tokenizer: Any) -> bool:
        """Return whether a function draws no random numbers and remembers nothing: texts that are new to it score alike twice."""
        texts = self._texts(tokenizer)
        new = [f"{text} ({self.step})" for text in texts]
        return all(self._called(name, some) == self._called(name, some) for some in (texts, new))

    def _called(self, name: str, texts: list[str]) -> list[float]:
        """Return the scores of the whole rollout by a function: some compare responses with each other.

        Each call may change what a function remembers, so there is one, and more only where its scores differ.
        """
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise NotExamined(f"the function {name} cannot be imported: {error}") from error
        rows = [copy.deepcopy(self._data(row)) for row in range(len(self.responses))]  # a function may change its own
        columns = {
            f"{key}_" if key in ("prompts", "responses") else key: [row.get(key) for row in rows]
            for key in sorted({key for row in rows for key in row} - {"prompt"})
        }
        parameters = inspect.signature(function).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            columns = {key: column for key, column in columns.items() if key in {p.name for p in parameters}}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir("."):
            return [float(score) for score in function([row["prompt"] for row in rows], list(texts), **columns)]

    @cached_property
    def drawn(self) -> tuple[list[Tensor], float, dict[int, float]]:
        """Draws of a few rows, looked at with the weights that sample; nothing else can be computed afterwards.

        The sampler's log-probabilities, the surprise of the tokens (standard deviations off), and the share of tokens that fit
        the random numbers of an update, from 0.
        """
        logprobs, gap, variance = list[Tensor](), 0.0, 0.0
        inside: dict[int, float] = dict.fromkeys({self.step - 1, 0, max(self.step - 2, 0)}, 0.0)
        room, count = UNIFORM[self.dtype], 0
        uniform = {
            update: plain.uniform_numbers(
                self.config["seed"], update, len(self.responses), self.config["response_length"]
            )
            for update in inside
        }
        with self.roles.sampler() as model, torch.no_grad():
            for part, batch in self._batches(self.few):
                distribution = self.roles.distribution(model, batch, self.config["temperature"]).float().cpu()
                for row, log_pi in zip(part, distribution, strict=True):
                    tokens = torch.tensor(self.responses[row])
                    log_pi = log_pi[: len(tokens)]
                    own, pi = log_pi.gather(1, tokens[:, None])[:, 0], log_pi.exp()
                    logprobs.append(own)
                    surprise = torch.where(pi > 0, -log_pi, 0.0)
                    entropy = (pi * surprise).sum(dim=1)
                    gap += float((-own - entropy).sum())
                    variance += float(((pi * surprise**2).sum(dim=1) - entropy**2).clamp_min(0).sum())
                    upper = pi.cumsum(dim=1).gather(1, tokens[:, None])[:, 0]
                    count += len(tokens)
                    for update, numbers in uniform.items():
                        u = numbers[row, : len(tokens)]
                        fits = (u >= upper - own.exp() - room) & (u <= upper + room)
                        inside[update] += float(fits.sum())
        return logprobs, gap / (variance + RARE) ** 0.5, {update: hits / count for update, hits in inside.items()}

    def sampling(self) -> Statement:
        """Compare the sampler's log-probabilities and the surprise of its tokens with the policy's distribution."""
        logprobs, deviations, _ = self.drawn
        statement = self._compared(q.SAMPLING, "sampler_logprobs", logprobs, self.few)
        measured = f"{statement.measured}; surprise of the tokens {deviations:+.1f} standard deviations off (limit {SURPRISE:g})"
        if statement.passed and abs(deviations) <= SURPRISE:
            return q.SAMPLING.agrees(measured, self.step)
        return q.SAMPLING.differs(measured, self.step)

    def random_numbers(self) -> Statement:
        """Look whether the tokens are those that the random numbers of seed and update pick."""
        shares = self.drawn[2]
        own = shares[self.step - 1]
        measured = f"{own:.1%} of the tokens fit the random numbers of this update (at least {DRAWN:.0%})"
        if own < DRAWN and self._is_rough("logprobs"):
            raise NotExamined(f"{self.dtype} rounds too much at these weights")
        if own >= DRAWN:
            return q.RANDOM_NUMBERS.agrees(measured, self.step)
        others = [update for update, share in shares.items() if share >= DRAWN]
        detail = f"they are those of update {others[0] + 1}: the seed is frozen" if others else ""
        return q.RANDOM_NUMBERS.differs(measured, self.step, detail)

    def gradient(self) -> Statement:
        """Compare the gradients of a few tensors, by role, with those of the plain losses."""
        if self.too_long:
            raise NotExamined("it takes too long here; that of the first update is, up to 16,384 tokens")
        _ = self.trained
        recorded, own, measured = self.sheet.group("gradient/0"), self.roles.parameters, []
        if not recorded:
            return q.GRADIENT.differs("no gradient reached the weights", self.step)
        for role in ("policy", "value"):
            names = [
                name for name in self.chosen if (".value" in name or name.startswith("value")) == (role == "value")
            ]
            arrived = {name: recorded.get(name, torch.zeros_like(own[name], device="cpu")) for name in names}
            pairs = [(arrived[name].flatten().double(), own[name].grad) for name in names]
            if not pairs:
                continue
            copied = torch.cat([one for one, _ in pairs])
            wanted = torch.cat([
                torch.zeros_like(one) if other is None else other.flatten().double().cpu() for one, other in pairs
            ])  # fmt: skip
            length = float(wanted.norm())
            scale = float(copied @ wanted) / max(length**2, 1e-30)
            rest = float((copied - scale * wanted).norm()) / max(length, 1e-30)
            direction, size = GRADIENT[self.dtype]
            measured.append(
                f"{role}: {scale:.4f} times the expected one (limit 1 +- {size:g}), {rest:.2g} of it in other directions "
                f"(limit {direction:g})"
            )
            if max(length, float(copied.norm())) > 1e-9 and not (abs(scale - 1) <= size and rest <= direction):
                if self._is_rough("logprobs" if role == "policy" else "values"):
                    raise NotExamined(f"{self.dtype} rounds too much at these weights")
                return q.GRADIENT.differs(measured[-1], self.step)
        return q.GRADIENT.agrees("; ".join(measured), self.step)
