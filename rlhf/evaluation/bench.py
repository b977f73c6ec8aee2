"""Inputs of a comparison that all policies share: prompts, texts, tasks, checks and scorers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.base.errors import require
from rlhf.config import EvaluationConfig
from rlhf.data_prep.load import load_rows
from rlhf.data_prep.writable import writable
from rlhf.evaluation.candidates import gather
from rlhf.evaluation.checks import read_checks
from rlhf.evaluation.results import ResultFiles
from rlhf.evaluation.tax import PLAIN_TEXT, Tasks, text_windows
from rlhf.models.base import base_context_length
from rlhf.models.compute import Compute
from rlhf.models.tokenization import encode_prompt, load_tokenizer, stop_token_ids
from rlhf.ppo.rollout import SamplingOptions
from rlhf.registry import Registry
from rlhf.reward.sources import kind_of


class Bench:
    """The inputs of a comparison, read and checked; P prompts.

    Raises:
        UserError: anything wrong with models, prompts, texts, tasks or scorers, before anything is computed.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config, self.registry = config, Registry(config.registry)
        self.comparison = gather(config, self.registry)
        self.gold = {kind_of(name).label(name): name for name in config.gold}
        require(len(self.gold) == len(config.gold), f"two gold scorers are called alike: {', '.join(config.gold)}")
        for name in (*config.gold, self.comparison.reward):
            kind_of(name).check(name, self.registry)
        reference = self.comparison.reference
        self.tokenizer = load_tokenizer(str(reference.path))
        data, _ = writable(load_rows(config.dataset, config.split, kind="prompts"), self.tokenizer)
        self.fingerprint = data.fingerprint
        self.rows = data.rows.select(range(min(config.num_prompts, len(data.rows)))).to_list()
        self.prompts = [encode_prompt(self.tokenizer, row["prompt"]) for row in self.rows]  # token ids (P, ...)
        _check_lengths(self.prompts, config.max_prompt_length)
        self.text = Path(config.texts) if config.texts else PLAIN_TEXT
        self.windows = text_windows(self.tokenizer, self.text, base_context_length(reference, config.registry))
        self.tasks = Tasks(config.tasks, config.task_folder, config.task_limit) if config.tasks else None
        self.checks = read_checks(config.checks)
        self.compute = Compute.choose(config)
        self.options = SamplingOptions(
            max_new_tokens=config.response_length,
            temperature=config.temperature,
            stop_token_ids=stop_token_ids(self.tokenizer),
            pad_token_id=int(self.tokenizer.pad_token_id),
        )
        self.results = ResultFiles(Path(config.output_dir) / "kept")


def _check_lengths(prompts: Sequence[Sequence[int]], limit: int) -> None:
    for number, ids in enumerate(prompts, start=1):
        require(
            len(ids) <= limit,
            f"prompt {number} has {len(ids)} tokens, more than max_prompt_length={limit}; raise it or drop the prompt",
        )
