"""Running out of memory: refused beforehand where it can be known, one clear line where it cannot."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from toys import build_model

from rlhf.base.errors import UserError
from rlhf.config import PPOConfig, SFTConfig
from rlhf.models.adapters import with_adapter
from rlhf.run import memory
from rlhf.run.timing import PhaseTimer

#: What the CPU's allocator says.
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(CPU_MESSAGE),
        MemoryError(),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize(
    ("phase", "option"),
    [
        ("train", "per_device_train_batch_size"),
        ("rollout", "response_length"),
        ("optimise", "gradient_checkpointing"),
        ("preflight", "microbatch_size"),
        ("evaluate", "per_device_eval_batch_size"),
    ],
)
def test_out_of_memory_names_the_phase_and_what_to_lower(error: Exception, phase: str, option: str) -> None:
    """Catches: an allocator's traceback, and advice for another phase."""
    timer = PhaseTimer()
    with timer.phase("load"):
        pass
    with pytest.raises(UserError, match=f"'{phase}'.*{option}.*--resume"), memory.explained(timer), timer.phase(phase):
        raise error


def test_out_of_memory_while_loading_names_what_makes_weights_smaller() -> None:
    """Batch sizes play no part in it."""
    with pytest.raises(UserError, match=r"'start'.*quantization.*offload_base"), memory.explained(PhaseTimer()):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_every_option_that_is_advised_exists() -> None:
    """Catches: advice that names an option by a word that no config knows."""
    options = {field.name for config in (SFTConfig, PPOConfig) for field in dataclasses.fields(config)}
    for advice in memory._REMEDIES.values():
        assert {word.strip(";,()") for word in advice.split() if "_" in word} <= options


def test_a_real_allocation_that_is_too_large_is_recognised() -> None:
    """The allocator's words may change with torch."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)


def test_other_errors_pass() -> None:
    """Catches: every failure called a lack of memory."""
    with pytest.raises(RuntimeError, match="shapes differ"), memory.explained(PhaseTimer()):
        raise RuntimeError("shapes differ")


SIZES: dict[str, Any] = {"prompt": 60, "response": 40}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_rollout_that_cannot_fit_is_refused(recorded: bool, merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 layers x (keys, values) x 2 key heads x 8 wide x 4 bytes = 256 bytes a token, twice for prompts where steps are
    recorded, and 32 logits of 4 bytes a response; merged copies of all linear layers in the trunk. The limit is exact."""
    model = build_model("llama", 32)
    layers = sum(p.nbytes for name, p in model.named_parameters() if "_proj" in name)
    adapted: Any = with_adapter(model, LoraConfig(r=2, target_modules="all-linear"))
    causal, device = adapted.get_base_model(), torch.device("cpu")
    weights = sum(p.numel() * 4 for p in adapted.parameters()) + merged * layers
    rollout = 256 * 10 * (160 if recorded else 100) + 10 * 32 * 4
    for spare, fits in ((0, True), (-1, False)):
        total = weights + rollout + spare
        monkeypatch.setattr(memory, "total_bytes", lambda _, total=total: total)
        if fits:
            memory.check_rollout_fits(adapted, causal, device, responses=10, merged=merged, recorded=recorded, **SIZES)
            continue
        with pytest.raises(UserError, match=r"10 responses of up to 100 tokens.*rollout_batch_size or response_length"):
            memory.check_rollout_fits(adapted, causal, device, responses=10, merged=merged, recorded=recorded, **SIZES)


def test_offloaded_weights_need_no_place_beside_a_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a base that is larger than the GPU refused just where offload_base is there for it."""
    model, device = build_model("llama", 32), torch.device("cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=256 * 10 * 100 + 10 * 32 * 4))
    with pytest.raises(UserError, match="lower rollout_batch_size"):
        memory.check_rollout_fits(model, model, device, responses=10, merged=False, recorded=False, **SIZES)
    cpu_offload(model, execution_device=device)
    memory.check_rollout_fits(model, model, device, responses=10, merged=False, recorded=False, **SIZES)
