"""Recomputes a sheet of PPO: a statement for each quantity, in causal order, each from the recorded inputs of its own step.

So a wrong advantage does not make the loss wrong: the first quantity that differs is where the chain broke.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from rlhf.doctor.audit import plain_credit as plain
from rlhf.doctor.audit import quantities as q
from rlhf.doctor.audit.compare import NotExamined, Quantity, chain, rms
from rlhf.doctor.audit.plain_optimizer import adam_step, code_width, moment, share_of_peak
from rlhf.doctor.audit.plain_roles import Unknown
from rlhf.doctor.audit.plain_text import render_prompt
from rlhf.doctor.audit.ppo_passes import Passes
from rlhf.doctor.audit.sheet import Sheet
from rlhf.doctor.statements import Statement

#: Share of their own spread by which fp32 results of recorded numbers may differ.
ARITHMETIC = 1e-4
#: Share of the numbers that they are made of by which they may differ, too: a small difference of large numbers is rounded.
ROUNDING = 1e-6
#: Log-probability (nats) of a rollout that does not come twice by chance.
CHANCE = -20.0


def examine(sheet: Sheet, *, with_models: bool = True) -> list[Statement]:
    """Return a statement for each quantity of a sheet; random numbers and modes are left as they were.

    Args:
        with_models: open the models anew; without them, what needs them is not examined.
    """
    with undisturbed():
        return chain(Examination(sheet, with_models=with_models).statements())


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Context after which all random generators, and torch's gradients and threads, are as before."""
    python, numpy, grad = random.getstate(), np.random.get_state(), torch.is_grad_enabled()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_grad_enabled(grad)


class Examination:
    """The quantities of one sheet."""

    def __init__(self, sheet: Sheet, *, with_models: bool) -> None:
        self.sheet, self.step, self.facts = sheet, sheet.update, sheet.facts
        self.config, self.sources = sheet.facts["config"], sheet.facts["sources"]
        self.rollout = sheet.group("rollout")
        self.mask = self.rollout["mask"]
        self.lengths: list[int] = self.mask.sum(dim=1).tolist()
        self.responses = [row[real].tolist() for row, real in zip(self.rollout["responses"], self.mask, strict=True)]
        prompts = zip(self.rollout["prompts"], self.rollout["prompt_mask"], strict=True)
        self.prompts: list[list[int]] = [row[real].tolist() for row, real in prompts]
        self.credit = sheet.group("credit")
        self.passes = Passes(self.sheet, self.prompts, self.responses, with_models=with_models)

    def statements(self) -> Iterator[Statement]:
        """Yield the statements in causal order."""
        passes = self.passes
        computed: dict[Quantity, Callable[[], Statement]] = {
            q.PROMPTS: self.prompt_tokens,
            q.ROLLOUTS_DIFFER: self.rollouts_differ,
            q.RESPONSE_MASK: self.response_mask,
            q.OLD_LOGPROBS: passes.old_logprobs,
            q.REF_LOGPROBS: passes.ref_logprobs,
            q.VALUES: passes.values,
            q.RAW_SCORES: lambda: passes.raw_scores(self.tokenizer),
            q.SCORES: self.scores,
            q.TOKEN_REWARDS: self.token_rewards,
            q.WHITENED_REWARDS: self.whitened_rewards,
            q.ADVANTAGES: self.advantages,
            q.RETURNS: self.returns,
            q.WHITENED_ADVANTAGES: self.whitened_advantages,
            q.MINIBATCHES: self.minibatches,
            q.GRADIENTS_ZEROED: self.gradients_zeroed,
            q.POLICY_LOSS: lambda: self.losses(q.POLICY_LOSS, "policy"),
            q.VALUE_LOSS: lambda: self.losses(q.VALUE_LOSS, "value"),
            q.GRADIENT: passes.gradient,
            q.GRADIENT_CLIPPING: self.gradient_clipping,
            q.LEARNING_RATE: self.learning_rate,
            q.OPTIMIZER_STEP: self.optimizer_step,
            q.FROZEN_WEIGHTS: self.frozen_weights,
            q.WEIGHTS_KEPT: self.weights_kept,
            q.KL_COEF: self.kl_coef,
            q.SAMPLING: passes.sampling,  # merges the adapter, so it comes last
            q.RANDOM_NUMBERS: passes.random_numbers,
        }
        statements = {quantity.name: self._examined(quantity, compute) for quantity, compute in computed.items()}
        yield from (statements[quantity.name] for quantity in q.PPO)

    def _examined(self, quantity: Quantity, compute: Callable[[], Statement]) -> Statement:
        try:
            return compute()
        except (NotExamined, Unknown) as reason:
            return quantity.agrees(f"not examined: {reason}", self.step)
        except Exception as error:  # a model that is opened or computed in a way of its own: no reason to end a run
            text = (str(error).splitlines() or [""])[0]
            return quantity.agrees(f"not examined: {type(error).__name__}: {text}", self.step)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that was registered with the policy."""
        return AutoTokenizer.from_pretrained(self.sources["policy"], trust_remote_code=False)

    # the rollout

    def prompt_tokens(self) -> Statement:
        """Render the data row of each prompt, and look for rows that come twice in one pass over the data."""
        tokenizer, numbers = self.tokenizer, self.rollout["prompt"].tolist()
        rows, wrong = self.facts["rows"], []
        rendered = {number: render_prompt(tokenizer, rows[str(number)]["prompt"]) for number in set(numbers)}
        for row, (number, recorded) in enumerate(zip(numbers, self.prompts, strict=True)):
            if recorded != rendered[number]:
                wrong.append((row, number))
        repeats = self.config["num_responses_per_prompt"]
        first, size = (self.step - 1) * len(numbers) // repeats, self.facts["num_prompts"]
        places = {(at // size, number) for at, number in enumerate(numbers[::repeats], first)}
        again = len(numbers) // repeats - len(places)
        if not wrong and not again:
            return q.PROMPTS.agrees(f"{len(numbers)} prompts, rendered again: all equal", self.step)
        if not wrong:
            return q.PROMPTS.differs(f"{again} prompts come again within one pass over the data", self.step)
        return q.PROMPTS.differs(
            f"{len(wrong)} of {len(numbers)} prompts are not what their data rows give",
            self.step,
            self._likeness(wrong, rendered),
        )

    def _likeness(self, wrong: list[tuple[int, int]], rendered: dict[int, list[int]]) -> str:
        """Return what a wrong prompt looks like."""
        row, number = wrong[0]
        recorded, expected = self.prompts[row], rendered[number]
        others = [other for other, tokens in rendered.items() if tokens == recorded]
        if others:
            return (
                f"row {row} has the prompt of data row {others[0]} and not of {number}: the rows are in another order"
            )
        if len(recorded) < len(expected) and expected[: len(recorded)] == recorded:
            return f"row {row} is cut at its end: {len(recorded)} of {len(expected)} tokens"
        if len(recorded) < len(expected) and expected[-len(recorded) :] == recorded:
            return f"row {row} is cut at its beginning: {len(recorded)} of {len(expected)} tokens"
        return f"row {row} has {len(recorded)} tokens and not {len(expected)}"

    def rollouts_differ(self) -> Statement:
        """Compare prompts and responses with those of the rollout before."""
        earlier, own = self.sheet.tensors.get("earlier/responses"), self.rollout["responses"]
        if earlier is None:
            raise NotExamined("there is no rollout before it")
        same_prompts = torch.equal(self.sheet.tensors["earlier/prompt"], self.rollout["prompt"])
        if earlier.shape == own.shape and torch.equal(earlier, own):
            if float(self.rollout["sampler_logprobs"][self.mask].sum()) > CHANCE:
                raise NotExamined("the policy is so sure of its answers that they are alike by themselves")
            return q.ROLLOUTS_DIFFER.differs(
                "all responses are those of the rollout before, token for token", self.step
            )
        repeats = self.config["num_responses_per_prompt"]
        count = len(own) // repeats
        begins_anew = (self.step - 1) * count % self.facts[
            "num_prompts"
        ] == 0  # another order, alike by chance if short
        if same_prompts and count < self.facts["num_prompts"] and not begins_anew:
            return q.ROLLOUTS_DIFFER.differs(
                "the prompts are those of the rollout before, in the same order", self.step
            )
        return q.ROLLOUTS_DIFFER.agrees("other prompts and responses than the rollout before", self.step)

    def response_mask(self) -> Statement:
        """Find the end of each response by its tokens."""
        stops, pad, limit = set(self.sources["stops"]), self.sources["pad"], self.config["response_length"]
        stopped, wrong = self.rollout["stopped"].tolist(), []
        for row, (tokens, real) in enumerate(zip(self.rollout["responses"].tolist(), self.mask.tolist(), strict=True)):
            first = next((t for t, token in enumerate(tokens) if token in stops), None)
            length = sum(real)
            ends = first is not None and length == first + 1
            by_text = bool(self.config["stop_strings"]) and stopped[row] and (first is None or length <= first)
            full = first is None and length == limit and not stopped[row]
            is_prefix = real == [True] * length + [False] * (len(real) - length)
            padded = all(token == pad for token in tokens[length:])
            if not (is_prefix and length and padded and (by_text or full or (ends and stopped[row]))):
                wrong.append(row)
        if not wrong:
            return q.RESPONSE_MASK.agrees(f"{len(stopped)} responses end where their stop tokens are", self.step)
        return q.RESPONSE_MASK.differs(
            f"{len(wrong)} of {len(stopped)} responses end elsewhere, first row {wrong[0]}", self.step
        )

    def scores(self) -> Statement:
        """Apply clip and penalties to the recorded raw scores."""
        raw, stopped = self.rollout["raw_scores"].tolist(), self.rollout["stopped"].tolist()
        expected = [
            plain.score_of(score, length, stopped=stop, config=self.config)
            for score, length, stop in zip(raw, self.lengths, stopped, strict=True)
        ]
        return self._arithmetic(q.SCORES, self.rollout["scores"], torch.tensor(expected), "scores of responses")

    # credit

    def token_rewards(self) -> Statement:
        """Form the token rewards of the recorded scores and log-probabilities."""
        recorded = self._part("token_rewards")
        rollout, coef = self.rollout, self.facts["kl_coef"]
        rewards = (rollout["scores"], rollout["logprobs"], rollout["ref_logprobs"], self.mask)
        expected = plain.token_rewards(*rewards, kl_coef=coef)
        detail, last = "", plain.token_rewards(torch.zeros_like(rollout["scores"]), *rewards[1:], kl_coef=coef)
        if torch.allclose(recorded.double(), expected - 2 * last, atol=1e-5):
            detail = "the KL term has the wrong sign"
        limit = 1e-5 + 1e-4 * coef * rms((rollout["logprobs"] - rollout["ref_logprobs"])[self.mask])
        limit += ROUNDING * rms(rollout["scores"])
        return q.TOKEN_REWARDS.compared(
            recorded[self.mask], expected[self.mask], limit=limit, step=self.step, what="token rewards", detail=detail
        )

    def whitened_rewards(self) -> Statement:
        """Scale the recorded token rewards, where the options ask for it."""
        recorded, rewards = self._part("whitened_rewards"), self._part("token_rewards")
        expected = plain.spread_to_one(rewards, self.mask) if self.config["whiten_rewards"] else rewards
        what, size = "rewards that advantages are made of", self._in_deviations(rewards)
        return self._arithmetic(q.WHITENED_REWARDS, recorded, expected, what, made_of=size)

    def advantages(self) -> Statement:
        """Estimate the advantages of the recorded rewards and values."""
        recorded, rewards = self._part("advantages"), self._part("whitened_rewards")
        gamma, lam = self.config["gamma"], self.config["lam"]
        expected = plain.advantages(self.rollout["values"], rewards, self.mask, gamma=gamma, lam=lam)
        size = rms(rewards) + rms(self.rollout["values"])
        return self._arithmetic(q.ADVANTAGES, recorded, expected, "advantages", made_of=size)

    def returns(self) -> Statement:
        """Add the recorded advantages and values."""
        if "returns" not in self.credit:
            raise NotExamined("this estimator trains no values")
        recorded, expected = self.credit["returns"], self._part("advantages") + self.rollout["values"]
        size = rms(self.rollout["values"])
        return self._arithmetic(q.RETURNS, recorded, torch.where(self.mask, expected, 0.0), "returns", made_of=size)

    def whitened_advantages(self) -> Statement:
        """Whiten the recorded advantages."""
        expected = plain.whitened(self._part("advantages"), self.mask)
        recorded = self.credit["whitened_advantages"]
        detail = "they have the wrong sign" if torch.allclose(recorded.double(), -expected, atol=1e-3) else ""
        size = self._in_deviations(self._part("advantages"))
        return self._arithmetic(q.WHITENED_ADVANTAGES, recorded, expected, "whitened advantages", detail, made_of=size)

    def _in_deviations(self, x: Tensor) -> float:
        """Return the size of numbers, as a multiple of their spread."""
        spread = float(x[self.mask].double().std(correction=0))
        return rms(x[self.mask]) / spread if spread else 0.0

    def _part(self, name: str) -> Tensor:
        if name not in self.credit:
            raise NotExamined("this estimator shows no such intermediate result")
        return self.credit[name]

    def _arithmetic(
        self,
        quantity: Quantity,
        recorded: Tensor,
        expected: Tensor,
        what: str,
        detail: str = "",
        share: float = ARITHMETIC,
        made_of: float = 0.0,
    ) -> Statement:
        """Compare numbers that fp32 arithmetic makes of recorded ones, whose size is `made_of`."""
        limit = share * max(rms(expected), 1e-3) + 1e-7 + ROUNDING * made_of
        return quantity.compared(recorded, expected, limit=limit, step=self.step, what=what, detail=detail)

    # the optimiser

    def minibatches(self) -> Statement:
        """Count the rows of all minibatches."""
        c, entries = self.config, [entry for entry in self.facts["minibatches"] if "rows" in entry]
        expected = c["num_ppo_epochs"] * (c["rollout_batch_size"] // c["minibatch_size"])
        if c["max_approx_kl"] is not None and len(entries) < expected:
            raise NotExamined("the update ended early, at max_approx_kl")
        problem = plain.covers([entry["rows"] for entry in entries], len(self.lengths), c["num_ppo_epochs"])
        if len(entries) != expected:
            problem = f"{len(entries)} minibatches, where the options make {expected}"
        sizes = [sum(self.lengths[row] for part in entry["rows"] for row in part) for entry in entries]
        if not problem and sizes != [entry["tokens"] for entry in entries]:
            problem = f"the losses are divided by {entries[0]['tokens']} tokens, where the minibatch has {sizes[0]}"
        measured = f"{expected} minibatches hold each of {len(self.lengths)} rows once an epoch"
        return q.MINIBATCHES.differs(problem, self.step) if problem else q.MINIBATCHES.agrees(measured, self.step)

    def gradients_zeroed(self) -> Statement:
        """Look at the gradients with which each minibatch began."""
        norms = [entry["leftover"] for entry in self.facts["minibatches"]]
        measured = f"norm of the gradients at the beginning of {len(norms)} minibatches: {max(norms):.3g} (limit 0)"
        if max(norms) == 0:
            return q.GRADIENTS_ZEROED.agrees(measured, self.step)
        return q.GRADIENTS_ZEROED.differs(
            measured, self.step, f"first before minibatch {1 + [norm > 0 for norm in norms].index(True)}"
        )

    def losses(self, quantity: Quantity, role: str) -> Statement:
        """Form the losses of every minibatch from the recorded outputs of the model."""
        recorded, expected = [], []
        for number, entry in enumerate(self.facts["minibatches"]):
            for part, rows in enumerate(entry.get("rows", ())):
                loss = self.sheet.tensors.get(f"loss/{number}/{role}/{part}")
                if loss is None:
                    continue
                output, width = self.sheet.tensors[f"output/{number}/{role}/{part}"], loss.shape[1]
                real = self.mask[rows, :width]
                recorded.append(loss[real])
                expected.append(self._loss(role, output, torch.tensor(rows), width)[real])
        if not recorded:
            raise NotExamined("this update did not train it")
        return self._arithmetic(quantity, torch.cat(recorded), torch.cat(expected), "losses of tokens", share=1e-3)

    def _loss(self, role: str, output: Tensor, rows: Tensor, width: int) -> Tensor:
        """Return losses of rows in fp32, as the run's own ratios are."""
        c, rollout, credit = self.config, self.rollout, self.credit
        if role == "policy":
            old, advantages = rollout["logprobs"][rows, :width], credit["whitened_advantages"][rows, :width]
            return plain.policy_loss(output, old, advantages, clip=c["clip_range"])
        old, returns = rollout["values"][rows, :width], credit["returns"][rows, :width]
        return plain.value_loss(output, old, returns, clip=c["clip_range_value"])

    def gradient_clipping(self) -> Statement:
        """Scale the recorded gradients."""
        recorded, expected = [], []
        for number, entry in enumerate(self.facts["minibatches"]):
            for name, clipped in self.sheet.group(f"clipped/{number}").items():
                before = self.sheet.tensors[f"gradient/{number}/{name}"]
                norm = entry["norms"][_is_value(name, self.config)]
                recorded.append(clipped.flatten())
                expected.append(before.flatten().double() * min(1.0, self.config["max_grad_norm"] / (norm + 1e-6)))
        if not recorded:
            raise NotExamined("no optimiser step was made")
        copied, wanted = torch.cat(recorded), torch.cat(expected)
        limit = 1e-4 * rms(wanted) + 1e-12
        return q.GRADIENT_CLIPPING.compared(copied, wanted, limit=limit, step=self.step, what="clipped gradients")

    def learning_rate(self) -> Statement:
        """Follow the schedule from the run's first step."""
        c = self.config
        per_update = c["num_ppo_epochs"] * (c["rollout_batch_size"] // c["minibatch_size"])
        steps = c["total_episodes"] // c["rollout_batch_size"] * per_update
        peaks = [
            c["learning_rate"],
            c["learning_rate"] if c["value_learning_rate"] is None else c["value_learning_rate"],
        ]
        recorded, expected = [], []
        for number, entry in enumerate(self.facts["minibatches"]):
            share = share_of_peak((self.step - 1) * per_update + number, steps, c, start=0.1)
            for peak, rate in zip(peaks, entry.get("rates", ()), strict=False):
                recorded.append(rate)
                expected.append(peak * share * self.facts["learning_rate_scale"])
        if not recorded:
            raise NotExamined("no optimiser step was made")
        copied, wanted = torch.tensor(recorded), torch.tensor(expected)
        return q.LEARNING_RATE.compared(copied, wanted, limit=1e-5 * rms(wanted), step=self.step, what="step sizes")

    def optimizer_step(self) -> Statement:
        """Make the steps again from the recorded gradients, weights and states of a few tensors."""
        moved, expected, worst, steps = [], [], "", 0
        for number, entry in enumerate(self.facts["minibatches"]):
            before, after = self.sheet.group(f"before/{number}"), self.sheet.group(f"after/{number}")
            for name, gradient in self.sheet.group(f"clipped/{number}").items():
                weight, steps = before[f"weight/{name}"], steps + 1
                rate = entry["rates"][_is_value(name, self.config)]
                count = int(before[f"step/{name}"]) + 1 if f"step/{name}" in before else 1
                first, second = (moment(before, name, which, weight) for which in (1, 2))
                new, *moments = adam_step(weight, gradient, first, second, count, rate, self.config)
                moved.append((after[f"weight/{name}"].double() - weight.double()).flatten())
                expected.append((new - weight.double()).flatten())
                worst = worst or _states_differ(after, name, moments, count)
        if not moved:
            raise NotExamined("no optimiser step was made")
        copied, wanted = torch.cat(moved), torch.cat(expected)
        weights = [t for name, t in self.sheet.tensors.items() if name.startswith("before/") and "/weight/" in name]
        largest = max(float(w.abs().max()) for w in weights)
        limit = 2e-3 * rms(wanted) + 2 * torch.finfo(weights[0].dtype).eps * largest
        if worst:
            return q.OPTIMIZER_STEP.differs(worst, self.step)
        return q.OPTIMIZER_STEP.compared(copied, wanted, limit=limit, step=self.step, what=f"{steps} steps of tensors")

    def frozen_weights(self) -> Statement:
        """Compare the frozen weights before and after the update, and with the first audit's."""
        first, before, after = (self.facts[f"frozen_{when}"] for when in ("first", "before", "after"))
        changed = sorted(n for n in after if not after[n] == before.get(n) == first.get(n)) + sorted(
            first.keys() - after
        )
        if changed:
            return q.FROZEN_WEIGHTS.differs(
                f"{len(changed)} of {len(after)} tensors changed, first {changed[0]}", self.step
            )
        return q.FROZEN_WEIGHTS.agrees(f"{len(after)} tensors have the bits that they had", self.step)

    def weights_kept(self) -> Statement:
        """Compare the weights that made the rollout with those that the update before left."""
        changed = self.facts["changed_since"]
        if changed is None:
            raise NotExamined("there is no update before it, or the run went back")
        if changed:
            return q.WEIGHTS_KEPT.differs(
                f"{len(changed)} tensors changed since the last update, first {changed[0]}", self.step
            )
        return q.WEIGHTS_KEPT.agrees("the rollout was made by the weights that the last update left", self.step)

    def kl_coef(self) -> Statement:
        """Follow the KL coefficient through the update."""
        facts, config = self.facts, self.config
        log_ratio = torch.where(self.mask, self.rollout["logprobs"] - self.rollout["ref_logprobs"], 0.0)
        kl = float(log_ratio.double().sum() / len(self.lengths))
        expected = [plain.kl_coef_after(facts["kl_coef"], kl, len(self.lengths), config)]
        recorded = [facts["kl_coef_after"]]
        if not facts["roll_backs"] and (config["kl_target"] is None or self.step == 1):
            recorded, expected = [facts["kl_coef"], *recorded], [config["kl_coef"], *expected]
        copied, wanted = torch.tensor(recorded), torch.tensor(expected)
        return q.KL_COEF.compared(
            copied, wanted, limit=1e-4 * rms(wanted) + 1e-12, step=self.step, what="KL coefficient"
        )


def _is_value(name: str, config: dict[str, object]) -> bool:
    """Return whether a trained tensor is the value's."""
    return name.startswith(("value.", "value_head.")) or ".value.weight" in name or name.endswith(".value")


def _states_differ(after: dict[str, Tensor], name: str, moments: list[Tensor], count: int) -> str:
    """Return how the optimiser's states after a step are not these moments; empty: they are."""
    if int(after.get(f"step/{name}", torch.tensor(count))) != count:
        return f"the optimiser counts {int(after[f'step/{name}'])} steps of {name}, and not {count}"
    for which, expected in enumerate(moments, start=1):
        recorded, slack = moment(after, name, which, expected), 1e-4 * expected.abs() + 1e-6 * rms(expected)
        if f"qmap{which}/{name}" in after:
            codes, table, largest = (after[f"{key}{which}/{name}"] for key in ("state", "qmap", "absmax"))
            slack = slack + code_width(codes, table, largest)
        if bool(((recorded - expected).abs() > slack + 1e-20).any()):
            return f"moment {which} of {name} is not what the gradient makes of it"
    return ""
