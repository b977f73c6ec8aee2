"""Options: every shipped file loads, every option is read by somebody, the command line wins, and nonsense is refused."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

import rlhf
from rlhf import pipeline
from rlhf.base.errors import UserError
from rlhf.config import (
    EvaluationConfig,
    PPOConfig,
    PretrainConfig,
    RewardCardConfig,
    RewardConfig,
    SFTConfig,
    StageConfig,
    TrainingLength,
    build,
    parse,
    parse_config,
    read_yaml,
)
from rlhf.data_prep import ReviewsConfig, read_recipe
from rlhf.data_prep.prepare.recipe import Options, Source
from rlhf.data_prep.show import ShowConfig
from rlhf.generation.config import ChatConfig, GenerateConfig

PACKAGE = Path(rlhf.__file__).parent
CONFIGS = PACKAGE.parent / "configs"
OPTIONS = PACKAGE / "config"
TYPES: dict[str, Any] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "data": ReviewsConfig,
    "card": RewardCardConfig,
}
MORE: dict[str, Any] = {
    "evaluate": EvaluationConfig,
    "data options": Options,
    "data source": Source,
    "show": ShowConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
}
SFT = ["--name", "n", "--dataset", "d", "--model_name_or_path", "m"]
PPO = ["--name", "n", "--dataset", "d", "--policy", "sft/a", "--reward", "reward/a"]


def sft(*words: str) -> SFTConfig:
    return parse_config(SFTConfig, [*SFT, *words])


def ppo(*words: str) -> PPOConfig:
    return parse_config(PPOConfig, [*PPO, *words])


# Shipped files


OPTION_FILES = sorted(file for file in CONFIGS.rglob("*.y*ml") if file.stem != "sweep")  # test_held_out runs that one


@pytest.mark.parametrize("file", OPTION_FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_shipped_config_loads(file: Path) -> None:
    """A shipped file with a key that was renamed since fails on the first user, not here."""
    kind = TYPES.get(file.stem)
    assert kind is not None, f"{file} is named after no stage: nothing would ever load it"
    values = read_yaml(file)
    config = read_recipe(values, str(file)) if kind is ReviewsConfig else build(kind, values, str(file))
    for key, value in values.items():
        if key == "sources":  # each a mapping, or a path
            assert [source.path for source in config.sources] == [v if isinstance(v, str) else v["path"] for v in value]
            continue
        got = getattr(config, key)
        assert got == value or got == [value] or str(got) == str(value) or float(got) == float(value), key


def test_there_are_shipped_configs() -> None:
    """A moved folder would make the test above pass on nothing."""
    assert {"data.yaml", "sft.yaml", "reward.yaml", "ppo.yaml"} <= {f.name for f in (CONFIGS / "demo").iterdir()}


@pytest.mark.parametrize("folder", sorted({f.parent for f in CONFIGS.rglob("ppo.yaml")}), ids=lambda p: p.name)
def test_stages_of_a_shipped_folder_fit_together(folder: Path) -> None:
    """A PPO file that names another policy than the SFT file makes is refused only after two stages of work."""
    values = {stage: read_yaml(folder / f"{stage}.yaml") for stage in ("sft", "reward", "ppo") if (folder / f"{stage}.yaml").is_file()}  # noqa: E501  # fmt: skip
    if "sft" in values and "reward" in values:
        assert values["ppo"]["policy"] == values["reward"]["policy"] == f"sft/{values['sft']['name']}"
        assert values["ppo"]["reward"] == f"reward/{values['reward']['name']}"


# Options that nobody reads


def attributes_read() -> set[str]:
    """Every NAME that occurs as `something.NAME` in code (not in texts or comments) outside the modules of options."""
    names: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        if file.parent != OPTIONS and file.name != "config.py":
            tree = ast.parse(file.read_text())
            names |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            }
    return names


def properties(config_type: Any, read: set[str]) -> set[str]:
    """What the config's own properties read, if somebody reads the properties."""
    trees = [ast.parse(file.read_text()) for file in OPTIONS.glob("*.py")]
    functions = [
        node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in read
    ]
    owned = [f for f in functions if isinstance(getattr(config_type, f.name, None), property)]
    return {node.attr for f in owned for node in ast.walk(f) if isinstance(node, ast.Attribute)}


def unread(config_type: Any, read: set[str]) -> list[str]:
    read = read | properties(config_type, read)
    return [f.name for f in dataclasses.fields(config_type) if f.name not in read]


@pytest.mark.parametrize("config_type", [*TYPES.values(), *MORE.values()], ids=[*TYPES, *MORE])
def test_every_option_is_read_somewhere(config_type: Any) -> None:
    """TRL had a `max_grad_norm` that was accepted and never used."""
    assert unread(config_type, attributes_read()) == []


def test_an_option_that_nobody_reads_is_found() -> None:
    """That the test above can fail at all."""

    @dataclasses.dataclass
    class More(SFTConfig):
        no_such_option_anywhere: int = 0

    assert unread(More, attributes_read()) == ["no_such_option_anywhere"]


@pytest.mark.parametrize("config_type", [*TYPES.values(), *MORE.values()], ids=[*TYPES, *MORE])
def test_every_option_has_a_help_text(config_type: Any) -> None:
    """An option without a word in --help."""
    assert [f.name for f in dataclasses.fields(config_type) if not f.metadata.get("help")] == []


# Files and command line


def test_command_line_wins(tmp_path: Path) -> None:
    """The file, read second, would undo what was typed."""
    file = tmp_path / "sft.yaml"
    file.write_text("dataset: d\nmodel_name_or_path: m\nseed: 1\nname: file\nlora_target_modules: [q_proj, v_proj]\n")
    for words in (["--config", str(file), "--seed", "2"], ["--seed", "2", "--config", str(file)]):
        config = parse_config(SFTConfig, words)
        assert (config.seed, config.name, config.lora_target_modules) == (2, "file", ["q_proj", "v_proj"])
    config = parse_config(SFTConfig, ["--config", str(file), "--lora_target_modules", "o_proj"])
    assert config.lora_target_modules == ["o_proj"], "a list is replaced, not added to"


def test_later_file_wins(tmp_path: Path) -> None:
    """Two --config: a base file and a smaller one that changes it."""
    (tmp_path / "a.yaml").write_text("dataset: d\nmodel_name_or_path: m\nseed: 1\nlora_r: 4\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    config = parse_config(SFTConfig, ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert (config.seed, config.lora_r) == (2, 4)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"name: \xff", "is not UTF-8: line 1, byte 7"),
        (b"name: " + b"[" * 10_000 + b"]" * 10_000, "is not valid YAML"),
        (b"name: " + b"[" * 101 + b"]" * 101, "nested too deeply"),
        (b"name: &a [*a]", "nested too deeply"),
        (b"seed: " + b"9" * 5000, "is not valid YAML"),
        (b"name: x\n" + b"#" * parse.MAX_YAML_BYTES, "longer than 1 MB"),
        (b"- name", "must hold a mapping"),
    ],
)
def test_files_that_are_no_configs(tmp_path: Path, content: bytes, reason: str) -> None:
    """UnicodeDecodeError, RecursionError and ValueError were tracebacks; a data file is parsed for minutes."""
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        read_yaml(file)
    assert str(file) in str(error.value)


def test_a_list_that_is_named_a_million_times(tmp_path: Path) -> None:
    """Twenty lines of YAML hold 10^20 entries: whatever visits each of them, such as a message, never ends."""
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20))]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 1,000,000 parts"):
        read_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("\n".join(lines[:6]))
    assert len(read_yaml(tmp_path / "x.yaml")) == 6


@pytest.mark.parametrize(
    "line, reason",
    [
        ("seed: -5", "seed must be from 0 to 4294967295, got -5"),
        (f"seed: {1 << 32}", "seed must be from 0 to 4294967295"),
        ("max_steps: " + "9" * 19, r"max_steps must be 1e\+18 at most"),
        ("max_steps: " + "9" * 400, "a number of 400 digits"),
        ("name: a\nname: b", "`name` stands twice"),
        ("name: {a: 1}", "name must be text, a number"),
        ("lora_target_modules: [[a]]", "lora_target_modules must be text, a number"),
        ('name: "\\ud800"', "not valid YAML"),
        ("lora_target_modules: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    ],
)
def test_values_that_no_option_has(tmp_path: Path, line: str, reason: str) -> None:
    """Each was a traceback, or was taken for something else, in some command."""
    file = tmp_path / "x.yaml"
    file.write_text(f"dataset: d\nmodel_name_or_path: m\n{line}\n")
    with pytest.raises(UserError, match=reason):
        parse_config(SFTConfig, ["--config", str(file)])


def test_values_just_inside(tmp_path: Path) -> None:
    """The largest seed of numpy; a line that stands twice with the same value; a name that is a date."""
    file = tmp_path / "x.yaml"
    file.write_text(f"dataset: d\nmodel_name_or_path: m\nseed: {(1 << 32) - 1}\nname: 2024-01-01\nname: 2024-01-01\n")
    config = parse_config(SFTConfig, ["--config", str(file)])
    assert config.seed == (1 << 32) - 1 and config.name == "2024-01-01"


def test_numbers_of_yaml(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text: the learning rate would be a string, or the default."""
    file = tmp_path / "x.yaml"
    file.write_text("dataset: d\nmodel_name_or_path: m\nlearning_rate: 1e-4\nadam_epsilon: 1e-08\nweight_decay: 0\n")
    config = parse_config(SFTConfig, ["--config", str(file)])
    assert config.learning_rate == 1e-4 and config.adam_epsilon == 1e-8 and config.weight_decay == 0.0
    assert all(isinstance(v, float) for v in (config.learning_rate, config.adam_epsilon, config.weight_decay))


def test_numbers_that_look_like_options(tmp_path: Path) -> None:
    """`-1` after an option is its value, and so is `-1e-3` in YAML, which argparse alone takes for an option."""
    assert sft("--max_steps", "-1").max_steps == -1
    values = {"name": "n", "dataset": "d", "missing_eos_penalty": "-1e-3"}
    assert build(PPOConfig, values, "x.yaml").missing_eos_penalty == -1e-3


@pytest.mark.parametrize("word, value", [("true", True), ("True", True), ("yes", True), ("1", True), ("false", False), ("no", False), ("0", False)])  # noqa: E501  # fmt: skip
def test_words_for_yes_and_no(tmp_path: Path, word: str, value: bool) -> None:
    """`bool('false')` is True."""
    assert sft("--resume", word).resume is value
    file = tmp_path / "x.yaml"
    file.write_text(f"dataset: d\nmodel_name_or_path: m\nresume: {word}\n")
    assert parse_config(SFTConfig, ["--config", str(file)]).resume is value


def test_bool_without_a_word() -> None:
    """`--resume` alone is what everybody types."""
    assert sft("--resume").resume is True
    assert parse_config(RewardConfig, ["--name", "n", "--dataset", "d", "--no_normalize_std"]).normalize_std is False


def test_none_in_yaml_is_the_default() -> None:
    """`chat_template: null` must not become the text 'None', which is then looked for as a file."""
    config = build(SFTConfig, {"name": "n", "dataset": "d", "model_name_or_path": "m", "chat_template": None}, "x.yaml")
    assert config.chat_template is None


def test_equals_sign_and_dashes() -> None:
    """`--seed=3` and `--learning-rate 1e-3` are the same options in other spellings."""
    assert sft("--seed=3").seed == 3
    assert sft("--learning-rate", "1e-3").learning_rate == 1e-3


def test_text_that_starts_with_dashes() -> None:
    """A value in YAML that begins with '--' must not be taken for an option."""
    assert build(SFTConfig, {"dataset": "d", "model_name_or_path": "m", "name": "--seed"}, "x.yaml").name == "--seed"


def test_options_of_the_other_stages_do_not_reach_pretraining() -> None:
    """A step size for SFT and PPO that the base model is trained with, demonstrations that become its text."""
    words = ["dataset=mine", "max_steps=3", "learning_rate=1e-5", "max_length=64"]
    words += ["seed=4", "hidden_size=64", "registry=mine"]
    folder, overrides = pipeline.parse(["--config", str(CONFIGS / "mini_gpt"), *(f"--{word}" for word in words)])
    plain, ours = (pipeline._stage_configs(folder, options) for options in ({}, overrides))
    assert ours["pretrain"] == dataclasses.replace(plain["pretrain"], seed=4, hidden_size=64, registry="mine")
    assert (ours["sft"].dataset, ours["sft"].max_steps, ours["ppo"].learning_rate) == ("mine", 3, 1e-5)


def test_lists_on_the_pipelines_command_line_reach_the_stages() -> None:
    """`--trackers wandb tensorboard`, of which the second word is an unknown option."""
    words = ["--config", str(CONFIGS / "demo"), "--trackers", "wandb", "tensorboard", "--seed", "3"]
    configs = pipeline._stage_configs(*pipeline.parse(words))
    assert {(*config.trackers, config.seed) for config in configs.values()} == {("wandb", "tensorboard", 3)}
    with pytest.raises(UserError, match="--trackers needs a value"):
        pipeline.parse(words[:3])


def test_abbreviations_are_refused() -> None:
    """argparse takes --lear for --learning_rate, and another option when a new one is added."""
    with pytest.raises(UserError, match="unknown option --learning_rat "):
        sft("--learning_rat", "1")


def test_stray_word_is_refused() -> None:
    """`resume` without its dashes would otherwise vanish."""
    with pytest.raises(UserError, match="resume"):
        sft("resume")


@pytest.mark.parametrize("config_type", TYPES.values(), ids=TYPES.keys())
def test_help(config_type: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """One `%` in a help text makes argparse raise where the user asked for help."""
    with pytest.raises(SystemExit) as stop:
        parse_config(config_type, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{f.name}" in text for f in dataclasses.fields(config_type))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_numbers_that_are_none(value: str) -> None:
    """NaN passes every comparison of a limit, and trains a model of NaN."""
    with pytest.raises(UserError, match="missing_eos_penalty must be a finite number"):
        ppo(f"--missing_eos_penalty={value}")


def test_limits_of_generation() -> None:
    """A timeout below zero is an error of the socket, after the models were loaded."""
    with pytest.raises(UserError, match=r"reward_timeout must be above 0, got -1\.0"):
        parse_config(GenerateConfig, ["--model", "sft/a", "--reward_timeout", "-1"])


def test_a_run_is_named_after_its_folder(tmp_path: Path) -> None:
    """A user's first run was registered as sft/demo and written into outputs/demo, among the demo's."""
    (tmp_path / "mine").mkdir()
    for stage, text in {"sft": "model_name_or_path: m\n", "reward": "", "ppo": "learning_rate: 1e-5\n"}.items():
        (tmp_path / "mine" / f"{stage}.yaml").write_text(f"dataset: d\n{text}")
    (tmp_path / "more.yaml").write_text("seed: 3\n")

    def config(kind: Any, stage: str, *words: str) -> Any:
        return parse_config(kind, ["--config", str(tmp_path / "mine" / f"{stage}.yaml"), *words])

    made, reward, ours = config(SFTConfig, "sft"), config(RewardConfig, "reward"), config(PPOConfig, "ppo")
    assert (made.name, made.output_dir) == ("mine", "outputs/mine")
    assert (reward.name, reward.output_dir, reward.policy) == ("mine", "outputs/mine", "sft/mine")
    assert (ours.name, ours.output_dir, ours.policy, ours.reward) == (
        "mine",
        "outputs/mine",
        "sft/mine",
        ["reward/mine"],
    )
    assert pipeline._stage_configs(tmp_path / "mine", {}) == {"sft": made, "reward": reward, "ppo": ours}
    other = config(PPOConfig, "ppo", "--name", "b", "--policy", "sft/c@2")
    assert (other.output_dir, other.policy, other.reward) == ("outputs/b", "sft/c@2", ["reward/b"])
    named = config(SFTConfig, "sft", "--config", str(tmp_path / "more.yaml"))
    assert (named.name, named.seed) == (tmp_path.name, 3)


@pytest.mark.parametrize(
    "kind, words", [(SFTConfig, SFT[2:]), (PPOConfig, PPO[2:]), (RewardConfig, ["--dataset", "d"])]
)
def test_a_run_without_a_name(kind: Any, words: list[str]) -> None:
    """The name of another run in its place, or a traceback."""
    with pytest.raises(UserError, match="the run has no name: give --name NAME, or --config"):
        parse_config(kind, words)
    with pytest.raises(TypeError, match="'name'"):
        kind(dataset="d")


def test_config_without_a_file_name() -> None:
    """`--config` at the end of the line."""
    with pytest.raises(UserError, match="--config needs a file"):
        parse_config(SFTConfig, [*SFT, "--config"])


# Recipes


def test_recipe_leaves_out_places_and_holds_the_rest() -> None:
    """With a place in it, moving the registry would train everything again; without an option, its change would not."""
    one = ppo()
    other = ppo("--registry", "r", "--output_dir", "o", "--resume", "--wandb_mode", "offline", "--wandb_group", "g")
    assert one.recipe() == other.recipe()
    for words in (["--seed", "1"], ["--kl_coef", "0.2"], ["--response_length", "8"], ["--lora_r", "8"]):
        assert ppo(*words).recipe() != one.recipe()


def test_stages_share_their_words() -> None:
    """One word per idea: an option of two stages with two meanings, types or defaults."""
    shared = {f.name for kind in (StageConfig, TrainingLength) for f in dataclasses.fields(kind)}
    shared -= {"eval_steps"}  # in PPO an update is a whole rollout, so its default is lower
    for kind in (SFTConfig, RewardConfig, PPOConfig):
        assert not shared & set(inspect.get_annotations(kind))
