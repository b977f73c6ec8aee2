"""Options of the evaluation of policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.base.errors import require
from rlhf.config.limits import require_above_zero, require_at_least
from rlhf.config.options import RunConfig, option

#: Tasks with references that answers can be checked against.
CHECKS = ("summarisation", "translation", "question_answering", "classification")


@dataclass(kw_only=True)
class EvaluationConfig(RunConfig):
    """What policies are worth: figures, win rates, best-of-n, the reward-KL frontier and the alignment tax."""

    models: list[str] = field(
        metadata={"help": "policies: pretrain/NAME, sft/NAME, ppo/NAME, with @VERSION or the latest"}
    )
    prompts: str = option("held-out prompts: folder made by rlhf.data_prep, a data file, or a hub name")
    split: Literal["validation", "train"] = option("split of the prompts", "validation")
    output_dir: str = option(
        "folder for evaluation.json and samples.jsonl; answers and verdicts are kept there, and a second call goes on",
        "outputs/evaluation",
    )
    runs: list[str] = field(
        default_factory=list,
        metadata={"help": "output folders of PPO runs with snapshots (snapshot_steps), for the reward-KL frontier"},
    )
    reward: str | None = option(
        "the proxy, as PPO takes it: reward/NAME, package.module:function, a classifier or a URL; default: what the first "
        "PPO policy was trained on",
        None,
    )
    gold: list[str] = field(
        default_factory=list,
        metadata={
            "help": "independent scorers: package.module:function(responses) -> scores, reward/NAME, a classifier, a URL"
        },
    )
    reference: str | None = option(
        "the SFT policy that KL is measured against; default: that of the first PPO policy", None
    )
    baseline: str | None = option("the policy that win rates are against; default: the reference", None)
    force: bool = option(
        "compare policies that were trained on different rewards, prompts or SFT policies; the result is marked", False
    )
    num_prompts: int = option("prompts judged on, the first of the split", 128)
    samples_per_prompt: int = option("answers sampled to each prompt", 4)
    temperature: float = option("sampling temperature; divides policy and reference logits alike", 1.0)
    response_length: int = option("longest response, tokens, stop token included", 48)
    max_prompt_length: int = option("longest prompt, tokens; longer ones are refused", 512)
    per_device_eval_batch_size: int = option("responses a forward pass", 32)
    best_of: int = option("best-of-n from the reference at n = 1, 2, 4, ... up to this; 0 leaves it out", 64)
    best_of_prompts: int = option("prompts of best-of-n, each with best_of samples", 32)
    judge_url: str | None = option(
        "base URL of an OpenAI-compatible chat endpoint that judges pairs (.../v1); its key: environment variable OPENAI_API_KEY",
        None,
    )
    judge_model: str | None = option("model that the chat endpoint is asked for", None)
    judge_pairs: int = option("pairs that the chat endpoint or people judge, for each model", 128)
    judge_parallel: int = option("requests to the chat endpoint at a time", 4)
    judge_prices: list[float] = field(
        default_factory=list,
        metadata={"help": "price of a million tokens, asked and answered; with it the cost is reported"},
    )
    judge_timeout: float = option("seconds that an endpoint may take for a request", 60.0)
    export_comparison: str | None = option("writes a .csv of unnamed pairs, for people to judge", None)
    verdicts: list[str] = field(
        default_factory=list, metadata={"help": ".csv files of export_comparison that people have filled in"}
    )
    texts: str | None = option(
        "plain text for perplexity, paragraphs apart; default: 14 paragraphs that come along", None
    )
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "lm-evaluation-harness tasks (pip install 'rlhf[eval]')"}
    )
    task_folder: str | None = option(
        "folder of the tasks' .yaml files; default: the tasks that come with the harness", None
    )
    task_limit: int | None = option("examples of each task, the first; none: all", None)
    checks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "KIND=FILE: answers compared with references, rows with prompt and reference; KIND is summarisation, "
            "translation, question_answering or classification"
        },
    )
    check_length: int = option("longest answer of a check, tokens; the likeliest token is taken", 128)

    def __post_init__(self) -> None:
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
            f"judge_prices are two numbers, of a million tokens asked and answered; got {len(self.judge_prices)}",
        )
