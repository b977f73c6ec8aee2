"""The `rlhf` command."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toys import Call

from rlhf.__main__ import ALIASES, VERBS
from rlhf.base.functions import load_function

Caller = Callable[..., Call]


@pytest.fixture
def rlhf(call: Caller, monkeypatch: pytest.MonkeyPatch) -> Caller:
    """`rlhf("sft", "--help")` in this process."""
    import rlhf.__main__ as entry

    monkeypatch.setattr(entry, "main", entry.dispatch)  # `call` brings its own run_command
    return lambda *words: call("rlhf.__main__", *words)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_verbs(rlhf: Caller, words: list[str]) -> None:
    """A verb that exists and is not in the help text."""
    shown = rlhf(*words)
    assert shown.code == 0 and shown.err == ""
    verbs = shown.out.split("first steps:")[0].splitlines()
    assert [line.split()[0] for line in verbs if re.match("  [a-z]", line)] == list(VERBS)
    assert max(map(len, shown.out.splitlines())) <= 80


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(rlhf: Caller, verb: str) -> None:
    """A verb whose module was moved, or whose main does not read the command line, fails only for its user."""
    shown = rlhf(verb, "--help")
    assert shown.code == 0, shown.err
    assert "usage" in shown.out.lower() and len(shown.out.splitlines()) >= 3


@pytest.mark.parametrize(
    "words", [*([verb] for verb in VERBS), ["registry", "export"], ["doctor", "preflight"], ["doctor", "investigate"]]
)
def test_help_imports_nothing_slow(words: list[str]) -> None:
    """`rlhf ppo --help` took 9 to 11 s of CPU: torch and transformers' models were imported to print a few lines."""
    watched = (
        "import atexit, resource, sys\n"
        "def report():\n"
        "    usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    print(usage.ru_utime + usage.ru_stime, 'torch' in sys.modules, file=sys.stderr)\n"
        "atexit.register(report)\n"
        "from rlhf.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched, *words, "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    seconds, torch = done.stderr.split()
    assert "usage: " in done.stdout and torch == "False" and float(seconds) < 2


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.options])
def test_wrong_options_need_not_wait_for_the_module(rlhf: Caller, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """A slip in an option was reported after ten seconds of imports. The table must name the options that `main` reads."""
    module = importlib.import_module(VERBS[verb].module)
    options = load_function(VERBS[verb].options)
    read: list[object] = []
    monkeypatch.setattr(module, "parse_config", lambda kind: read.append(kind) or sys.exit(0))
    with pytest.raises(SystemExit):
        module.main()
    assert read == [options]
    monkeypatch.setattr(module, "main", lambda: pytest.fail("its module was run"))
    assert "no_such_option" in rlhf(verb, "--no_such_option").complaint


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_unknown_option(rlhf: Caller, toy_config: Path, verb: str) -> None:
    """argparse's own way out is exit code 2 as well, but with the whole usage before the error."""
    needed = {
        "pipeline": ["--config", str(toy_config)],
        "plan": ["--config", str(toy_config)],
        "init": ["file.jsonl"],
        "registry": ["list"],
        "report": ["folder"],
        "tracking": ["dashboard"],
        "doctor": ["folder"],
        "completion": ["bash"],
    }
    refused = rlhf(verb, *needed.get(verb, []), "--no_such_option")
    assert "no_such_option" in refused.complaint
    assert len(refused.err.splitlines()) == 1


@pytest.mark.parametrize("word, near", [("pipelines", "pipeline"), ("rewards", "reward"), ("PPO", ""), ("xyz", "")])
def test_unknown_verb(rlhf: Caller, word: str, near: str) -> None:
    """A bare `KeyError: 'rewards'`."""
    complaint = rlhf(word).complaint
    assert f"no verb '{word}'" in complaint and "rlhf --help" in complaint
    assert not near or f"did you mean '{near}'" in complaint


def test_pipeline_wants_a_folder(rlhf: Caller, tmp_path: Path) -> None:
    """The folder's missing file has to be told from a missing folder."""
    assert str(tmp_path / "none") in rlhf("pipeline", "--config", tmp_path / "none").complaint
    assert "sft.yaml" in rlhf("pipeline", "--config", tmp_path).complaint
    assert "--config" in rlhf("pipeline").complaint


def test_pipeline_offers_the_nearest_option(rlhf: Caller, toy_config: Path) -> None:
    """An override that no stage has would be dropped in silence."""
    assert "did you mean 'seed'" in rlhf("pipeline", "--config", toy_config, "--sed", "1").complaint
    assert "needs a value" in rlhf("pipeline", "--config", toy_config, "--seed").complaint


def test_registry_of_the_toy_pipeline(rlhf: Caller, finished: tuple[Path, Path]) -> None:
    """`rlhf registry list` is how one finds the name that --policy wants."""
    shown = rlhf("registry", "list", "--registry", finished[0])
    assert shown.code == 0 and all(f"{stage}/toy@1" in shown.out for stage in ("sft", "reward", "ppo"))


@pytest.mark.parametrize("module, verb", ALIASES.items())
def test_a_verb_goes_by_its_modules_name_too(rlhf: Caller, module: str, verb: str) -> None:
    """`rlhf data_prep`, as the documentation had it, was no verb."""
    assert rlhf(module, "--help") == rlhf(verb, "--help")


def test_verbs_name_modules_with_a_main() -> None:
    """The table of verbs and the modules, without starting any of them."""
    for verb in VERBS.values():
        assert callable(importlib.import_module(verb.module).main)


def test_in_a_process(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """`python -m rlhf` and the installed `rlhf` are the same; help imports no torch, so it comes at once."""
    done = command("rlhf", "--help")
    assert done.returncode == 0 and done.stderr == "" and "pipeline" in done.stdout
    script = Path(sys.executable).parent / "rlhf"
    if script.exists():
        installed = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
        assert (installed.returncode, installed.stdout) == (0, done.stdout)
    bad = command("rlhf", "pipelin")
    assert bad.returncode == 2 and bad.stderr.startswith("error: no verb 'pipelin' (did you mean 'pipeline'?)")
    assert len(bad.stderr.splitlines()) == 1
