"""The audit of PPO: sound runs are accused of nothing, and each fault is found at the quantity that it is in."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from audit_runs import Start, start, wrong

from rlhf.doctor.audit import quantities
from rlhf.doctor.audit.ppo import Examination, examine
from rlhf.doctor.audit.ppo_passes import LATER_GRADIENT, SURPRISE, Passes
from rlhf.doctor.audit.sheet import Sheet, list_sheets, read_sheet
from rlhf.doctor.statements import Statement

QUANTITIES = [quantity.name for quantity in quantities.PPO]
__all__ = ["start"]


@pytest.fixture(scope="module")
def sheet(start: Start) -> Sheet:
    """The sheet of a sound run's third update."""
    return read_sheet(list_sheets(start())[-1])


def examined(statements: list[Statement]) -> set[str]:
    return {one.name for one in statements if not one.measured.startswith("not examined")}


def test_a_sound_sheet(sheet: Sheet) -> None:
    """Catches: an accusation without a fault, and quantities that are silently not examined."""
    statements = examine(sheet)
    assert [one.name for one in statements] == QUANTITIES
    assert wrong(statements) == []
    assert examined(statements) == set(QUANTITIES)
    assert all(one.part == "audit" and one.step == 3 for one in statements)


def _scaled(name: str, factor: float) -> Callable[[Sheet], None]:
    def change(sheet: Sheet) -> None:
        for key in sheet.tensors:
            if key.startswith(name):
                sheet.tensors[key] = sheet.tensors[key] * factor

    return change


def _rolled(*names: str) -> Callable[[Sheet], None]:
    def change(sheet: Sheet) -> None:
        for name in names:
            sheet.tensors[name] = sheet.tensors[name].roll(1, 0)

    return change


def _longer_masks(sheet: Sheet) -> None:
    sheet.tensors["rollout/stopped"] = ~sheet.tensors["rollout/stopped"]


def _same_as_before(sheet: Sheet) -> None:
    sheet.tensors["earlier/responses"] = sheet.tensors["rollout/responses"]


def _facts(**changes: Any) -> Callable[[Sheet], None]:
    return lambda sheet: sheet.facts.update(changes)


def _entry(number: int, **changes: Any) -> Callable[[Sheet], None]:
    return lambda sheet: sheet.facts["minibatches"][number].update(changes)


def _noise(name: str, size: float) -> Callable[[Sheet], None]:
    def change(sheet: Sheet) -> None:
        tensor = sheet.tensors[name]
        sheet.tensors[name] = tensor + size * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))

    return change


#: One alteration of a sheet for each quantity, small ones where a fault may be small.
ALTERED: dict[str, Callable[[Sheet], None]] = {
    "prompts": _rolled("rollout/prompt"),
    "rollouts_differ": _same_as_before,
    "response_mask": _longer_masks,
    "sampling": _noise("rollout/sampler_logprobs", 0.01),
    "random_numbers": lambda sheet: sheet.facts["config"].update(seed=5),
    "old_logprobs": _noise("rollout/logprobs", 0.01),
    "ref_logprobs": _noise("rollout/ref_logprobs", 0.01),
    "values": _scaled("rollout/values", 1.01),
    "raw_scores": _rolled("rollout/raw_scores"),
    "scores": _scaled("rollout/scores", 1.001),
    "token_rewards": _facts(kl_coef=0.2),
    "whitened_rewards": _scaled("credit/whitened_rewards", 1.01),
    "advantages": _scaled("credit/advantages", 1.001),
    "returns": _scaled("credit/returns", 1.001),
    "whitened_advantages": _scaled("credit/whitened_advantages", 1.001),
    "minibatches": _entry(1, tokens=1),
    "gradients_zeroed": _entry(1, leftover=1e-6),
    "policy_loss": _scaled("loss/1/policy", 1.01),
    "value_loss": _scaled("loss/0/value", 2.0),
    "gradient": _scaled("gradient/0", 1.01),
    "gradient_clipping": _scaled("clipped/0", 1.01),
    "learning_rate": _facts(learning_rate_scale=0.5),
    "optimizer_step": _scaled("after/1/exp_avg_sq", 1.01),
    "frozen_weights": lambda sheet: sheet.facts["frozen_after"].update({next(iter(sheet.facts["frozen_after"])): 1}),
    "weights_kept": _facts(changed_since=["a.weight"]),
    "kl_coef": _facts(kl_coef_after=1.0),
}


WITH_MODELS = ("sampling", "random_numbers", "old_logprobs", "ref_logprobs", "values", "raw_scores", "gradient")


@pytest.mark.parametrize("name", QUANTITIES)
def test_a_difference_is_found_where_it_is(name: str, sheet: Sheet) -> None:
    """Catches: a quantity that is compared with itself, and one that is blamed for another's fault."""
    altered = Sheet(sheet.update, copy.deepcopy(sheet.facts), dict(sheet.tensors))
    ALTERED[name](altered)
    statements = examine(altered, with_models=name in WITH_MODELS)
    assert wrong(statements)[:1] == [name]
    one = next(one for one in statements if one.name == name)
    assert one.severity == "critical" and one.cause and one.action and one.explains


def test_answers_that_are_alike_by_chance(sheet: Sheet) -> None:
    """Catches: a policy that has one answer left, and the prompts of a short data set, called frozen random numbers."""
    altered = Sheet(sheet.update, copy.deepcopy(sheet.facts), dict(sheet.tensors))
    _same_as_before(altered)
    tokens = altered.tensors["rollout/mask"].sum()
    names = [wrong(_sure(altered, nats / tokens)) for nats in (-19.0, -21.0)]
    assert names == [[], ["rollouts_differ"]]
    again = Sheet(sheet.update, copy.deepcopy(sheet.facts), dict(sheet.tensors))
    again.tensors["earlier/prompt"] = again.tensors["rollout/prompt"]
    count = len(again.tensors["rollout/prompt"])
    for size, expected in ((2 * count, []), (3 * count, ["rollouts_differ"])):  # update 3 begins a pass, or ends it
        again.facts["num_prompts"] = size
        statements = examine(again, with_models=False)
        assert [one.name for one in statements if one.name == "rollouts_differ" and not one.passed] == expected


def _sure(sheet: Sheet, logprob: Any) -> list[Statement]:
    mask = sheet.tensors["rollout/mask"]
    sheet.tensors["rollout/sampler_logprobs"] = torch.where(mask, float(logprob), 0.0)
    return [one for one in examine(sheet, with_models=False) if one.name == "rollouts_differ"]


def test_a_rare_token_of_a_sure_policy(sheet: Sheet) -> None:
    """Catches: one token of probability 1e-4, which comes now and then, called another distribution."""
    vocabulary = 40
    sure = torch.full((vocabulary,), 1e-4 / (vocabulary - 1)).log()
    deviations = []
    for rare in (1, 4):
        places = iter(range(10_000))

        def distribution(
            model: Any, batch: Any, temperature: float, places: Any = places, rare: int = rare
        ) -> torch.Tensor:
            log_pi = sure.repeat(len(batch.lengths), batch.width, 1)
            for row, response in enumerate(batch.tokens.tolist()):
                for t, token in enumerate(response[: batch.lengths[row]]):
                    likely = token if next(places) >= rare else (token + 1) % vocabulary
                    log_pi[row, t, likely] = math.log(1 - 1e-4)
            return log_pi

        passes = Examination(sheet, with_models=False).passes
        passes.responses = [[token % vocabulary for token in response] for response in passes.responses]
        roles = SimpleNamespace(sampler=lambda: contextlib.nullcontext(), distribution=distribution, device="cpu")
        passes.__dict__["roles"] = roles
        deviations.append(passes.drawn[1])
    assert 0 < deviations[0] < SURPRISE < deviations[1]


@pytest.mark.parametrize(("off", "passed"), [(0.119, True), (0.121, False)])
def test_deep_models_may_differ_by_three_times_their_rounding(off: float, passed: bool, sheet: Sheet) -> None:
    """Catches: sound runs of deep models in bf16 accused, and a limit that is wider than what was measured."""
    passes = Examination(sheet, with_models=False).passes
    passes.dtype = "bfloat16"
    passes.__dict__["_roundings"] = {"policy": 0.04}
    expected = [passes._recorded("logprobs", [row]) + off for row in passes.few]
    assert passes._compared(quantities.OLD_LOGPROBS, "logprobs", expected, passes.few).passed == passed


def test_rounding_is_what_a_finer_type_changes(sheet: Sheet) -> None:
    """Catches: a rounding that is measured between two passes of one type."""
    passes = Examination(sheet, with_models=False).passes
    passes.dtype = "bfloat16"
    passes.__dict__["roles"] = SimpleNamespace(
        device="cpu",
        value_role=lambda: "value",
        role=contextlib.nullcontext,
        in_type=lambda model, name: contextlib.nullcontext(0.0 if name == "float32" else 1.0),
        logprobs=lambda model, batch, temperature: torch.full(batch.real.shape, 0.046 * model),
        values=lambda model, batch: torch.full(batch.real.shape, 0.2 * model),
    )
    assert passes.rounding("ref_logprobs") == passes.rounding("logprobs") == pytest.approx(0.046, rel=1e-6)
    assert passes.rounding("values") == pytest.approx(0.2, rel=1e-6)
    passes.dtype = "float64"
    assert passes.rounding("logprobs") == 0


@pytest.mark.parametrize(("update", "factor", "is_left_out"), [(3, 0.999, False), (3, 1.001, True), (1, 1.001, False)])
def test_gradients_of_large_models_are_computed_at_the_first_update(
    update: int, factor: float, is_left_out: bool, sheet: Sheet
) -> None:
    """Catches: audits that cost as much as an update, again and again."""
    passes = Examination(sheet, with_models=False).passes
    tokens = sum(len(passes.prompts[row]) + len(passes.responses[row]) for row in passes.rows)
    facts = {**copy.deepcopy(sheet.facts), "model_bytes": factor * LATER_GRADIENT / tokens}
    altered = Sheet(update, facts, sheet.tensors)
    assert Passes(altered, passes.prompts, passes.responses, with_models=False).too_long == is_left_out
