"""What only a CUDA device can show: the same commands in bf16 on a GPU, with 8-bit optimiser states and a 4-bit base."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_all_stages_run_on_cuda(
    quantization: str,
    tmp_path: Path,
    toy_config: Path,
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A tensor left on the CPU, or a type that a CUDA kernel refuses, stops one of the three stages."""
    done = command(
        "rlhf.pipeline", "--config", toy_config, "--device", "cuda", "--dtype", "bfloat16", "--quantization", quantization,
        "--registry", tmp_path / "registry", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cuda" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["ppo"]["updates"] == 2
    assert all("peak_cuda_gb" in phase for phase in results["phases"])
