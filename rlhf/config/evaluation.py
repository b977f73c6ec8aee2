"""Options of the evaluation of policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlhf.base.errors import install, require
from rlhf.config.limits import require_above_zero, require_at_least
from rlhf.config.options import RunConfig, option

#: Kinds of tasks whose answers are compared with references.
CHECKS = ("summarisation", "translation", "question_answering", "classification")


@dataclass(kw_only=True)
class EvaluationConfig(RunConfig):
    """Comparison of policies: figures, win rates, best-of-n, the reward-KL frontier and the alignment tax."""

    RENAMED: ClassVar = {"prompts": "dataset"}
    GROUPS: ClassVar = {
        "models": "model", "dataset": "data", "output_dir": "places and checkpoints", "runs": "model",
        "reward": "reward", "reference": "model", "force": "checks", "num_prompts": "data",
        "samples_per_prompt": "sampling", "max_prompt_length": "data", "per_device_eval_batch_size": "computing",
        "best_of": "sampling", "judge_url": "judges", "texts": "benchmarks",
    }  # fmt: skip

    models: list[str] = option("policies: pretrain/NAME, sft/NAME, ppo/NAME, with @VERSION or the latest")
    dataset: str = option("held-out prompts: folder made by rlhf data, a data file, or a hub name")
    split: Literal["validation", "train"] = option("split of the prompts", "validation")
    output_dir: str = option(
        "folder for evaluation.json, samples.jsonl and the answers and verdicts with which a second call resumes",
        "outputs/evaluation",
    )
    runs: list[str] = option(
        "output folders of PPO runs with snapshots (snapshot_steps), for the reward-KL frontier", []
    )
    reward: str | None = option(
        "proxy reward as in PPO: reward/NAME, package.module:function, a classifier or a URL; default: the reward of the "
        "first PPO policy",
        None,
    )
    gold: list[str] = option(
        "independent scorers: package.module:function(responses) -> scores, reward/NAME, a classifier or a URL", []
    )
    reference: str | None = option(
        "SFT policy that KL is measured against; default: the one of the first PPO policy", None
    )
    baseline: str | None = option("policy that win rates are against; default: the reference", None)
    force: bool = option(
        "compare policies with different rewards, prompts or SFT policies; the result is marked", False
    )
    num_prompts: int = option("number of prompts, the first of the split", 128)
    samples_per_prompt: int = option("answers sampled per prompt", 4)
    temperature: float = option("sampling temperature; divides policy and reference logits alike", 1.0)
    response_length: int = option("longest response, tokens, stop token included", 48)
    max_prompt_length: int = option("longest prompt, tokens; longer ones are refused", 512)
    per_device_eval_batch_size: int = option("responses per forward pass", 32)
    best_of: int = option("largest n of best-of-n from the reference (n = 1, 2, 4, ...); 0 leaves it out", 64)
    best_of_prompts: int = option("prompts of best-of-n, each with best_of samples", 32)
    judge_url: str | None = option(
        "base URL (.../v1) of an OpenAI-compatible chat endpoint that judges pairs; its key is read from OPENAI_API_KEY",
        None,
    )
    judge_model: str | None = option("model of the chat endpoint", None)
    judge_pairs: int = option("pairs per model that the chat endpoint or people judge", 128)
    judge_parallel: int = option("concurrent requests to the chat endpoint", 4)
    judge_prices: list[float] = option(
        "prices of a million prompt tokens and of a million answer tokens, to report the cost", []
    )
    judge_timeout: float = option("longest time for a request to an endpoint, seconds", 60.0)
    export_comparison: str | None = option(
        ".csv file to write, of pairs without the models' names, for people to judge", None
    )
    verdicts: list[str] = option(".csv files of export_comparison that people have filled in", [])
    texts: str | None = option(
        "plain text for perplexity, with an empty line between paragraphs; default: 14 paragraphs of this package", None
    )
    tasks: list[str] = option(f"lm-evaluation-harness tasks ({install('eval')})", [])
    task_folder: str | None = option("folder of the tasks' .yaml files; default: the harness's own tasks", None)
    task_limit: int | None = option("number of examples of each task, the first ones; none: all", None)
    checks: list[str] = option(
        "KIND=FILE: rows with prompt and reference, to compare answers with; KIND is summarisation, "
        "translation, question_answering or classification",
        [],
    )
    check_length: int = option("longest answer of a check, tokens; decoding is greedy", 128)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("num_prompts", "samples_per_prompt", "response_length", "max_prompt_length", "best_of_prompts")
        require_at_least(1, self, *sizes, "per_device_eval_batch_size", "judge_pairs", "judge_parallel")
        require_at_least(1, self, "check_length", "task_limit")
        require_above_zero(self, "temperature", "judge_timeout")
        require_at_least(0, self, "best_of")
        require(
            (self.judge_url is None) == (self.judge_model is None),
            "a chat judge needs both: --judge_url URL and --judge_model NAME",
        )
        require(
            len(self.judge_prices) in (0, 2),
            f"judge_prices takes two numbers, for prompt and answer tokens; got {len(self.judge_prices)}",
        )
