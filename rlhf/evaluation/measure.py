"""Measurements of policies beside their reference, one policy after the other; each result is computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rlhf.base.errors import UserError, require
from rlhf.base.intervals import Array
from rlhf.base.storage import sha256_file
from rlhf.evaluation.answers import opened, sample_answers
from rlhf.evaluation.bench import Bench
from rlhf.evaluation.candidates import Candidate
from rlhf.evaluation.checks import Check, likeliest_answers
from rlhf.evaluation.tax import Tasks, text_logprobs
from rlhf.models.base import context_length, load_policy
from rlhf.models.responses import Answers
from rlhf.models.roles import RoleModels
from rlhf.models.tokenization import encode_prompt

#: A measurement of an open policy: everything that decides its result, and the function that computes it.
Job = tuple[dict[str, Any], Callable[[RoleModels], Any]]


@dataclass(frozen=True)
class Measured:
    """A policy with its answers and their scores, (M,) by scorer: `score`, `gold/LABEL`."""

    candidate: Candidate
    answers: Answers
    scores: dict[str, Array]


class Measurements:
    """Policies measured on a bench; holds the reference in memory from the first one that has to be opened."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._base: PreTrainedModel | None = None

    def measure(self, candidate: Candidate, *, tax: bool = True) -> tuple[Answers, list[float], dict[str, Any]]:
        """Return a policy's answers, and with `tax` the mean log-likelihoods of the plain texts and the tasks' figures."""
        jobs = {"answers": self._answers_job(self.bench.config.samples_per_prompt, self.bench.prompts, measure=True)}
        if tax:
            jobs["texts"] = self._texts_job()
            if self.bench.tasks is not None:
                jobs["tasks"] = self._tasks_job(self.bench.tasks)
        results = self._run(candidate, jobs)
        return Answers(**results["answers"]), results.get("texts", []), results.get("tasks", {})

    def measure_snapshots(self, snapshots: Sequence[Candidate]) -> tuple[list[tuple[Candidate, Answers]], list[str]]:
        """Return the answers of snapshots, and why others could not be opened: a broken one does not cost the rest."""
        measured, broken = [], []
        for snapshot in snapshots:
            try:
                measured.append((snapshot, self.measure(snapshot, tax=False)[0]))
            except UserError as error:
                broken.append(f"snapshot {snapshot.name} left out: {error}")
        return measured, broken

    def check(self, candidate: Candidate) -> dict[str, Any]:
        """Return a policy's figures in the task checks, `check/FILE/FIGURE`."""
        checks = self.bench.checks
        texts = self._run(candidate, {check.name: self._check_job(check) for check in checks})
        return {
            f"check/{check.name}/{name}": figure
            for check in checks
            for name, figure in check.figures(texts[check.name], self.bench.config.seed).items()
        }

    def best_of(self) -> Answers:
        """Return `best_of` answers of the reference to each of the first prompts."""
        comparison, config = self.bench.comparison, self.bench.config
        reference = next(c for c in comparison.models if c.name == comparison.reference.reference)
        job = self._answers_job(config.best_of, self.bench.prompts[: config.best_of_prompts], measure=False)
        return Answers(**self._run(reference, {"answers": job})["answers"])

    def _run(self, candidate: Candidate, jobs: Mapping[str, Job]) -> dict[str, Any]:
        """Return the results of jobs; the policy is opened only if one has no result yet."""
        config, reference, compute = self.bench.config, self.bench.comparison.reference, self.bench.compute
        common = {
            "policy": candidate.hash,
            "reference": reference.hash,
            "form": [str(compute.dtype), config.quantization, compute.device.type],
        }
        results = {name: self.bench.results.read({**common, **key}) for name, (key, _) in jobs.items()}
        missing = [name for name in jobs if results[name] is None]
        if missing:
            print(f"evaluation: {candidate.name}", flush=True)
            with opened(candidate, self._reference(), reference, config, compute) as models:
                for name in missing:
                    key, compute_result = jobs[name]
                    results[name] = self.bench.results.write({**common, **key}, compute_result(models))
        return results

    def _reference(self) -> PreTrainedModel:
        """Return the reference, loaded at the first call; raise `UserError` where its context is too short."""
        if self._base is None:
            bench = self.bench
            self._base = load_policy(bench.comparison.reference, bench.config, bench.compute)
            context, longest = context_length(self._base), max(map(len, bench.prompts))
            require(
                longest + bench.config.response_length <= context,
                f"a prompt of {longest} tokens with response_length={bench.config.response_length} does not fit into the "
                f"model's context of {context} tokens; lower response_length",
            )
        return self._base

    # Jobs

    def _answers_job(self, samples: int, prompts: list[list[int]], *, measure: bool) -> Job:
        bench, config = self.bench, self.bench.config
        # Best-of-n must not choose among the very answers that it is compared with.
        seed = config.seed if measure else config.seed + 1

        def sample(models: RoleModels) -> dict[str, Any]:
            answers = sample_answers(
                models,
                bench.tokenizer,
                prompts,
                samples,
                bench.options,
                batch_size=config.per_device_eval_batch_size,
                seed=seed,
                measure=measure,
            )
            return dataclasses.asdict(answers)

        sampling = {"temperature": config.temperature, "length": config.response_length, "seed": seed}
        return {"answers": prompts, "samples": samples, **sampling, "measure": measure}, sample

    def _texts_job(self) -> Job:
        bench = self.bench

        def logprobs(models: RoleModels) -> list[float]:
            with models.merged_policy() as policy:
                return text_logprobs(
                    policy,
                    bench.windows,
                    pad_token_id=bench.options.pad_token_id,
                    compute=bench.compute,
                    batch_size=bench.config.per_device_eval_batch_size,
                )

        return {"texts": bench.windows}, logprobs

    def _tasks_job(self, tasks: Tasks) -> Job:
        bench, config = self.bench, self.bench.config

        def run_tasks(models: RoleModels) -> dict[str, Any]:
            with models.merged_policy() as policy, bench.compute.autocast():
                return tasks(policy, bench.tokenizer, config.per_device_eval_batch_size, config.seed)

        folder = Path(config.task_folder) if config.task_folder else None
        files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder else []
        return {"tasks": tasks.names, "limit": tasks.limit, "files": [sha256_file(file) for file in files]}, run_tasks

    def _check_job(self, check: Check) -> Job:
        tokenizer, config = self.bench.tokenizer, self.bench.config
        prompts = [encode_prompt(tokenizer, prompt) for prompt in check.prompts]

        def answer(models: RoleModels) -> list[str]:
            with models.merged_policy() as policy:
                return likeliest_answers(
                    policy, tokenizer, prompts, config.check_length, config.per_device_eval_batch_size
                )

        return {"check": prompts, "length": config.check_length}, answer
