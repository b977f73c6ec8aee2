"""What the performance benchmarks share: models without a download, runs in processes of their own, the machine, the result.

Each measured run is a process of its own: its peak memory is its own, and no run finds what another has warmed up. At the top
stands the standard library only, because TRL and vLLM run these scripts in environments of theirs, which lack the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
sys.path.insert(0, str(ROOT))  # this checkout, whether it is installed or not

#: Llama models built from these shapes have random weights; speed and memory do not depend on them.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # of width 32: vLLM's attention on CPUs takes no narrower ones
        "num_key_value_heads": 1,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "qwen-0.5b": {  # that of Qwen2.5 0.5B
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "llama-1b": {  # that of Llama 3.2 1B
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
#: A stop token that no model samples: every response has the full length, so all do the same work.
NEVER = -1
#: What a PPO config must name, and the benchmarks make themselves.
_ROLES: dict[str, Any] = {
    "name": "benchmark",
    "dataset": "none",
    "policy": "sft/benchmark",
    "reward": ["reward/benchmark"],
}
_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # or it leaves a core idle
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_MODE": "disabled",
}


def start(main: Callable[[], None], workers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Entry point of a benchmark: its command line, or one of its workers when `measure` has started this process."""
    if sys.argv[1:2] == ["--worker"]:
        subject, work, report = sys.argv[2:]
        settings = json.loads(work)
        result = workers[subject](**settings)
        Path(report).write_text(json.dumps({**result, **peak_memory(settings["device"])}))
        return
    from rlhf.base.errors import run_command

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # its own deprecations
    run_command(main)


def measure(script: str, subject: str, work: Mapping[str, Any], *, python: str = sys.executable) -> dict[str, Any]:
    """Runs a worker of a script in a process of its own; returns what it reports, and its peak memory.

    Raises:
        UserError: it failed; the end of its output is on stderr.
    """
    from rlhf.base.errors import UserError

    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.json"), Path(folder, "log.txt")
        command = [python, script, "--worker", subject, json.dumps(work), str(report)]
        with log.open("w") as sink:
            done = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **_QUIET})
        if done.returncode != 0 or not report.is_file():
            print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
            raise UserError(f"the run of {subject} ended with exit code {done.returncode}; its last output is above")
        return json.loads(report.read_text())


def alternate(runs: int, subjects: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Each subject once a round, in an order that turns round every time: a drift of the machine meets all alike."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in subjects}
    for number in range(runs):
        for name in list(subjects)[:: 1 if number % 2 == 0 else -1]:
            print(f"round {number + 1} of {runs}: {name}", flush=True)
            results[name].append(subjects[name]())
    return results


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(figure: Mapping[str, float]) -> str:
    """A `spread` as a table has it."""
    return f"{figure['median']:.3g} ({figure['min']:.3g} to {figure['max']:.3g})"


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of the power law y = c x^p that fits best: 1 is linear."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def peak_memory(device: str) -> dict[str, float]:
    """The most memory this process has held so far, in 10^9 bytes: resident, and with CUDA what torch had allocated there.

    `getrusage` only where there is no better: on Linux its figure starts from what the *parent* held at the start.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found is not None:
        peak = {"peak_rss_gb": int(found[1]) * 1024 / 1e9}
    else:
        from rlhf.run.timing import peak_rss_gb

        peak = {"peak_rss_gb": peak_rss_gb()}
    if device == "cuda":
        import torch

        peak["peak_cuda_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return peak


def peak_gb(run: Mapping[str, float]) -> float:
    """The peak that counts on the run's device."""
    return run.get("peak_cuda_gb", run["peak_rss_gb"])


def seconds_of(once: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds of each of `repeats` calls."""
    import torch

    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        once()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    import psutil
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = {"avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"} & set(facts.get("flags", "").split())
    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "processor": facts.get("model name") or platform.processor() or platform.machine(),
        "flags": sorted(flags),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "bf16_matmul_tflops": round(_matmul_tflops(device), 3),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _matmul_tflops(device: str) -> float:
    """Median speed of square bf16 products, 10^12 multiplications and additions a second."""
    import torch

    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).bfloat16().unbind()
    seconds_of(lambda: a @ b, 3, device)
    return 2 * size**3 / statistics.median(seconds_of(lambda: a @ b, 10, device)) / 1e12


def compute_type(device: str) -> str:
    """The type that all sides compute in: bfloat16 wherever the machine has instructions for it."""
    from rlhf.config import StageConfig
    from rlhf.models.compute import Compute

    return str(Compute.choose(StageConfig(name="benchmark", dataset="none", device=device)).dtype).removeprefix(
        "torch."
    )


@contextlib.contextmanager
def model_folder(name: str) -> Iterator[str]:
    """A model and its tokenizer as a folder: one of `SHAPES`, made here in bf16, or whatever the stages take for a model."""
    if name not in SHAPES:
        from rlhf.models.catalogue import resolve_model

        yield resolve_model(name)
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    with shape_folder(name) as folder:
        config = AutoConfig.from_pretrained(folder)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        yield folder


@contextlib.contextmanager
def shape_folder(name: str) -> Iterator[str]:
    """The config and the tokenizer of one of `SHAPES` as a folder, without weights; see `made_on`."""
    from transformers import LlamaConfig

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**SHAPES[name], **ids, max_position_embeddings=4096, tie_word_embeddings=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        config.save_pretrained(folder)
        _save_tokenizer(folder, config.vocab_size)
        yield folder


@contextlib.contextmanager
def made_on(device: str) -> Iterator[None]:
    """Models are made on the device from the config of their folder, always the same ones, where they would be read from it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    def maker(kind: Any) -> Callable[..., Any]:
        def make(folder: str, *, dtype: Any, attn_implementation: str | None = None, **rest: Any) -> Any:
            config = AutoConfig.from_pretrained(folder, **({"num_labels": 1} if "num_labels" in rest else {}))
            torch.manual_seed(0)
            with torch.device(device):
                return kind.from_config(config, dtype=dtype, attn_implementation=attn_implementation).eval()

        return make

    with contextlib.ExitStack() as patches:
        for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
            patches.enter_context(mock.patch.object(kind, "from_pretrained", maker(kind)))
        yield


def _save_tokenizer(folder: str, vocab_size: int) -> None:
    """A tokenizer for which each word w3, w4, ... is one token, so that texts have exactly the length that is wanted."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<stop>", *(f"w{i}" for i in range(3, vocab_size))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<unk>", "eos_token": "<stop>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)


def random_prompts(model: str, count: int, length: int) -> list[list[int]]:
    """Prompts of random tokens, the same in every environment; special tokens are at the ends of vocabularies, these not."""
    from transformers import AutoConfig

    size, source = AutoConfig.from_pretrained(model).vocab_size, random.Random(0)
    return [[source.randrange(size // 4, 3 * size // 4) for _ in range(length)] for _ in range(count)]


def variant(text: str) -> dict[str, str]:
    """PPO options on top of the benchmark's own: `default`, or `name=value,name=value`.

    Raises:
        UserError: no such option or value.
    """
    from rlhf.base.errors import require
    from rlhf.config import PPOConfig, build

    words = [] if text == "default" else text.split(",")
    require(all("=" in word for word in words), f"'{text}' must be 'default' or 'name=value,name=value'")
    options = dict(word.split("=", 1) for word in words)
    build(PPOConfig, {**_ROLES, **options}, text)
    return options


@contextlib.contextmanager
def registered(model: str, device: str = "cpu") -> Iterator[str]:
    """A registry with `sft/benchmark` and `reward/benchmark` on a model, adapters as fresh as training starts them."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        _publish_chain(model, folder, device)
        yield folder


def _publish_chain(model: str, registry: str, device: str) -> None:
    from rlhf.config import StageConfig
    from rlhf.models.adapters import lora_config, save_adapter, with_adapter
    from rlhf.models.base import load_base
    from rlhf.models.compute import Compute
    from rlhf.models.reward_model import sequence_classifier
    from rlhf.models.tokenization import load_tokenizer, stop_token_ids, tokenizer_hashes
    from rlhf.registry import Registry

    config = StageConfig(name="benchmark", dataset="none", device=device, dtype="bfloat16")
    tokenizer = load_tokenizer(model, chat_template="plain")
    pad = int(tokenizer.pad_token_id)
    fields: dict[str, Any] = {"kind": "adapter", "base_model": model, **tokenizer_hashes(tokenizer)}
    fields |= {"pad_token_id": pad, "stop_token_ids": stop_token_ids(tokenizer)}
    fields |= {"data": {}, "config": {}, "recipe": "benchmark", "metrics": {}}

    def write(folder: Path) -> None:
        save_adapter(adapted, folder, adapter="default", base_model=model)
        tokenizer.save_pretrained(folder)

    adapted = with_adapter(load_base(model, config, Compute.choose(config)), lora_config(config, "CAUSAL_LM"))
    policy = Registry(registry).publish("sft", "benchmark", write, **fields)
    base = adapted.unload()
    adapted = with_adapter(sequence_classifier(base, pad, seed=0), lora_config(config, "SEQ_CLS"))
    scale = {"reward_mean": 0.0, "reward_std": 1.0}
    Registry(registry).publish("reward", "benchmark", write, parents=[policy], **scale, **fields)


@contextlib.contextmanager
def ppo_trainer(
    *,
    model: str,
    registry: str,
    device: str,
    dtype: str,
    episodes: int,
    microbatch: int,
    prompt: int,
    response: int,
    updates: int,
    options: Mapping[str, Any],
) -> Iterator[Any]:
    """Our `PPOTrainer` with the models of the PPO stage, set so that every update is the same work: one optimiser step on
    `episodes` responses of exactly `response` tokens to prompts of `prompt` random tokens; 32-bit AdamW, as TRL has it."""
    from rlhf.config import PPOConfig, build
    from rlhf.models.compute import Compute
    from rlhf.models.tokenization import load_tokenizer
    from rlhf.ppo.rollout import Environment
    from rlhf.ppo.state import Outputs
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.registry import Registry
    from rlhf.run.timing import PhaseTimer
    from rlhf.run.tracker import Tracker
    from rlhf.stages.ppo import build_models

    own: dict[str, Any] = {
        **_ROLES,
        "device": device,
        "dtype": dtype,
        "optim": "adamw_torch",
        "learning_rate": 1e-5,
        "total_episodes": episodes * updates,
        "rollout_batch_size": episodes,
        "minibatch_size": episodes,
        "microbatch_size": microbatch,
        "response_length": response,
    }
    config = build(PPOConfig, {**own, **options}, "benchmark")
    policy, reward = (Registry(registry).get(f"{stage}/benchmark") for stage in ("sft", "reward"))
    tokenizer = load_tokenizer(str(policy.path))
    models, reward_sum = build_models(config, Compute.choose(config), policy, [reward])
    prompts = random_prompts(model, episodes * updates, prompt)
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        Tracker(folder, stage="ppo", name="benchmark", group="benchmark", config={}, wandb_mode="disabled") as tracker,
    ):
        environment = Environment(prompts=prompts, rows=[{}] * len(prompts), reward=reward_sum)
        outputs = Outputs(tracker=tracker, folder=Path(folder, "checkpoints"), timer=PhaseTimer())
        trainer: Any = PPOTrainer(models, tokenizer, config, environment, outputs)
        trainer.sampling = dataclasses.replace(trainer.sampling, stop_token_ids=[NEVER])
        yield trainer


def parser(description: str | None, *, runs: int) -> argparse.ArgumentParser:
    """The options that all four benchmarks have; the defaults are the project's yardstick of work."""
    made = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--out", type=Path, help="result file; default: benchmarks/results/NAME_DEVICE.json")
    made.add_argument("--runs", type=count, default=runs, help="rounds, in each of which everything is measured once")
    made.add_argument("--episodes", type=count, default=64, help="responses sampled together, an update's")
    made.add_argument("--microbatch", type=count, default=16, help="responses a forward and backward pass")
    made.add_argument("--prompt", type=count, default=24, help="tokens")
    made.add_argument("--response", type=count, default=32, help="tokens")
    return made


def words() -> tuple[list[str], list[str]]:
    """The command line before and after `--`."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    return sys.argv[1:at], sys.argv[at + 1 :]


def count(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text}")
    return int(text)


def check_sizes(arguments: argparse.Namespace, rollouts: Sequence[int] = ()) -> None:
    """Refuses sizes that a trainer would refuse only after the first runs.

    Raises:
        UserError: the microbatch does not divide an update's responses.
    """
    from rlhf.config import divides

    for episodes in (arguments.episodes, *rollouts):
        divides("--microbatch", arguments.microbatch, "responses an update", episodes)


def save(name: str, arguments: argparse.Namespace, result: Mapping[str, Any]) -> Path:
    """Writes the result file, with the machine's description taken before the runs in `result`."""
    out = arguments.out or RESULTS / f"{name}_{arguments.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    out.write_text(json.dumps({"benchmark": name, "created": created, **_rounded(result)}, indent=1) + "\n")
    print(f"written: {out}")
    return out


def _rounded(value: Any) -> Any:
    """Five significant digits: more is noise."""
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
