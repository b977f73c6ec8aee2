"""Types of the files that pages are made from; parts that lack them are left out and named on the page."""

from __future__ import annotations

from typing import Annotated, Any, Required, TypedDict

from rlhf.registry.manifest import Data, Figures, Options, Phase

Json = dict[str, Any]


class Answers(TypedDict, total=False):
    """A line of `comparison.jsonl`."""

    prompt: str
    sft_response: str
    ppo_response: str
    sft_score: float
    ppo_score: float


class ModelSample(TypedDict, total=False):
    """A model's answer in a `Sample`."""

    response: str
    scores: Json


class Sample(TypedDict, total=False):
    """A line of `samples.jsonl` of an evaluation."""

    prompt: str
    sample: int
    models: dict[str, ModelSample]


class Record(TypedDict, total=False):
    """`tracking.json`."""

    run_id: str
    stage: str
    config: Json
    inputs: dict[str, str]


class Parent(TypedDict):
    """An artefact that another one was made from."""

    stage: str
    name: str
    version: int
    hash: str


class Manifest(TypedDict, total=False):
    """`manifest.json`, also of an older version of this package."""

    name: str
    version: int
    created: str
    parents: list[Parent]
    base_model: str
    base_model_revision: str
    data: Annotated[Json, Data]
    config: Annotated[Json, Options]
    metrics: Annotated[Json, Figures]
    code_commit: str
    wandb_run_id: str
    library_versions: dict[str, str]


class Source(TypedDict, total=False):
    """An artefact in `results.json`."""

    reference: str
    hash: str
    run_id: str


class Results(TypedDict, total=False):
    """`results.json`."""

    pretrain: Json
    sft: Json
    reward: Json
    ppo: Json
    total_seconds: float
    peak_rss_gb: float
    artifacts: dict[str, Source]
    phases: list[Phase]
    machine: Json
    seed: int
    created: str


class DataCard(TypedDict, total=False):
    """`card.json` of prepared data."""

    rows: dict[str, int]


class Figure(TypedDict, total=False):
    """A figure with its interval."""

    value: float
    low: float
    high: float


class Rival(TypedDict, total=False):
    """A trivial scorer beside a reward model."""

    name: str
    accuracy: Figure


class Slice(Figure, total=False):
    """The accuracy on one kind of pair."""

    slice: str
    kind: str


class Bin(TypedDict):
    """A point of the calibration's curve."""

    confidence: float
    right: float


class Calibration(TypedDict, total=False):
    """How far a reward model's probabilities can be trusted."""

    bins: list[Bin]
    ece: float
    temperature: float


class LengthPoint(TypedDict):
    """A point of the curve of score and rating by length."""

    length: float
    score: float
    rating: float


class Length(TypedDict, total=False):
    """Figures of how a reward model scores length."""

    correlation: float
    label_correlation: float
    balanced_accuracy: Figure
    curve: list[LengthPoint]


class Probe(TypedDict, total=False):
    """An edit that should not raise the score."""

    name: str
    gain: float
    raised: float
    flagged: bool
    example: Json


class Histogram(TypedDict):
    """Scores of responses."""

    edges: list[float]
    samples: list[float]
    training: list[float]


class ScoredText(TypedDict, total=False):
    """A response of the policy with its score."""

    prompt: str
    response: str
    score: float


class PolicySamples(TypedDict, total=False):
    """The policy's own responses."""

    outside: float
    histogram: Histogram
    examples: list[ScoredText]


class Flag(TypedDict, total=False):
    """A reason to look at a reward model."""

    name: str
    message: str


class LeftOut(TypedDict, total=False):
    """Rows that a card does not count, for one reason."""

    count: int
    rows: list[int]


class Card(TypedDict, total=False):
    """`card.json` of a reward model."""

    verdict: str
    flags: list[Flag]
    notes: list[str]
    accuracy: Figure
    accuracy_held_out_prompts: Figure
    accuracy_held_out_raters: Figure
    human_ceiling: Figure
    gold_accuracy: Figure
    rivals: list[Rival]
    calibration: Calibration
    slices: list[Slice]
    length: Length
    probes: list[Probe]
    samples: PolicySamples
    left_out: dict[str, dict[str, LeftOut]]


class Model(TypedDict, total=False):
    """A model of an evaluation."""

    name: Required[str]
    hash: str
    run_id: str
    marks: list[str]
    figures: dict[str, Figure]


class WinRate(Figure, total=False):
    """A win rate of an evaluation."""

    model: str
    baseline: str
    judge: str
    sign_test: Json
    length_controlled: Figure


class Point(TypedDict, total=False):
    """A policy over its distance from the reference."""

    model: str
    run: str
    update: int
    sqrt_kl: float
    score_gain: Figure
    gold_gain: dict[str, Figure]


class Fit(TypedDict, total=False):
    """A fitted curve."""

    run: str
    scorer: str
    a: float
    b: float


class Recommended(TypedDict, total=False):
    """The checkpoint that an evaluation recommends."""

    model: str
    update: int
    kl: float
    gold: str
    gain: Figure


class Frontier(TypedDict, total=False):
    """Gains over KL."""

    points: list[Point]
    recommended: Recommended
    fits: list[Fit]


class BestPoint(TypedDict, total=False):
    """A point of best-of-n."""

    n: Required[int]
    kl: Required[float]
    score: Figure
    gold: dict[str, Figure]


class BestOfN(TypedDict, total=False):
    """The curve of best-of-n."""

    curve: list[BestPoint]


class Evaluation(TypedDict, total=False):
    """`evaluation.json`."""

    baseline: str
    marks: list[str]
    models: list[Model]
    win_rates: list[WinRate]
    frontier: Frontier
    best_of_n: BestOfN
