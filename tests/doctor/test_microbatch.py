"""`microbatch_size: auto`: what is chosen against the memory that passes really hold, and where the choice is kept."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf.base.errors import UserError
from rlhf.config import PPOConfig, parse_config
from rlhf.doctor.plan import estimate, microbatch, phases
from rlhf.doctor.plan.estimate import CONTEXT, GPU_HELD, MARGIN, rehearse
from rlhf.doctor.plan.microbatch import fitting_microbatch, with_microbatch
from rlhf.doctor.plan.rates import Gpu
from rlhf.doctor.plan.work import Work, assumed_work
from rlhf.models.adapters import lora_config
from rlhf.models.compute import Compute, rehearsed_on
from rlhf.models.packing import pack_rows
from rlhf.models.roles import SharedModels
from rlhf.ppo.credit import Credit
from rlhf.ppo.gradients import accumulate

SHAPE = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
CONFIG = PPOConfig(name="x", dataset="none", reward=["math:sqrt"], total_episodes=64, response_length=32)
GPU = Compute(torch.device("cuda"), torch.float32)


def work() -> Work:
    return assumed_work(CONFIG, prompt_tokens=32, answer_tokens=32, rows=64)


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages alive at once, without those of some tensors that were there before."""

    def __init__(self, there: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in there}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, storage._cdata)
        return output

    def _release(self, key: int) -> None:
        self.now -= self.live.pop(key)


def measured(rows: int) -> int:
    """Bytes that a real pass of so many rows holds beside weights and gradients, on a GPU's ways."""
    base = AutoModelForCausalLM.from_config(SHAPE).requires_grad_(False)
    assert pack_rows(base)
    lora = lora_config(CONFIG, "CAUSAL_LM", dropout=0.0)
    models = SharedModels(base, lora, Compute(torch.device("cpu"), torch.float32))
    models.fresh_value(lora)
    models.train(False)
    batch = phases._rollout([([i % 256 for i in p], [i % 256 for i in a]) for p, a in work().largest(rows)])
    trained = [p for p in models.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    zeros = torch.zeros(batch.mask.shape)
    credit = Credit(advantages=zeros, returns=zeros, metrics={})
    there = [*models.parameters(), *models.buffers(), *(p.grad for p in trained if p.grad is not None)]
    for live in (LiveBytes(there), LiveBytes(there)):  # the first pass makes what lasts
        with rehearsed_on("cuda"), live:
            accumulate(models, CONFIG, batch, credit, [torch.arange(rows)], train_policy=True)
    return live.peak


@pytest.mark.parametrize("rows", [8, 32])
def test_what_fits_is_decided_by_what_a_pass_really_holds(rows: int) -> None:
    """Catches: an estimate that is off by more than three hundredths of the activations, on either side."""
    counts = rehearse(CONFIG, SHAPE, torch.float32, work(), on_cpu=False).counts
    lasting = counts["load"].peak - counts["load"].lasting + counts["optimise"].lasting
    activations = measured(rows)

    def chosen(share: float) -> int:
        memory = MARGIN * (CONTEXT + lasting + GPU_HELD * share * activations)
        return fitting_microbatch(CONFIG, SHAPE, GPU, work(), gpu=Gpu(memory, 1e12, 1e14))

    assert chosen(1.03) == rows
    assert chosen(0.97) == rows // 2


def test_free_memory_decides_where_a_gpu_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a choice by the GPU's whole memory, and a failed rehearsal that ends the run."""
    monkeypatch.setattr(microbatch, "read_shape", lambda *_: SHAPE)
    monkeypatch.setattr(microbatch, "work_of", lambda *_: work())
    for free, size in ((1e12, 64), (MARGIN * CONTEXT, 1)):
        monkeypatch.setattr(estimate, "free_bytes", lambda _, free=free: free)
        assert microbatch._fitting_or_usual(CONFIG, "x", GPU, {}, None) == size  # type: ignore[arg-type]
        assert f"microbatch_size auto: {size} (the most" in capsys.readouterr().out
    monkeypatch.setattr(microbatch, "read_shape", lambda *_: 1 / 0)
    assert microbatch._fitting_or_usual(CONFIG, "x", GPU, {}, None) == 32  # type: ignore[arg-type]
    assert "no plan for x: division by zero" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("minibatch", "most", "size"), [(64, 100, 64), (64, 33, 32), (48, 20, 16), (48, 47, 24), (7, 6, 1), (64, 0, 1)]
)
def test_microbatches_divide_the_minibatch(minibatch: int, most: int, size: int) -> None:
    sizes = {"total_episodes": minibatch, "rollout_batch_size": minibatch, "minibatch_size": minibatch}
    assert PPOConfig(name="x", dataset="none", **sizes).divisor(most) == size  # type: ignore[arg-type]


@pytest.mark.parametrize(("recorded", "size"), [(16, 16), (48, 32), ("auto", 32), (None, 32)])
def test_a_resumed_run_keeps_its_size(recorded: Any, size: int, tmp_path: Path) -> None:
    """Catches: another size after a resume on a GPU with less free memory, and a record that is no size of this run."""
    record = tmp_path / "tracking.json"
    record.write_text(json.dumps({"config": {"microbatch_size": recorded}}))
    resumed = dataclasses.replace(CONFIG, resume=True, device="cpu")
    sets: dict[str, Any] = {}
    tokenizer: Any = None
    assert with_microbatch(resumed, "x", sets, tokenizer, record).microbatch_size == size
    fresh = dataclasses.replace(CONFIG, device="cpu")
    assert with_microbatch(fresh, "x", sets, tokenizer, record).microbatch_size == 32
    asked = dataclasses.replace(resumed, microbatch_size=4)
    assert with_microbatch(asked, "x", sets, tokenizer, record) is asked


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("8", 8)])
def test_the_command_line_takes_a_number_or_auto(text: str, value: Any) -> None:
    words = ["--name", "x", "--dataset", "none", f"--microbatch_size={text}"]
    assert parse_config(PPOConfig, words).microbatch_size == value
    with pytest.raises(UserError, match=f"microbatch_size.*must be a whole number or auto, got 'x{text}'"):
        parse_config(PPOConfig, [*words[:-1], f"--microbatch_size=x{text}"])
