"""Every limit of the preflight: a value just inside passes, one just outside fails.

Values are computed from the limit in the code; docs/doctor.md holds the number itself, and is held against it here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.config import SFTConfig
from rlhf.doctor.preflight import models, room, supervised
from rlhf.doctor.preflight import ppo as ppo_checks
from rlhf.doctor.preflight.check import Check
from rlhf.doctor.preflight.pretrain import check_causal
from rlhf.models.compute import Compute
from rlhf.models.reward_model import ScalarHead
from rlhf.ppo import forward
from rlhf.ppo.trainer import RATIO_TOLERANCE
from rlhf.reward.parity import REORDERED

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PAGE = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")


def assert_limit(check: Callable[[float], Check], limit: float) -> None:
    """Asserts that a difference of 1% less than the limit passes, and one of 1% more fails."""
    assert check(0.99 * limit).passed
    assert not check(1.01 * limit).passed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.5, 4.0])
def test_a_probe_may_be_off_by_rounding(dtype: torch.dtype, size: float) -> None:
    """Catches: a parent that loads as another model, or is refused for rounding; a limit that large scores do not raise."""

    def probe(difference: float, stored: str = "", merged: bool = False) -> Check:
        values = torch.tensor([size - difference, size], dtype=torch.float64)
        name = stored or str(dtype).removeprefix("torch.")
        return models.check_probe("sft/a", values, [size, size], name, Compute(CPU, dtype), merged=merged)

    scale, other = max(1.0, size), models.ROUNDING_ACROSS_DTYPES
    assert_limit(probe, models.ROUNDING[dtype] * scale)
    assert_limit(lambda d: probe(d, "float16"), other * scale)
    # An adapter inside bf16 weights was rounded once more.
    merged = other if dtype == torch.bfloat16 else models.ROUNDING[dtype]
    assert_limit(lambda d: probe(d, merged=True), merged * scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_may_change_a_share_of_the_adapter(dtype: torch.dtype) -> None:
    """Catches: an adapter merged with another scale that passes, and whole models that are held to the share of nothing."""
    unmerged = torch.zeros(4, dtype=torch.float64)

    def merged(effect: float) -> Callable[[float], Check]:
        return lambda d: models.check_merged(unmerged, unmerged - d, unmerged + effect, Compute(CPU, dtype), "outputs")

    assert_limit(merged(3.0), 3.0 * models.MERGING_SHARE[dtype])
    for small in (0.0, models.ROUNDING[dtype]):  # of whole models, and where the scores hardly change by chance
        assert_limit(merged(small), models.ROUNDING[dtype])


def test_outputs_after_reloading_are_equal(tmp_path: Path) -> None:
    """Catches: a tensor that is lost on the way to the file and back."""

    def reload(difference: float) -> Check:
        outputs = iter([torch.zeros(2), torch.ones(2), torch.tensor([0.0, -difference])])
        return models.check_reload({}, lambda folder: None, lambda folder: None, lambda: next(outputs), tmp_path)

    assert_limit(reload, models.EQUAL_WITHIN)


def test_logits_before_a_changed_token_are_equal() -> None:
    """Catches: a model that sees a little of what comes."""
    ids = torch.zeros(1, 8, dtype=torch.long)

    class SeesAhead:
        config = SimpleNamespace(vocab_size=2)

        def __init__(self, size: float) -> None:
            self.size = size

        def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=self.size * input_ids[:, -1:, None].expand(1, 7, 2).double())

    assert_limit(lambda size: check_causal(SeesAhead(size), ids), models.EQUAL_WITHIN)


def test_scores_may_depend_on_the_batch_by_rounding() -> None:
    """Catches: a score that sees its neighbours a little."""
    head = ScalarHead(4, bias=False, dtype=torch.float32)
    head.weight.data = torch.tensor([[1.0, -1.0, 1.0, -1.0]])  # scores 0; of size 2 in other directions
    head.requires_grad_(False)

    def raw(rows: list[list[int]]) -> torch.Tensor:
        return head(torch.ones(len(rows), 4)).squeeze(-1)

    def check(off: float) -> Check:
        scorer: Any = SimpleNamespace(
            model=torch.nn.Sequential(head),
            compute=Compute(CPU, torch.float32),
            raw=raw,
            raw_padded=lambda rows, left, right: raw(rows) + 2 * off,
        )
        return supervised.check_batch_independence(scorer, [[1], [2]])

    assert_limit(check, REORDERED[torch.float32])


def test_noise_of_fresh_adapters_is_small() -> None:
    """Catches: noise that hides what an adapter does, or a perturbation too small to show that it was lost."""
    zeros = torch.nn.Parameter(torch.zeros(100, 100))
    with models.noise_in_zeros({"a": zeros}):
        assert float(zeros.detach().std()) == pytest.approx(models.NOISE, rel=0.05)
    assert f"a little noise (spread {models.NOISE:g})" in PAGE


def test_optimiser_states_of_large_tensors_are_not_tried() -> None:
    """Catches: a preflight that copies an embedding of gigabytes, and one that looks at no tensor."""
    sizes: list[int] = []

    def make(copies: list[Any]) -> torch.optim.Optimizer:
        sizes.extend(copy.numel() for copy in copies)
        return torch.optim.AdamW(copies)

    limit = models.LARGEST_COPY
    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in (limit, limit + 1)]
    models.check_optimizer(parameters, make, smallest=None)
    assert sizes == [limit]


# ---- room -----------------------------------------------------------------------------------------------------------

CONFIG = SFTConfig(name="n", dataset="d", model_name_or_path="m", optim="adamw_torch")
#: 4,000 bytes, and 8,000 of Adam's states.
WEIGHTS = [torch.nn.Parameter(torch.zeros(1000))]


def test_the_disk_must_hold_checkpoints_and_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an estimate without the checkpoint that is being written, or without the copy in the registry."""

    def check(free: int, at_registry: int = 10**12) -> bool:
        places = {tmp_path / "run": free, tmp_path / "registry": at_registry}
        monkeypatch.setattr(room.shutil, "disk_usage", lambda place: SimpleNamespace(free=places[place]))
        return room.check_disk(WEIGHTS, CONFIG, *places).passed

    for folder in ("run", "registry"):
        (tmp_path / folder).mkdir()
    need = room.CHECKPOINTS * 12_000 + room.RESULTS * 4_000 + room.OTHER_FILES
    assert check(need) and not check(need - 1)
    assert check(need, 4_000) and not check(need, 3_999)


@pytest.mark.parametrize(("cache", "moving"), [(0, 70 * 11), (10_000, 10_000)])
def test_memory_must_hold_states_and_activations(cache: int, moving: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an estimate without gradients or states, or with the smaller of activations and keys and values."""

    def check(free: int) -> bool:
        monkeypatch.setattr(room.memory, "free_bytes", lambda device: free)
        return room.check_memory(WEIGHTS, CONFIG, CPU, activations=70.0, tokens=11, cache=cache).passed

    need = 4_000 + 8_000 + moving
    assert check(need) and not check(need - 1)


def test_states_in_8_bits_take_a_byte() -> None:
    """Catches: an estimate of 32 bits for all, or of 8 bits for tensors that are too small for it."""
    large, small = (torch.nn.Parameter(torch.zeros(size)) for size in (4096, 4095))
    eight = SFTConfig(name="n", dataset="d", model_name_or_path="m", optim="adamw_8bit")
    assert room.optimizer_bytes([large], eight) == 2 * 4096
    assert room.optimizer_bytes([small], eight) == 2 * 4095 * 4
    assert room.optimizer_bytes([large], CONFIG) == 2 * 4096 * 4


# ---- PPO ------------------------------------------------------------------------------------------------------------


class FakeRollout(SimpleNamespace):
    """A rollout of one response."""

    def __len__(self) -> int:
        return 1


@torch.no_grad()
def test_the_fresh_policy_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a reference that is another model by a little, such as one adapter in another type."""

    def check(difference: float) -> Check:
        planes = torch.zeros(4, 1, 2, dtype=torch.float64)
        planes[1, 0, 1] = difference
        monkeypatch.setattr(forward, "compared_logprobs", lambda *_: planes)
        mask: Any = FakeRollout(mask=torch.ones(1, 2, dtype=torch.bool))
        return ppo_checks._check_reference(SimpleNamespace(), mask, 1.0)  # type: ignore[arg-type]

    assert_limit(check, ppo_checks.STEP_0)


class FakeModels:
    """Models whose roles are all the same."""

    @contextlib.contextmanager
    def merged_policy(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def role(self, name: str) -> Iterator[None]:
        yield


@pytest.mark.parametrize("likely", [True, False])
def test_sampled_tokens_surprise_by_their_entropy(likely: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a sampler that cuts the distribution a little, to the likely tokens or to the rare ones.

    With probabilities p and q of two tokens, n tokens of the first kind are sqrt(n q / p) standard deviations off.
    """
    count = 100

    def check(deviations: float) -> Check:
        p = 1 / (1 + deviations**2 / count)
        logprobs = torch.tensor([[p, 1 - p]], dtype=torch.float64).log().expand(count, 2)
        assert (p > 0.5) == likely
        return sampled(logprobs, gap=0.0)

    def sampled(logprobs: torch.Tensor, gap: float) -> Check:
        monkeypatch.setattr(ppo_checks, "_distributions", lambda *_: logprobs)
        first = logprobs[:, 0][None]
        rollout: Any = FakeRollout(
            mask=torch.ones(1, len(logprobs), dtype=torch.bool),
            responses=torch.zeros(1, len(logprobs), dtype=torch.long),
            logprobs=first,
            ref_logprobs=first,
            sampler_logprobs=first - gap,
        )
        context: Any = SimpleNamespace(compute=Compute(CPU, torch.float32))
        return ppo_checks._check_sampler(context, FakeModels(), rollout, 1.0)[1]  # type: ignore[arg-type]

    if not likely:
        count = 20  # sqrt(20) is less than the limit, so the first token is the rarer one
    assert_limit(check, ppo_checks.SURPRISE)
    even = torch.full((count, 2), 0.5, dtype=torch.float64).log()
    assert_limit(lambda gap: sampled(even, gap), models.ROUNDING[torch.float32])


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_limits_of_the_code() -> None:
    """Catches: a limit that is loosened without the page."""
    rounding, merging = models.ROUNDING, models.MERGING_SHARE
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    cells = [line.split("|") for line in PAGE.split("## Preflight")[1].splitlines() if line.startswith("| ")]
    limits = {cell[1].strip(): cell[4].strip() for cell in cells}
    share = f"a share of what the adapter does: {merging[bf16]:.0%} in bf16, {merging[fp32]:.0%} in fp32, "
    assert limits["merged equals unmerged"] == f"{share}{merging[fp64]:g} in fp64; at least rounding"
    assert limits["adapter and head reload"] == f"{models.EQUAL_WITHIN:g}"
    assert limits["policy is the reference at step 0"] == f"{ppo_checks.STEP_0:g} nats"
    own = f"{RATIO_TOLERANCE[bf16]:g} in bf16, {RATIO_TOLERANCE[fp32]:g} in fp32"
    assert limits["first ratio is 1"] == f"that of the run itself: {own}"
    surprise = f"{ppo_checks.SURPRISE:g} standard deviations"
    assert limits["the sampler's distribution is the scored one"] == f"{surprise}; and as much as merging may change"
    shares = [f"{100 * REORDERED[dtype]:g}%" for dtype in (bf16, fp32, fp64)]
    batch = f"{shares[0]} of their size in bf16, {shares[1]} in fp32, {shares[2]} in fp64 (root mean square)"
    assert limits["score independent of batch and padding"].startswith(batch)
    needs = f"{room.CHECKPOINTS} checkpoints, {room.RESULTS} copies of the result and {room.OTHER_FILES // 10**6} MB"
    assert needs in PAGE
    assert f"copies, of tensors up to {models.LARGEST_COPY:,} elements" in PAGE
    text = (
        f"*Rounding* is {rounding[bf16]:g} in bf16, {rounding[fp32]:g} in fp32 and {rounding[fp64]:g} in fp64, in nats"
    )
    assert text in PAGE and f"{models.ROUNDING_ACROSS_DTYPES:g} where the parent was trained in another type" in PAGE
