"""The maths of PPO against oracles in plain Python floats, hand-checked values, and what must not change a result.

The functions are called through copies whose arguments and results jaxtyping and beartype check against the shapes
in their docstrings (`checked`); only the tests of `ValueError` call them bare.
"""

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, Shaped, jaxtyped
from torch import Tensor

from rlhf.models import logprobs
from rlhf.ppo import functional

SCALAR, ROW, GRID, MASK = Float[Tensor, ""], Float[Tensor, "B"], Float[Tensor, "B R"], Bool[Tensor, "B R"]
PAIR = tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]  # noqa: F722, which takes the shape for an annotation
LOSS = tuple[Float[Tensor, "B R"], Bool[Tensor, "B R"]]  # noqa: F722
ANY, TOKENS, LOGITS = Float[Tensor, "*lead"], Int[Tensor, "*lead"], Float[Tensor, "*lead V"]


def checked(function: Callable[..., Any], result: Any, /, **arguments: Any) -> Any:
    """A copy of the function with these annotations, checked on every call."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    copy.__annotations__ = {**arguments, "return": result}
    return jaxtyped(copy, typechecker=beartype)


masked_sum = checked(functional.masked_sum, Float[Tensor, "..."], x=Shaped[Tensor, "B R"], mask=MASK)
masked_mean = checked(functional.masked_mean, Float[Tensor, "..."], x=Shaped[Tensor, "B R"], mask=MASK)
whiten = checked(functional.whiten, GRID, x=GRID, mask=MASK)
explained_variance = checked(functional.explained_variance, SCALAR, values=GRID, returns=GRID, mask=MASK)
sequence_logprobs = checked(logprobs.sequence_logprobs, ANY, logits=LOGITS, tokens=TOKENS, temperature=float)
log_distribution = checked(logprobs.log_distribution, LOGITS, logits=LOGITS, temperature=float)
of_distribution = {
    "entropy": checked(functional.entropy, ANY, log_pi=LOGITS),
    "full_kl": checked(functional.full_kl, ANY, log_pi=LOGITS, log_ref=LOGITS),
}
kl_k1 = checked(functional.kl_k1, ANY, logprobs=ANY, ref_logprobs=ANY)
kl_k3 = checked(functional.kl_k3, ANY, logprobs=ANY, ref_logprobs=ANY)
token_rewards = checked(
    functional.token_rewards, GRID, scores=ROW, logprobs=GRID, ref_logprobs=GRID, mask=MASK, kl_coef=float
)
gae = checked(functional.gae, PAIR, values=GRID, rewards=GRID, mask=MASK, gamma=float, lam=float)
policy_loss = checked(
    functional.policy_loss,
    LOSS,
    logprobs=GRID,
    old_logprobs=GRID,
    advantages=GRID,
    mask=MASK,
    clip_range=float,
)
value_loss = checked(
    functional.value_loss,
    LOSS,
    values=GRID,
    old_values=GRID,
    returns=GRID,
    mask=MASK,
    clip_range_value=float,
)


def prefix_mask(lengths: Tensor, size: int) -> Tensor:
    """The mask of rows with these many tokens."""
    return torch.arange(size) < lengths[:, None]


LENGTHS = [1, 4, 3]  # the first response is its stop token alone, the second fills the padding
MASKED = prefix_mask(torch.tensor(LENGTHS), 4)


def grid(seed: int, size: int = 4) -> Tensor:
    """Random numbers (3, size)."""
    return torch.randn(len(LENGTHS), size, generator=torch.Generator().manual_seed(seed))


def full(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def close(actual: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal within the tolerance (absolute and relative), shape included; `expected` is numbers."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=tolerance, atol=tolerance)


# ---- every function with a mask, as data ----------------------------------------------------------------------------

# name -> what is called on (inputs, mask), each input (B, R); and how many inputs. Results are (B, R) or scalars.
Case = tuple[Callable[..., Any], int]
CASES: dict[str, Case] = {
    "gae": (lambda x, m: gae(x[0], x[1], m, gamma=0.9, lam=0.8), 2),
    "whiten": (lambda x, m: whiten(x[0], m), 1),
    "token_rewards": (lambda x, m: token_rewards(x[0][:, 0], x[1], x[2], m, kl_coef=0.1), 3),
    "policy_loss": (lambda x, m: policy_loss(x[0], x[1], x[2], m, clip_range=0.2), 3),
    "value_loss": (lambda x, m: value_loss(x[0], x[1], x[2], m, clip_range_value=0.2), 3),
    "explained_variance": (lambda x, m: explained_variance(x[0], x[1], m), 2),
    "masked_mean": (lambda x, m: masked_mean(x[0], m), 1),
    "masked_sum": (lambda x, m: masked_sum(x[0], m), 1),
    "k1 summed": (lambda x, m: masked_sum(kl_k1(x[0], x[1]), m), 2),
    "k3 summed": (lambda x, m: masked_sum(kl_k3(x[0], x[1]), m), 2),
}
DIFFERENTIABLE = ["whiten", "policy_loss", "value_loss", "masked_mean", "masked_sum"]


def outputs(case: Case, inputs: list[Tensor], mask: Tensor) -> tuple[Tensor, ...]:
    result = case[0](inputs, mask)
    return result if isinstance(result, tuple) else (result,)


def gradients(case: Case, inputs: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Of a sum with unequal weights, padding included, so that only the function's own mask can zero a position."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = outputs(case, inputs, mask)[0]
    weights = torch.arange(1.0, loss.numel() + 1).view_as(loss)
    grads = torch.autograd.grad((loss * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", CASES)
def test_nothing_under_the_mask_reaches_a_result(name: str, bad: float) -> None:
    """Catches: multiplying by the mask (0 * NaN = NaN), a sum over padding, a result that is not zeroed there."""
    clean = [grid(seed) for seed in range(CASES[name][1])]
    expected = outputs(CASES[name], clean, MASKED)
    for which in range(len(clean)):
        for row, column in (~MASKED).nonzero().tolist():
            poisoned = [x.clone() for x in clean]
            poisoned[which][row, column] = bad
            for actual, wanted in zip(outputs(CASES[name], poisoned, MASKED), expected, strict=True):
                assert torch.equal(actual, wanted)
                assert torch.isfinite(actual).all()
                assert actual.ndim == 0 or not actual[~MASKED].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_nothing_under_the_mask_reaches_a_gradient(name: str, bad: float) -> None:
    """Catches: `where` after the arithmetic instead of before, whose backward is 0 * NaN; a gradient at padding."""
    clean = [grid(seed) for seed in range(CASES[name][1])]
    expected = gradients(CASES[name], clean, MASKED)
    assert any(g.any() for g in expected)
    for which in range(len(clean)):
        for row, column in (~MASKED).nonzero().tolist():
            poisoned = [x.clone() for x in clean]
            poisoned[which][row, column] = bad
            for actual, wanted in zip(gradients(CASES[name], poisoned, MASKED), expected, strict=True):
                assert torch.equal(actual, wanted)
                assert torch.isfinite(actual).all()
                assert not actual[~MASKED].any()


@pytest.mark.parametrize("name", CASES)
def test_nan_at_a_real_token_is_seen(name: str) -> None:
    """Catches: a `nan_to_num` or a degenerate-case branch that turns a broken model into a quiet zero."""
    for which in range(CASES[name][1]):
        poisoned = [grid(seed) for seed in range(CASES[name][1])]
        poisoned[which][1, 0] = math.nan
        assert any(actual.isnan().any() for actual in outputs(CASES[name], poisoned, MASKED))


@pytest.mark.parametrize("name", CASES)
def test_more_padding_changes_nothing(name: str) -> None:
    """Catches: bootstrapping from padding, a score at the last column, a denominator of B * R."""
    short = [grid(seed) for seed in range(CASES[name][1])]
    long = [torch.cat([x, torch.full((3, 3), 1e6)], dim=1) for x in short]
    wide = torch.cat([MASKED, torch.zeros(3, 3, dtype=torch.bool)], dim=1)
    for actual, wanted in zip(outputs(CASES[name], long, wide), outputs(CASES[name], short, MASKED), strict=True):
        close(actual[:, :4] if actual.ndim else actual, wanted.double())
        assert actual.ndim == 0 or not actual[:, 4:].any()


@pytest.mark.parametrize("name", CASES)
def test_row_order_changes_nothing(name: str) -> None:
    """Catches: one row's length or score used for another, state carried from row to row."""
    order = torch.tensor([2, 0, 1])
    inputs = [grid(seed) for seed in range(CASES[name][1])]
    expected = outputs(CASES[name], inputs, MASKED)
    moved = outputs(CASES[name], [x[order] for x in inputs], MASKED[order])
    for actual, wanted in zip(moved, expected, strict=True):
        close(actual, (wanted[order] if wanted.ndim else wanted).double())


@pytest.mark.parametrize("name", ["gae", "token_rewards", "policy_loss", "value_loss", "k1 summed", "k3 summed"])
def test_other_rows_change_nothing(name: str) -> None:
    """Catches: a single row (B = 1) treated differently from the same row in a batch."""
    inputs = [grid(seed) for seed in range(CASES[name][1])]
    whole = outputs(CASES[name], inputs, MASKED)
    alone = [outputs(CASES[name], [x[b : b + 1] for x in inputs], MASKED[b : b + 1]) for b in range(3)]
    for together, *apart in zip(whole, *alone, strict=True):
        close(together, (torch.cat(apart) if together.ndim else torch.stack(apart).sum()).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_low_precision_is_raised_before_the_arithmetic(name: str, dtype: torch.dtype) -> None:
    """Catches: GAE, ratios or sums in bf16, of which 3 decimal digits would be left."""
    inputs = [grid(seed).to(dtype) for seed in range(CASES[name][1])]
    raised = outputs(CASES[name], [x.float() for x in inputs], MASKED)
    for actual, wanted in zip(outputs(CASES[name], inputs, MASKED), raised, strict=True):
        assert actual.dtype in (torch.float32, torch.bool)
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("name", CASES)
def test_float64_stays(name: str) -> None:
    """Catches: `.float()`, which would lower a float64 oracle or gradient check to 7 digits."""
    inputs = [grid(seed).double() for seed in range(CASES[name][1])]
    assert all(actual.dtype in (torch.float64, torch.bool) for actual in outputs(CASES[name], inputs, MASKED))


def test_inputs_are_not_mutated() -> None:
    """Catches: an in-place fill that alters the rollout for the next epoch."""
    for case in CASES.values():
        inputs, mask = [grid(seed) for seed in range(case[1])], MASKED.clone()
        outputs(case, inputs, mask)
        assert all(torch.equal(x, grid(seed)) for seed, x in enumerate(inputs))
        assert torch.equal(mask, MASKED)


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_masked_sum_and_mean_by_hand() -> None:
    """Catches: dividing by B * R or by the padded length; the wrong dimension."""
    x, mask = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]), prefix_mask(torch.tensor([2, 1]), 3)
    close(masked_sum(x, mask), 6.0)
    close(masked_sum(x, mask, dim=1), [3.0, 3.0])
    close(masked_mean(x, mask), 2.0)


def test_masked_mean_of_booleans() -> None:
    """Catches: a clip fraction that counts padding, or integer arithmetic."""
    x, mask = torch.tensor([[True, False, True], [True, True, True]]), prefix_mask(torch.tensor([2, 1]), 3)
    close(masked_mean(x, mask), 2 / 3)


def test_any_split_into_microbatches_gives_the_token_mean_and_its_gradient() -> None:
    """Catches: a masked mean per microbatch, which weighs a token of the short one more (3.125 and not 3.6667)."""
    loss = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 5.0, 7.0]], requires_grad=True)
    mask = prefix_mask(torch.tensor([2, 4]), 4)
    count = mask.sum()
    whole = masked_sum(loss, mask) / count
    parts = [masked_sum(loss[b : b + 1], mask[b : b + 1]) / count for b in range(2)]
    close(whole, 22 / 6)
    close(parts[0] + parts[1], 22 / 6)
    close((masked_mean(loss[:1], mask[:1]) + masked_mean(loss[1:], mask[1:])) / 2, 3.125)
    (at_once,) = torch.autograd.grad(whole, loss)
    (in_parts,) = torch.autograd.grad(parts[0] + parts[1], loss)
    assert torch.equal(at_once, in_parts)
    close(at_once, mask.double() / 6)


# ---- whitening and explained variance -------------------------------------------------------------------------------


def test_whiten_is_the_definition() -> None:
    """Catches: ddof 1, a mean per row, padding in the moments, the mean added back."""
    x = grid(0)
    kept = [x[b, t].item() for b, n in enumerate(LENGTHS) for t in range(n)]
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((k - mean) ** 2 for k in kept) / len(kept))
    expected = [[(x[b, t].item() - mean) / std if t < n else 0.0 for t in range(4)] for b, n in enumerate(LENGTHS)]
    close(whiten(x, MASKED), expected)


def test_whiten_by_hand() -> None:
    """Catches: ddof 1, which would give +-.7071."""
    close(whiten(torch.tensor([[1.0, 3.0, 50.0]]), prefix_mask(torch.tensor([2]), 3)), [[-1.0, 1.0, 0.0]])


@pytest.mark.parametrize("value", [0.0, 0.1, -1e3])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_whiten_of_equal_elements_is_zero(value: float, size: int) -> None:
    """Catches: 0 / 0, and rounding (7 times 0.1 has a variance of 6e-17) blown up to +-1; NaN in the gradient."""
    x = torch.full((1, size), value, requires_grad=True)
    result = whiten(x, full(1, size))
    assert torch.equal(result, torch.zeros(1, size))
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert torch.isfinite(gradient).all()


def test_whiten_of_small_advantages_is_exact() -> None:
    """Catches: an epsilon of 1e-8 under the root, which shrinks advantages of 1e-5 to a tenth."""
    close(whiten(torch.tensor([[1e-5, 3e-5]]), full(1, 2)), [[-1.0, 1.0]])


def test_explained_variance_by_hand() -> None:
    """Catches: the mean square of the residual for its variance; returns and values exchanged; padding counted."""
    mask = prefix_mask(torch.tensor([3]), 4)
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])  # Var 2/3
    close(explained_variance(returns, returns, mask), 1.0)
    close(explained_variance(returns + 5, returns, mask), 1.0)  # a constant offset is not unexplained variance
    close(explained_variance(torch.zeros(1, 4), returns, mask), 0.0)
    close(explained_variance(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), returns, mask), 2 / 3)  # residual 0 0 1, Var 2/9
    close(explained_variance(-returns, returns, mask), -3.0)  # residual 2 4 6


@pytest.mark.parametrize("size", [1, 7])
def test_explained_variance_of_equal_returns_is_zero(size: int) -> None:
    """Catches: NaN or -1e15 in the log when every return is the same."""
    values = torch.arange(float(size)).unsqueeze(0)
    assert explained_variance(values, torch.full((1, size), 0.1), full(1, size)).item() == 0.0


# ---- log-probabilities and KL ---------------------------------------------------------------------------------------


def entropy(logits: Tensor, *, temperature: float) -> Tensor:
    return of_distribution["entropy"](log_distribution(logits, temperature=temperature))


def full_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float) -> Tensor:
    log_pi, log_ref = (log_distribution(x, temperature=temperature) for x in (logits, ref_logits))
    return of_distribution["full_kl"](log_pi, log_ref)


def log_softmax(logits: list[float], temperature: float) -> list[float]:
    scaled = [x / temperature for x in logits]
    total = math.fsum(math.exp(x) for x in scaled)
    return [x - math.log(total) for x in scaled]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_vocabulary_functions_are_the_definitions(temperature: float) -> None:
    """Catches: temperature left out, multiplied, or on one side only; KL(ref || pi); a sign; another token gathered."""
    logits, ref_logits, tokens = grid(0, 5) * 3, grid(1, 5) * 3, torch.tensor([4, 0, 2])
    for row in range(3):
        ours = log_softmax(logits[row].tolist(), temperature)
        refs = log_softmax(ref_logits[row].tolist(), temperature)
        close(sequence_logprobs(logits, tokens, temperature=temperature)[row], ours[int(tokens[row])])
        close(entropy(logits, temperature=temperature)[row], -sum(math.exp(a) * a for a in ours))
        exact = sum(math.exp(a) * (a - b) for a, b in zip(ours, refs, strict=True))
        close(full_kl(logits, ref_logits, temperature=temperature)[row], exact)


def test_vocabulary_functions_by_hand() -> None:
    """Catches: bits for nats (log 2 is .6931), a mean over the vocabulary for a sum."""
    even, skewed = torch.zeros(2), torch.tensor([3.0, 1.0]).log()  # probabilities 1/2 1/2 and 3/4 1/4
    close(entropy(even, temperature=1.0), math.log(2))
    close(entropy(skewed, temperature=1.0), 0.562335)
    close(sequence_logprobs(skewed, torch.tensor(1), temperature=1.0), -math.log(4))
    close(full_kl(even, skewed, temperature=1.0), 0.143841)
    close(full_kl(skewed, even, temperature=1.0), 0.130812)
    assert full_kl(skewed, skewed, temperature=1.0).item() == 0.0


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_leading_shapes(lead: tuple[int, ...]) -> None:
    """Catches: a fixed number of dimensions, a sum or gather along the wrong one."""
    logits = torch.randn(*lead, 5, generator=torch.Generator().manual_seed(0))
    assert sequence_logprobs(logits, torch.zeros(lead, dtype=torch.int64), temperature=1.0).shape == lead
    assert entropy(logits, temperature=1.0).shape == full_kl(logits, logits, temperature=1.0).shape == lead


def test_logits_are_raised_before_the_softmax() -> None:
    """Catches: log-softmax in bf16, and float64 lowered."""
    logits, ref_logits, tokens = grid(0, 50).bfloat16(), grid(1, 50).bfloat16(), torch.tensor([4, 0, 2])
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda x: sequence_logprobs(x, tokens, temperature=0.7), (logits,)),
        (lambda x: entropy(x, temperature=0.7), (logits,)),
        (lambda x, y: full_kl(x, y, temperature=0.7), (logits, ref_logits)),
        (kl_k3, (logits, ref_logits)),
    ]
    for function, arguments in cases:
        low = function(*arguments)
        assert low.dtype == torch.float32
        assert torch.equal(low, function(*(x.float() for x in arguments)))
        assert function(*(x.double() for x in arguments)).dtype == torch.float64


def test_extreme_logits_stay_finite() -> None:
    """Catches: exp before the maximum is taken out (overflow at 89 in fp32)."""
    logits, tokens = torch.tensor([[200.0, 0.0], [-200.0, -200.0]]), torch.tensor([0, 1])
    close(sequence_logprobs(logits, tokens, temperature=1.0), [0.0, -math.log(2)], 2e-5)  # one fp32 step at 200
    close(entropy(logits, temperature=1.0), [0.0, math.log(2)])


def test_a_token_that_cannot_be_drawn() -> None:
    """Catches: 0 * -inf = NaN in entropy or KL, forwards or backwards, when a token is banned by a logit of -inf."""
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    ref_logits = torch.tensor([[0.0, 0.0, -math.inf]])
    values = [
        entropy(logits, temperature=1.0),
        full_kl(logits, ref_logits, temperature=1.0),
        full_kl(logits, torch.zeros(1, 3), temperature=1.0),
        sequence_logprobs(logits, torch.tensor([0]), temperature=1.0),
    ]
    close(torch.cat(values), [math.log(2), 0.0, math.log(1.5), -math.log(2)])
    (gradient,) = torch.autograd.grad(torch.cat(values).sum(), logits)
    assert torch.isfinite(gradient).all()
    assert full_kl(torch.zeros(1, 3), ref_logits, temperature=1.0).item() == math.inf


def test_positions_do_not_mix() -> None:
    """Catches: a maximum or sum taken over the batch, through which one NaN position would reach the others."""
    logits, ref_logits, tokens = grid(0, 5), grid(1, 5), torch.tensor([4, 0, 2])
    broken = logits.clone()
    broken[1] = math.nan
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: sequence_logprobs(x, tokens, temperature=1.0),
        lambda x: entropy(x, temperature=1.0),
        lambda x: full_kl(x, ref_logits, temperature=1.0),
        lambda x: kl_k3(x, ref_logits),
    ]
    for function in functions:
        assert torch.equal(function(broken)[[0, 2]], function(logits)[[0, 2]])


def test_logprob_gradient_is_one_hot_minus_softmax() -> None:
    """Catches: a detached log-sum-exp, or a temperature missing from the gradient."""
    logits = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
    (gradient,) = torch.autograd.grad(sequence_logprobs(logits, torch.tensor([0]), temperature=1.0), logits)
    close(gradient, [[0.25, -0.25]])
    (gradient,) = torch.autograd.grad(sequence_logprobs(logits, torch.tensor([0]), temperature=0.5), logits)
    close(gradient, [[0.2, -0.2]])  # probabilities 9/10 1/10, times 1 / temperature


def test_kl_estimators_by_hand() -> None:
    """Catches: the sign of the ratio inside k3 (would exchange its two values)."""
    logprobs, ref_logprobs = torch.tensor([[-1.0, -1.2]]), torch.tensor([[-1.2, -1.0]])
    close(kl_k1(logprobs, ref_logprobs), [[0.2, -0.2]])
    close(kl_k3(logprobs, ref_logprobs), [[0.018731, 0.021403]], 1e-6)


def test_kl_estimators_average_to_the_exact_kl() -> None:
    """Catches: samples weighted the wrong way round: under pi, k1 and k3 have the exact KL(pi || ref) as their mean."""
    logits, ref_logits = grid(0, 6)[:1].double(), grid(1, 6)[:1].double()
    tokens = torch.arange(6)  # every token once, weighted by pi: the expectation itself, no sampling
    logprobs = sequence_logprobs(logits.expand(6, 6), tokens, temperature=1.0)
    ref_logprobs = sequence_logprobs(ref_logits.expand(6, 6), tokens, temperature=1.0)
    exact = full_kl(logits, ref_logits, temperature=1.0).item()
    for estimator in (kl_k1, kl_k3):
        close((logprobs.exp() * estimator(logprobs, ref_logprobs)).sum(), exact)


def test_k3_of_a_tiny_log_ratio() -> None:
    """Catches: exp(-k1) - 1 + k1 in fp32, which for a ratio of 1e-4 leaves noise, at times negative."""
    close(kl_k3(torch.tensor([1e-4]), torch.tensor([0.0])) * 1e8, [0.5], 1e-2)


# ---- rewards and advantages -----------------------------------------------------------------------------------------


def test_token_rewards_by_hand() -> None:
    """Catches: the score one later, at the last column or on every token; the KL added; no KL on the scored token."""
    logprobs = torch.tensor([[-1.0, -2.0, 7.0], [-1.0, 7.0, 7.0], [-1.0, -1.0, -1.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, -7.0], [-3.0, -7.0, -7.0], [-1.0, -1.0, -3.0]])
    mask = prefix_mask(torch.tensor([2, 1, 3]), 3)
    rewards = token_rewards(torch.tensor([10.0, 20.0, -30.0]), logprobs, ref_logprobs, mask, kl_coef=0.1)
    close(rewards, [[-0.05, 10.1, 0.0], [19.8, 0.0, 0.0], [0.0, 0.0, -30.2]])


def test_token_rewards_are_data() -> None:
    """Catches: a KL that is differentiated through the reward as well as logged."""
    logprobs = grid(0).requires_grad_()
    assert not token_rewards(grid(1)[:, 0], logprobs, grid(2), MASKED, kl_coef=0.1).requires_grad


def gae_by_double_sum(values: list[float], rewards: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over k >= t of (gamma lam)^(k-t) (r_k + gamma V_{k+1} - V_k), for one response without padding."""
    after = [*values[1:], 0.0]
    n = len(values)
    return [
        math.fsum((gamma * lam) ** (k - t) * (rewards[k] + gamma * after[k] - values[k]) for k in range(t, n))
        for t in range(n)
    ]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_gae_is_the_double_sum(gamma: float, lam: float) -> None:
    """Catches: gamma or lam in the wrong place, a shift by one, a value bootstrapped from padding."""
    values, rewards = grid(0), grid(1)
    advantages, returns = gae(values, rewards, MASKED, gamma=gamma, lam=lam)
    for row, n in enumerate(LENGTHS):
        kept = values[row, :n].tolist()
        expected = gae_by_double_sum(kept, rewards[row, :n].tolist(), gamma, lam)
        padding = [0.0] * (4 - n)
        close(advantages[row], expected + padding)
        close(returns[row], [a + v for a, v in zip(expected, kept, strict=True)] + padding)


@pytest.mark.parametrize(
    ("lam", "expected"), [(0.95, [0.43675, 0.565, 0.7]), (1.0, [0.5, 0.6, 0.7]), (0.0, [-0.1, -0.1, 0.7])]
)
@pytest.mark.parametrize("padding", [0, 2])
def test_gae_by_hand(lam: float, expected: list[float], padding: int) -> None:
    """Catches: a value after the last real token (gives .65 and not .70 there), lam and gamma exchanged."""
    values = torch.tensor([[0.5, 0.4, 0.3] + [9.0] * padding])
    rewards = torch.tensor([[0.0, 0.0, 1.0] + [9.0] * padding])
    advantages, returns = gae(values, rewards, prefix_mask(torch.tensor([3]), 3 + padding), gamma=1.0, lam=lam)
    close(advantages, [expected + [0.0] * padding])
    close(returns, [[a + v for a, v in zip(expected, [0.5, 0.4, 0.3], strict=True)] + [0.0] * padding])
    if lam == 0.95:
        close(returns[:, :3], [[0.93675, 0.965, 1.0]])


@pytest.mark.parametrize("padding", [0, 3])
def test_gae_of_a_single_token(padding: int) -> None:
    """Catches: a response whose first token stops it left without an advantage (a loop from R - 2, an empty slice)."""
    values, rewards = torch.full((1, 1 + padding), 0.3), torch.full((1, 1 + padding), 1.0)
    advantages, returns = gae(values, rewards, prefix_mask(torch.tensor([1]), 1 + padding), gamma=0.9, lam=0.8)
    close(advantages, [[0.7] + [0.0] * padding])
    close(returns, [[1.0] + [0.0] * padding])


def test_gae_gives_data() -> None:
    """Catches: returns that move with the value function they are the target of."""
    advantages, returns = gae(grid(0).requires_grad_(), grid(1), MASKED, gamma=1.0, lam=0.95)
    assert not advantages.requires_grad and not returns.requires_grad


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand() -> None:
    """Catches: min for max, a clip that ignores the sign of the advantage, a fraction of ratios out of range (1.0)."""
    logprobs = torch.tensor([[1.5, 0.5, 0.5, 1.5]]).log()
    advantages = torch.tensor([[1.0, -1.0, 2.0, -2.0]])
    loss, clipped = policy_loss(logprobs, torch.zeros(1, 4), advantages, full(1, 4), clip_range=0.2)
    close(loss, [[-1.2, 0.8, -1.0, 3.0]])
    close(masked_mean(loss, full(1, 4)), 0.4)
    assert clipped.tolist() == [[True, True, False, False]]
    close(masked_mean(clipped, full(1, 4)), 0.5)


def test_policy_loss_is_the_definition() -> None:
    """Catches: pi_old / pi for the ratio, a clip range of the log-ratio, a loss outside the mask."""
    logprobs, old_logprobs, advantages = grid(0), grid(1), grid(2)
    loss, clipped = policy_loss(logprobs, old_logprobs, advantages, MASKED, clip_range=0.3)
    for row, n in enumerate(LENGTHS):
        for t in range(4):
            ratio = math.exp(logprobs[row, t].item() - old_logprobs[row, t].item())
            plain = -advantages[row, t].item() * ratio
            held = -advantages[row, t].item() * min(max(ratio, 0.7), 1.3)
            close(loss[row, t], max(plain, held) if t < n else 0.0)
            assert clipped[row, t].item() == (t < n and held > plain)


def test_policy_loss_gradient_is_zero_where_clipped() -> None:
    """Catches: a clip that still pushes the ratio further out, or one that also stops it from coming back."""
    logprobs = torch.tensor([[1.5, 0.5, 0.5, 1.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 2.0, -2.0]])
    loss, clipped = policy_loss(logprobs, torch.zeros(1, 4), advantages, full(1, 4), clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    close(gradient, [[0.0, 0.0, -1.0, 3.0]])  # -A r where it is not clipped
    assert torch.equal(gradient == 0, clipped)


def test_policy_loss_on_the_first_minibatch_is_the_policy_gradient() -> None:
    """Catches: a gradient halved (or lost) at ratio 1, where both sides of the maximum are equal; clipfrac not 0."""
    logprobs, advantages = grid(0).requires_grad_(), grid(1)
    loss, clipped = policy_loss(logprobs, grid(0), advantages, MASKED, clip_range=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert torch.equal(gradient, torch.where(MASKED, -advantages, 0.0))
    assert not clipped.any()


def test_only_the_new_policy_gets_a_gradient() -> None:
    """Catches: old log-probabilities, advantages, old values or returns that keep a graph and are trained through."""
    inputs = [grid(seed).requires_grad_() for seed in range(3)]
    for name in ("policy_loss", "value_loss"):
        loss = outputs(CASES[name], inputs, MASKED)[0].sum()
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        assert [g is not None for g in grads] == [True, False, False]


def test_value_loss_by_hand() -> None:
    """Catches: the half missing, min for max, a clip around the return or the new value, an unclipped range of .5."""
    #           closer to the return | beyond it | past the range, away from it | inside the range
    values = torch.tensor([[1.0, 1.0, -1.0, 0.1]])
    old_values = torch.zeros(1, 4)
    returns = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    loss, clipped = value_loss(values, old_values, returns, full(1, 4), clip_range_value=0.2)
    close(loss, [[0.32, 0.5, 2.0, 0.405]])  # .5 of .8^2, 1^2, 2^2, .9^2
    assert clipped.tolist() == [[True, False, False, False]]


def test_value_loss_is_the_definition() -> None:
    """Catches: the clip around something else than the old value, which zeros in the hand-checked example hide."""
    values, old_values, returns = grid(0), grid(1), grid(2)
    loss, clipped = value_loss(values, old_values, returns, MASKED, clip_range_value=0.5)
    for row, n in enumerate(LENGTHS):
        for t in range(4):
            v, old, target = (x[row, t].item() for x in (values, old_values, returns))
            plain, held = (v - target) ** 2, (min(max(v, old - 0.5), old + 0.5) - target) ** 2
            close(loss[row, t], 0.5 * max(plain, held) if t < n else 0.0)
            assert clipped[row, t].item() == (t < n and held > plain)


def test_value_loss_gradient_is_zero_where_clipped() -> None:
    """Catches: a clamp that passes gradients on, or a maximum over detached errors."""
    values = torch.tensor([[1.0, 1.0, 0.1]], requires_grad=True)
    returns = torch.tensor([[1.0, 0.0, 1.0]])
    loss, clipped = value_loss(values, torch.zeros(1, 3), returns, full(1, 3), clip_range_value=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    close(gradient, [[0.0, 1.0, -0.9]])  # V - return where it is not clipped
    assert clipped.tolist() == [[True, False, False]]


def test_values_inside_the_range_are_not_clipped() -> None:
    """Catches: old + clamp(V - old), which differs from V by rounding and counts values inside the range as clipped."""
    noise = torch.rand(2, 1, 1000, generator=torch.Generator().manual_seed(0))
    values, old_values = 1e-3 * noise[0], 0.1 * noise[1]  # unequal sizes, where the sum rounds; all within the range
    assert not value_loss(values, old_values, torch.zeros(1, 1000), full(1, 1000), clip_range_value=0.2)[1].any()


# ---- errors ---------------------------------------------------------------------------------------------------------

NOT_BOOLEAN = torch.ones(3, 4)
HOLE = torch.tensor([[True, True, True, True], [True, False, True, False], [True, False, False, False]])
LEFT_PADDED = torch.tensor([[True, True, True, True], [True, True, True, True], [False, False, True, True]])
EMPTY_ROW = torch.tensor([[True, True, True, True], [False, False, False, False], [True, True, True, True]])

BARE: dict[str, Callable[[Tensor, Tensor], object]] = {  # the function called on (one of its inputs, mask)
    "gae": lambda x, m: functional.gae(grid(0), x, m, gamma=1.0, lam=1.0),
    "whiten": lambda x, m: functional.whiten(x, m),
    "token_rewards": lambda x, m: functional.token_rewards(torch.zeros(3), grid(0), x, m, kl_coef=0.1),
    "policy_loss": lambda x, m: functional.policy_loss(grid(0), grid(1), x, m, clip_range=0.2),
    "value_loss": lambda x, m: functional.value_loss(grid(0), grid(1), x, m, clip_range_value=0.2),
    "explained_variance": lambda x, m: functional.explained_variance(grid(0), x, m),
    "masked_mean": lambda x, m: functional.masked_mean(x, m),
    "masked_sum, dim": lambda x, m: functional.masked_sum(x, m, 1),
    "masked_sum": lambda x, m: functional.masked_sum(x, m),
}


@pytest.mark.parametrize("name", BARE)
def test_bad_masks_and_shapes_are_refused(name: str) -> None:
    """Catches: (3, 1) broadcast silently, an integer mask used as an index, a left-padded mask, an empty response."""
    for shape in ((3, 5), (3, 1), (1, 4), (4,)):
        with pytest.raises(ValueError, match=rf"\({shape[0]}, ?{'' if len(shape) == 1 else shape[1]}\).*\(3, 4\)"):
            BARE[name](torch.zeros(shape), MASKED)
    for mask, message in (
        (NOT_BOOLEAN, r"boolean.*float32 \(3, 4\)"),
        (HOLE, r"\(3, 4\): row 1 is not a prefix"),
        (LEFT_PADDED, r"\(3, 4\): row 2 is not a prefix"),
        (EMPTY_ROW, r"\(3, 4\): row 1 has no token"),
    ):
        with pytest.raises(ValueError, match=message):
            BARE[name](grid(0), mask)


def test_other_bad_inputs_are_refused() -> None:
    """Catches: scores (B, 1) broadcast to (B, B); logits shifted by one against tokens; 0 / 0 of an empty batch."""
    with pytest.raises(ValueError, match=r"scores has shape \(3, 1\), expected \(3,\)"):
        functional.token_rewards(torch.zeros(3, 1), grid(0), grid(1), MASKED, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"tokens has shape \(3, 3\), expected \(3, 4\)"):
        logprobs.sequence_logprobs(torch.zeros(3, 4, 9), torch.zeros(3, 3, dtype=torch.int64), temperature=1.0)
    with pytest.raises(ValueError, match=r"log_ref has shape \(3, 4\), expected \(3, 5\)"):
        functional.full_kl(grid(0, 5), grid(0))
    for estimator in (functional.kl_k1, functional.kl_k3):
        with pytest.raises(ValueError, match=r"ref_logprobs has shape \(3, 1\), expected \(3, 4\)"):
            estimator(grid(0), grid(0)[:, :1])
    with pytest.raises(ValueError, match=r"non-empty.*\(0, 4\)"):
        functional.masked_mean(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(B, R\).*\(4,\)"):
        functional.masked_sum(torch.zeros(4), full(4), 1)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            logprobs.log_distribution(grid(0), temperature=temperature)


def test_the_shape_check_can_fail() -> None:
    """Catches: `checked` checking nothing, which would leave every shape above untested."""
    wrong = checked(functional.whiten, ROW, x=GRID, mask=MASK)
    with pytest.raises(Exception, match="return"):
        wrong(grid(0), MASKED)
