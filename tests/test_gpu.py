"""What only a CUDA device can show: the same commands in bf16 on a GPU, 8-bit optimiser states, a 4-bit base, CUDA graphs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig
from toys import FAMILIES, PROMPTS, Call, build_model, rows
from transformers import PreTrainedModel

from rlhf.models import decoding, graphs
from rlhf.models.compute import Compute
from rlhf.models.packing import pack_rows
from rlhf.models.roles import SharedModels
from rlhf.models.sampling import Sampled, Sampler, sample
from rlhf.models.sequences import pad

VOCAB = 40
NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: Where a test's body can run: what a CPU can show of it need not wait for a GPU.
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
cuda = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where to compute; a CPU only traces what is compiled, because its compiler takes minutes."""
    if request.param == "cpu":
        step = torch.compile(decoding.last_logits, backend="eager", dynamic=False)
        monkeypatch.setattr(graphs, "layers_for", lambda device: step)
    return str(request.param)


def draw(model: PreTrainedModel, prompts: Sequence[list[int]], sampler: Sampler) -> Sampled:
    ids, mask = pad(prompts, 0, side="left")
    return sample(
        model,
        ids.to(model.device),
        mask.to(model.device),
        max_new_tokens=24,
        temperature=1.0,
        stop_token_ids=[2, 9, 17],
        pad_token_id=0,
        generator=torch.Generator().manual_seed(5),
        sampler=sampler,
    )


@cuda
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_all_stages_run_on_cuda(
    device: str,
    quantization: str,
    tmp_path: Path,
    toy_config: Path,
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A tensor left on the CPU, or a type that a CUDA kernel refuses, stops one of the three stages."""
    done = command(
        "rlhf.pipeline", "--config", toy_config, "--device", device, "--dtype", "bfloat16", "--quantization", quantization,
        "--registry", tmp_path / "registry", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cuda" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["ppo"]["updates"] == 2
    assert all("peak_cuda_gb" in phase for phase in results["phases"])


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": "true", "microbatch_tokens": 64, "offload_base": "true"},
        {"gradient_checkpointing": "true", "microbatch_tokens": 64, "sampler": "compiled"},
    ],
    ids=["offloaded", "compiled"],
)
@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_ppo_with_what_spares_memory_and_time(
    device: str,
    options: dict[str, object],
    finished: tuple[Path, Path],
    toy_config: Path,
    tmp_path: Path,
    call: Callable[..., Call],
) -> None:
    """A layer that is still in main memory when it computes, activations recomputed on another device, and a compiled step
    that the stage's packed attention, adapters or merged weights break."""
    shutil.copytree(finished[0], tmp_path / "registry")
    done = call(
        "rlhf.stages.ppo",
        *("--config", toy_config / "ppo.yaml", "--name", "lean", "--device", device, "--dtype", "bfloat16"),
        *("--registry", tmp_path / "registry", "--output_dir", tmp_path / "out"),
        *[word for option, value in options.items() for word in (f"--{option}", value)],
    )
    assert done.code == 0, done.err[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "rollout/logprob_gap" in row]
    assert len(updates) == 2
    assert all(update["rollout/logprob_gap"] < 0.2 for update in updates), "the sampler's policy is another one"


@cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs_sample_what_single_kernels_sample(device: str, family: str) -> None:
    """Catches: a graph that reads an old cache, old weights or the mask of another step, and rows mixed up when it is halved."""
    model = build_model(family, VOCAB).to(device)
    usual, graphs = draw(model, PROMPTS * 4, "loop"), draw(model, PROMPTS * 4, "compiled")
    assert rows(usual) == rows(graphs)
    torch.testing.assert_close(usual.logprobs, graphs.logprobs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_the_merged_adapter_of_the_next_rollout_reaches_the_graph(device: str) -> None:
    """A recorded graph holds addresses: an adapter that is merged anew for each rollout must be read anew, on the packed
    attention that stages have and whatever the width of the prompts."""
    base = build_model("llama", VOCAB)
    assert pack_rows(base)
    lora = LoraConfig(r=4, target_modules="all-linear")
    models = SharedModels(base, lora, Compute(torch.device(device), torch.float32))
    results: dict[Sampler, list[list[list[int]]]] = {"loop": [], "compiled": []}
    for step in range(3):
        with torch.no_grad():
            for parameter in models.trainable("policy").values():
                parameter.add_(0.2 * torch.randn_like(parameter))
        prompts = [*PROMPTS, [*range(5, 8 + 4 * step)]]
        with models.merged_policy() as policy:
            for sampler, found in results.items():
                found.append(rows(draw(policy, prompts, sampler)))
    assert results["loop"] == results["compiled"]
    assert results["loop"][0][0] != results["loop"][1][0], "the adapter must make a difference"


@cuda
def test_optimiser_states_are_8_bit_on_cuda(device: str) -> None:
    """An 8-bit optimiser that falls back to fp32 would cost four times the memory without a word."""
    weight = torch.nn.Parameter(torch.randn(128, 64, device=device))
    optimizer = AdamW8bit([weight], lr=1e-3)
    weight.sum().backward()
    optimizer.step()
    assert {state.dtype for name, state in optimizer.state[weight].items() if name in ("state1", "state2")} == {
        torch.uint8
    }


def test_these_tests_need_few_packages() -> None:
    """A GPU machine without a network has a handful of the project's packages: here the others cannot be imported."""
    others = (
        "jaxtyping beartype datasketch nltk lm_eval playwright gguf vaderSentiment ijson ftfy opencc phonenumbers plotly "
        "py3langid rensa rouge_score sacrebleu sklearn wandb_workspaces"
    )
    collect = ["--collect-only", "-q", "-p", "no:cacheprovider", __file__]
    code = f"import sys; sys.modules.update(dict.fromkeys({others.split()})); import pytest; sys.exit(pytest.main({collect}))"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # some of them are pytest's plugins
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
