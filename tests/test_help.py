"""Help texts: groups, defaults and units, at any width; options that were renamed; completion in a shell."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import Call

import rlhf.__main__ as entry
from rlhf.base.errors import UserError
from rlhf.completion import ARTEFACTS, FILES, SHELLS, parser_of, script
from rlhf.config import (
    EvaluationConfig,
    PPOConfig,
    PretrainConfig,
    RewardCardConfig,
    RewardConfig,
    SFTConfig,
    build,
    options_parser,
    parse,
    parse_config,
)
from rlhf.config.options import HELP_GROUPS, option_groups
from rlhf.data_prep.prepare.recipe import Options, Source
from rlhf.generation.config import ChatConfig, GenerateConfig

CONFIGS: tuple[Any, ...] = (
    *(PretrainConfig, SFTConfig, RewardConfig, PPOConfig, RewardCardConfig, EvaluationConfig),
    *(GenerateConfig, ChatConfig, Options),
)
SUMMARIES = {name: verb.summary for name, verb in entry.VERBS.items()}


@pytest.fixture
def shown(call: Callable[..., Call], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`shown("ppo", columns=80)` is what `rlhf ppo --help` prints on such a terminal."""
    monkeypatch.setattr(entry, "main", entry.dispatch)

    def run(*words: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        return str(call("rlhf.__main__", *words, "--help").out)

    return run


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("verb", entry.VERBS)
def test_help_is_legible_at_any_width(shown: Callable[..., str], verb: str, columns: int) -> None:
    """Half of `rlhf ppo --help` was a usage text in which no option could be found."""
    lines = shown(verb, columns=columns).splitlines()
    assert max(map(len, lines)) <= min(columns, 120)
    usage = [line for line in lines if line.startswith("usage: ")]
    assert len(usage) == 1 and all("--learning" not in line for line in usage)


@pytest.mark.parametrize("config_type", CONFIGS, ids=lambda c: c.__name__)
def test_every_option_stands_once_in_a_group_with_its_default(
    config_type: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a group whose first option was renamed, a new class without groups, a default that is not shown."""
    monkeypatch.setenv("COLUMNS", "100")
    text = options_parser(config_type, prog="rlhf").format_help()
    groups = option_groups(config_type)
    for owner in config_type.__mro__:
        assert set(vars(owner).get("GROUPS", {})) <= set(groups), owner
    for field in dataclasses.fields(config_type):
        (entry,) = re.findall(rf"^  --{field.name}\b.*(?:\n   .*)*", text, flags=re.MULTILINE)
        above = re.findall(r"^(\S.*):$", text[: text.index(entry)], flags=re.MULTILINE)
        assert above[-1] == groups[field.name] and above[-1] in HELP_GROUPS
        words = " ".join(entry.split())
        if "default:" in field.metadata["help"]:
            assert "(default" not in words and "(required)" not in words
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            assert words.endswith("(required)")
        elif field.default not in (None, "", dataclasses.MISSING):
            default = (
                {True: "true", False: "false"}.get(field.default, field.default)
                if isinstance(field.default, bool)
                else field.default
            )
            assert words.endswith(f"(default: {f'{default:g}' if isinstance(default, float) else default})")


def test_groups_of_an_option_that_a_stage_defines_again() -> None:
    """Catches: the step size of pretraining among its model's options, which stand above it in the class."""
    assert option_groups(PretrainConfig)["learning_rate"] == option_groups(SFTConfig)["learning_rate"] == "optimisation"
    assert option_groups(PPOConfig)["kl_coef"] == "KL penalty" and option_groups(PPOConfig)["temperature"] == "sampling"


def test_help_of_data_shows_the_options_of_own_data(shown: Callable[..., str]) -> None:
    """It showed the four options of the demo's data."""
    text = shown("data")
    assert all(f"--{field.name}" in text for field in dataclasses.fields(Options))
    assert all(re.search(rf"^  {field.name} ", text, flags=re.MULTILINE) for field in dataclasses.fields(Source))
    assert "responses_per_prompt" not in text and "rlhf data show" in text


# Options that were renamed


@pytest.mark.parametrize(
    "config_type, old, words",
    [
        (RewardCardConfig, "data", ["--model", "reward/a"]),
        (EvaluationConfig, "prompts", ["--models", "sft/a"]),
        (GenerateConfig, "prompts", ["--model", "sft/a"]),
    ],
)
def test_the_data_folder_is_called_dataset(
    config_type: Any, old: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One thing had three names. Command lines and files with the earlier ones still work, and say the new one."""
    parse._note.cache_clear()
    today = parse_config(config_type, [*words, "--dataset", "d"])
    assert capsys.readouterr().err == "" and today.dataset == "d"
    for earlier in ([f"--{old}", "d"], [f"--{old}=d"]):
        assert parse_config(config_type, [*words, *earlier]) == today
    assert capsys.readouterr().err == f"note: --{old} is called --dataset now\n"  # once
    (tmp_path / "old.yaml").write_text(f"{old}: d\n{words[0][2:]}: {words[1]}\n")
    assert parse_config(config_type, ["--config", str(tmp_path / "old.yaml")]) == today
    assert capsys.readouterr().err == f"note: {tmp_path}/old.yaml: {old} is called dataset now\n"
    with pytest.raises(UserError, match=f"{old} is an earlier name of dataset; leave one out"):
        build(config_type, {old: "d", "dataset": "d"}, "both.yaml")
    with pytest.raises(UserError, match="did you mean 'dataset'"):
        parse_config(config_type, [*words, "--datasets", "d"])


# Completion


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """The script of each shell."""
    return {shell: script(shell, SUMMARIES, entry.dispatch) for shell in SHELLS}


@pytest.fixture
def complete(scripts: dict[str, str], tmp_path: Path) -> Callable[..., list[str]]:
    """`complete("ppo", "--kl")` is what bash offers for the last word; no Python is on its path."""
    for artefact in ("sft/mine/v1", "sft/mine/v2", "ppo/mine/v1"):
        (tmp_path / "registry" / artefact).mkdir(parents=True)
    (tmp_path / "rlhf.bash").write_text(scripts["bash"])
    call = 'COMP_WORDS=(rlhf "$@"); COMP_CWORD=$#; _shtab_rlhf rlhf "${@: -1}" ""; printf "%s\\n" "${COMPREPLY[@]}"'

    def run(*words: str) -> list[str]:
        shell = shutil.which("bash") or "bash"
        done = subprocess.run(
            [shell, "-c", f"source rlhf.bash; {call}", "bash", *words],
            cwd=tmp_path, env={"PATH": "/nowhere"}, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.stderr == ""
        return done.stdout.split()

    return run


@pytest.mark.parametrize(
    "words, offered",
    [
        (["p"], ["pipeline", "plan", "pretrain", "ppo"]),
        (["ppo", "--kl"], ["--kl_coef", "--kl_target", "--kl_horizon"]),
        (["ppo", "--dtype", "b"], ["bfloat16"]),
        (["ppo", "--policy", "s"], ["sft/mine"]),
        (["chat", "--compare", "sft/mine", "p"], ["ppo/mine"]),
        (["registry", "l"], ["list", "lineage"]),
        (["registry", "show", ""], ["ppo/mine", "sft/mine"]),
        (["data", "--sim"], ["--similarity"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["sft", "--config", "rlhf.b"], ["rlhf.bash"]),
    ],
)
def test_bash_completes(complete: Callable[..., list[str]], words: list[str], offered: list[str]) -> None:
    """Catches: a verb, an option, a choice or an artefact that TAB does not know; a Python that starts at each TAB."""
    assert complete(*words) == offered


def test_every_verb_and_option_is_in_every_script(scripts: dict[str, str]) -> None:
    """Catches: a verb whose help is not that of a parser, so that completion cannot see it."""
    for verb in entry.VERBS:
        options = ["shell"] if verb == "completion" else [a.dest for a in parser_of(verb, entry.dispatch)._actions]
        assert options
        for shell, text in scripts.items():
            assert verb in text and (
                verb == "completion" or all(name in text for name in options if name != "command")
            ), shell


def test_completed_values_belong_to_options_that_exist() -> None:
    """Catches: an option that was renamed, whose values are not completed any more."""
    names = {a.dest for verb in entry.VERBS if verb != "completion" for a in parser_of(verb, entry.dispatch)._actions}
    names |= {"ref", "a", "b", "folder", "into"}  # arguments of the registry's verbs
    assert names >= ARTEFACTS | FILES
