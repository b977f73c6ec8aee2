"""Policies one after the other on one reference: what each answers, loses and scores. What was made is kept and made once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.base.errors import UserError, require
from rlhf.base.functions import load_function
from rlhf.base.intervals import Array
from rlhf.base.json_files import read_value
from rlhf.base.storage import sha256_file
from rlhf.config import EvaluationConfig, reward_kind
from rlhf.data_prep.load import load_rows
from rlhf.evaluation.answers import Answers, opened, sample_answers, score_answers
from rlhf.evaluation.candidates import Candidate, gather
from rlhf.evaluation.checks import Check, likeliest_answers, read_checks
from rlhf.evaluation.tax import PLAIN_TEXT, Tasks, text_logprobs, text_windows
from rlhf.models.base import base_context_length, context_length, fit_vocabulary, load_base, load_policy
from rlhf.models.compute import Compute
from rlhf.models.likelihood import mean_logprobs
from rlhf.models.roles import RoleModels
from rlhf.models.tokenization import encode_prompt, load_tokenizer, stop_token_ids
from rlhf.ppo.rollout import SamplingOptions
from rlhf.registry import Registry
from rlhf.reward.scorer import open_scorer
from rlhf.reward.sources import GoldSource, ModelReward, Source, open_source, source_name

#: Something to be measured on an open policy: what decides it, and how it is made.
Job = tuple[dict[str, Any], Callable[[RoleModels], Any]]


class Bench:
    """What all policies of a comparison are measured with.

    Raises:
        UserError: whatever is wrong with models, prompts, texts, tasks or scorers, before anything is computed.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config, self.registry = config, Registry(config.registry)
        self.comparison = gather(config, self.registry)
        self.gold = {source_name(reference): reference for reference in config.gold}
        require(len(self.gold) == len(config.gold), f"two gold scorers are called alike: {', '.join(config.gold)}")
        for reference in config.gold:
            self._check_scorer(reference)
        self._check_scorer(self.comparison.reward)
        self.tokenizer = load_tokenizer(str(self.comparison.reference.path))
        data = load_rows(config.prompts, config.split, kind="prompts")
        self.fingerprint = data.fingerprint
        self.rows = data.rows.select(range(min(config.num_prompts, len(data.rows)))).to_list()
        self.prompts = [encode_prompt(self.tokenizer, row["prompt"]) for row in self.rows]
        self._check_lengths()
        self.text = Path(config.texts) if config.texts else PLAIN_TEXT
        self.windows = text_windows(
            self.tokenizer, self.text, base_context_length(self.comparison.reference, config.registry)
        )
        self.tasks = Tasks(config.tasks, config.task_folder, config.task_limit) if config.tasks else None
        self.checks = read_checks(config.checks)
        self.compute = Compute.choose(config)
        self.options = SamplingOptions(
            max_new_tokens=config.response_length,
            temperature=config.temperature,
            stop_token_ids=stop_token_ids(self.tokenizer),
            pad_token_id=int(self.tokenizer.pad_token_id),
        )
        self.kept = Path(config.output_dir) / "kept"
        self._base: PreTrainedModel | None = None

    def _check_lengths(self) -> None:
        limit = self.config.max_prompt_length
        for number, ids in enumerate(self.prompts, start=1):
            require(
                len(ids) <= limit,
                f"prompt {number} has {len(ids)} tokens, more than max_prompt_length={limit}; raise it or drop the prompt",
            )

    def _check_scorer(self, reference: str) -> None:
        """A slip in its name must not show at the end."""
        if reward_kind(reference) == "function":
            load_function(reference)
        elif reward_kind(reference) == "adapter":
            self.registry.get(reference)

    # Measuring

    def measure(self, candidate: Candidate, *, tax: bool = True) -> tuple[Answers, list[float], dict[str, Any]]:
        """Its answers, and with `tax` the mean log-likelihoods of the plain texts and the figures of the tasks."""
        jobs = {"answers": self._answers_job(self.config.samples_per_prompt, len(self.prompts), measure=True)}
        if tax:
            jobs["texts"] = self._texts_job()
            if self.tasks is not None:
                jobs["tasks"] = self._tasks_job(self.tasks)
        found = self._done(candidate, jobs)
        return Answers(**found["answers"]), found.get("texts", []), found.get("tasks", {})

    def checked(self, candidate: Candidate) -> dict[str, Any]:
        """The figures of the task checks, `check/FILE/FIGURE`."""
        found = self._done(candidate, {check.name: self._check_job(check) for check in self.checks})
        return {
            f"check/{check.name}/{name}": figure
            for check in self.checks
            for name, figure in check.figures(found[check.name], self.config.seed).items()
        }

    def _check_job(self, check: Check) -> Job:
        prompts = [encode_prompt(self.tokenizer, prompt) for prompt in check.prompts]
        length, batch_size = self.config.check_length, self.config.per_device_eval_batch_size

        def make(models: RoleModels) -> Any:
            with models.merged_policy() as policy:
                return likeliest_answers(policy, self.tokenizer, prompts, length, batch_size)

        return {"check": prompts, "length": length}, make

    def best_of(self) -> Answers:
        """`best_of` answers of the reference to each of the first prompts."""
        count = min(self.config.best_of_prompts, len(self.prompts))
        reference = next(c for c in self.comparison.models if c.name == self.comparison.reference.reference)
        job = self._answers_job(self.config.best_of, count, measure=False)
        return Answers(**self._done(reference, {"answers": job})["answers"])

    def _answers_job(self, samples: int, count: int, *, measure: bool) -> Job:
        c, prompts = self.config, self.prompts[:count]
        # Best-of-n must not choose among the very answers that it is compared with.
        seed = c.seed if measure else c.seed + 1

        def make(models: RoleModels) -> Any:
            answers = sample_answers(
                models,
                self.tokenizer,
                prompts,
                samples,
                self.options,
                batch_size=c.per_device_eval_batch_size,
                seed=seed,
                measure=measure,
            )
            return dataclasses.asdict(answers)

        sampling = {"temperature": c.temperature, "length": c.response_length, "seed": seed, "measure": measure}
        return {"answers": prompts, "samples": samples, **sampling}, make

    def _texts_job(self) -> Job:
        def make(models: RoleModels) -> Any:
            with models.merged_policy() as policy:
                return self._text_logprobs(policy, self.windows)

        return {"texts": self.windows}, make

    def _text_logprobs(self, model: PreTrainedModel, rows: Sequence[list[int]]) -> list[float]:
        return text_logprobs(
            model,
            rows,
            pad_token_id=self.options.pad_token_id,
            compute=self.compute,
            batch_size=self.config.per_device_eval_batch_size,
        )

    def _tasks_job(self, tasks: Tasks) -> Job:
        def make(models: RoleModels) -> Any:
            with models.merged_policy() as policy, self.compute.autocast():
                return tasks(policy, self.tokenizer, self.config.per_device_eval_batch_size, self.config.seed)

        folder = Path(self.config.task_folder) if self.config.task_folder else None
        files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder else []
        return {"tasks": tasks.names, "limit": tasks.limit, "files": [sha256_file(file) for file in files]}, make

    def _done(self, candidate: Candidate, jobs: Mapping[str, Job]) -> dict[str, Any]:
        """The results of jobs; the policy is opened only where one is not there yet."""
        c, reference = self.config, self.comparison.reference
        common = {
            "policy": candidate.hash,
            "reference": reference.hash,
            "form": [str(self.compute.dtype), c.quantization, self.compute.device.type],
        }
        found = {name: self._read({**common, **key}) for name, (key, _) in jobs.items()}
        missing = [name for name in jobs if found[name] is None]
        if missing:
            if self._base is None:
                self._base = load_policy(reference, c, self.compute)
                self._check_context(self._base)
            print(f"evaluation: {candidate.name}", flush=True)
            with opened(candidate, self._base, reference, c, self.compute) as models:
                for name in missing:
                    key, make = jobs[name]
                    found[name] = self._keep({**common, **key}, make(models))
        return found

    def _check_context(self, base: PreTrainedModel) -> None:
        context, longest = context_length(base), max(map(len, self.prompts))
        require(
            longest + self.config.response_length <= context,
            f"a prompt of {longest} tokens with response_length={self.config.response_length} does not fit into the model's "
            f"context of {context} tokens; lower response_length",
        )

    def close(self) -> None:
        """Lets go of the reference, which scorers need the memory of."""
        self._base = None

    # Scoring

    def base_logprobs(self, sets: Sequence[Answers]) -> list[tuple[Array, Array]]:
        """For each set of answers the mean log-likelihood a token under the untuned base model, nats, and the tokens that it
        is of, (M,) each. The stop token does not count: when to stop is what SFT teaches, and an untuned model cannot know."""
        manifest = self.comparison.reference.manifest
        common = {"base": [manifest.base_model, manifest.base_model_revision], "dtype": str(self.compute.dtype)}
        keys = [{**common, "prompts": self.prompts, "responses": a.tokens} for a in sets]
        found = [self._read(key) for key in keys]
        texts = [[row[:-1] if end else row for row, end in zip(a.tokens, a.stopped, strict=True)] for a in sets]
        if None in found:
            self.close()
            base = load_base(
                manifest.base_model, self.config, self.compute, revision=manifest.base_model_revision
            ).requires_grad_(False)
            fit_vocabulary(base, self.comparison.reference.path)
            for i, missing in enumerate(found):
                if missing is None:
                    found[i] = self._keep(keys[i], self._response_logprobs(base, sets[i], texts[i]))
        return [(np.array(means), np.array([len(t) for t in own])) for means, own in zip(found, texts, strict=True)]

    def _response_logprobs(self, base: PreTrainedModel, answers: Answers, texts: list[list[int]]) -> list[float]:
        """(M,); 0 where an answer is empty."""
        there = [i for i, text in enumerate(texts) if text]
        means = np.zeros(len(texts))
        if there:
            asked = [self.prompts[int(answers.prompt[i])] for i in there]
            means[there] = mean_logprobs(
                base,
                [[*prompt, *texts[i]] for prompt, i in zip(asked, there, strict=True)],
                list(map(len, asked)),
                torch.from_numpy(answers.prompt[there]),
                pad_token_id=self.options.pad_token_id,
                compute=self.compute,
                batch_size=self.config.per_device_eval_batch_size,
            ).numpy()
        return [float(mean) for mean in means]

    def scores(self, reference: str, sets: Sequence[Answers], *, gold: bool) -> list[Array]:
        """(M,) scores of each set of answers by one scorer, which is opened for it and closed again."""
        self.close()
        source = self._source(reference, gold=gold)
        return [
            score_answers(
                source,
                answers,
                self.prompts,
                self.rows,
                pad_token_id=self.options.pad_token_id,
                batch_size=self.config.per_device_eval_batch_size,
                device=self.compute.device,
            )
            for answers in sets
        ]

    def _source(self, reference: str, *, gold: bool) -> Source:
        kind, batch_size = reward_kind(reference), self.config.per_device_eval_batch_size
        if kind == "function" and gold:
            return GoldSource(reference)
        if kind == "adapter":
            own, other = self.registry.get(reference, expect_stage="reward"), self.comparison.reference.manifest
            hashes = own.manifest.tokenizer_hash, own.manifest.chat_template_hash
            if hashes == (other.tokenizer_hash, other.chat_template_hash):
                return ModelReward(open_scorer(own, self.registry, self.config, self.compute, batch_size))
        timeout = self.config.judge_timeout
        return open_source(reference, self.registry, self.config, self.compute, batch_size=batch_size, timeout=timeout)

    # Keeping

    def _file(self, key: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.kept / f"{digest[:24]}.json"

    def _read(self, key: dict[str, Any]) -> Any:
        try:
            return read_value(self._file(key))
        except (OSError, ValueError):
            return None  # not there, or half a file: made again

    def _keep(self, key: dict[str, Any], result: Any) -> Any:
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(file)
        return result


def measured_or_left_out(
    bench: Bench, candidates: Sequence[Candidate]
) -> tuple[list[tuple[Candidate, Answers]], list[str]]:
    """Answers of snapshots, and why others could not be opened: a broken one does not cost the rest."""
    found, broken = [], []
    for candidate in candidates:
        try:
            found.append((candidate, bench.measure(candidate, tax=False)[0]))
        except UserError as error:
            broken.append(f"snapshot {candidate.name} left out: {error}")
    return found, broken
