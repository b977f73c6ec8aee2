"""Functions of users as rewards and judges: whatever they do, the run gets scores or one clear line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Call

from rlhf.base.errors import UserError
from rlhf.reward.functions import RewardError, ScoringFunction, load_gold
from rlhf.run import checkpoint


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module with this text, `NAME` replaced by the function's name; returns how it is named in a config."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def make(text: str) -> str:
        name = f"own_function_{tmp_path.name.replace('-', '_')}_{len(made)}"
        made.append(name)
        (tmp_path / f"{name}.py").write_text(text)
        return f"{name}:score"

    return make


TEXTS = ["one", "three", "seventeen"]


@pytest.mark.parametrize(
    "scores",
    [
        "[1, 2.5, -3]",
        "(1, 2.5, -3)",
        "numpy.array([1, 2.5, -3])",
        "[numpy.float32(1), numpy.float64(2.5), numpy.int64(-3)]",
        "torch.tensor([1, 2.5, -3])",
        "torch.tensor([1, 2.5, -3], dtype=torch.bfloat16, requires_grad=True)",
        "[torch.tensor(1), torch.tensor(2.5), torch.tensor(-3.0, requires_grad=True)]",
    ],
)
def test_numbers_of_every_library_are_scores(scores: str, write: Callable[[str], str]) -> None:
    """Catches: a run that ends because its function returned a numpy or torch scalar."""
    name = write(f"import numpy, torch\ndef score(texts):\n    return {scores}\n")
    assert load_gold(name)(TEXTS) == [1.0, 2.5, -3.0]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return b'abc'", "must give 3 scores, one for each response; got 3"),
        ("raise type('Odd', (BaseException,), {})('x')", "Odd: x"),
        ("return [type('V', (), {'__repr__': lambda self: 1 / 0})(), 1.0, 2.0]", "ZeroDivisionError"),
        ("import torch\n    return torch.zeros(3, device='meta')", "Cannot copy out of meta tensor"),
        ("return [1.0, 2.0]", "must give 3 scores, one for each response; got 2"),
        ("return [1.0, float('nan'), 2.0]", "gave nan for response 2 of 3"),
        ("return [1.0, 1e39, 2.0]", "gave 1e[+]39 for response 2 of 3"),
        ("return [1.0, 10**400, 2.0]", "gave 1000.* for response 2 of 3"),
        ("return [[1.0], [2.0], [3.0]]", r"gave \[1.0\] for response 1 of 3"),
        ("return [1.0, None, 2.0]", "gave None for response 2 of 3"),
        ("import sys; sys.exit(3)", r"ended the process with sys\.exit\(3\)"),
        ("import sys; sys.exit()", r"ended the process with sys\.exit\((None|0)\)"),  # 0 once wandb has replaced it
        ("raise MemoryError('big')", "failed at .*MemoryError: big"),
        ("raise StopIteration", "failed at .*StopIteration"),
    ],
)
def test_whatever_else_it_does_is_one_line(body: str, complaint: str, write: Callable[[str], str]) -> None:
    """Catches: a judge whose figures are NaN or of other responses, and a process that ends with the user's exit code."""
    with pytest.raises(RewardError, match=complaint):
        load_gold(write(f"def score(texts):\n    {body}\n"))(TEXTS)


def test_sigterm_inside_a_function_is_no_failure_of_its_own(write: Callable[[str], str]) -> None:
    """Catches: a stop from outside, reported as a mistake in the user's code."""
    with pytest.raises(SystemExit):
        load_gold(write("import sys\ndef score(texts):\n    sys.exit(143)\n"))(TEXTS)


def test_it_changes_neither_the_data_nor_the_process(
    write: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches: rows that a function rewrote and the policy trained on; checkpoints in another folder; lines among answers."""
    name = write(
        "import os, torch\ndef score(prompts, tags):\n    prompts[0]['content'] = 'other'\n    tags[0].append(1)\n"
        "    os.chdir('/')\n    torch.set_grad_enabled(False)\n    torch.set_default_dtype(torch.float64)\n"
        "    os.write(1, b'written')\n    os.system('echo printed')\n    return [1.0]\n"
    )
    prompts, tags, place = [{"content": "own"}], [[0]], Path.cwd()
    assert ScoringFunction(name)(1, prompts, tags=tags).tolist() == [1.0]
    assert (prompts, tags, Path.cwd()) == ([{"content": "own"}], [[0]], place)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert capfd.readouterr() == ("", "writtenprinted\n")


@pytest.mark.parametrize("ending", ["return [1.0] * len(texts)", "raise ValueError", "import sys; sys.exit(0)"])
def test_a_fork_does_not_go_on_training(ending: str, write: Callable[[str], str], tmp_path: Path) -> None:
    """Catches: a child process that returns into the trainer and trains, logs and registers beside its parent."""
    marks = tmp_path / "marks"
    marks.mkdir()
    function = ScoringFunction(
        write(
            "import os\ndef score(texts):\n    child = os.fork()\n    if child == 0:\n        "
            f"{ending}\n    os.waitpid(child, 0)\n    return [2.0] * len(texts)\n"
        )
    )
    process = os.getpid()
    try:
        scores = function(3, TEXTS)
    except BaseException:
        if os.getpid() != process:
            (marks / str(os.getpid())).touch()
            os._exit(0)
        raise
    (marks / str(os.getpid())).touch()
    if os.getpid() != process:
        os._exit(0)
    assert scores.tolist() == [2.0] * 3 and [mark.name for mark in marks.iterdir()] == [str(process)]


def test_what_it_prints_stays_out_of_the_answers(
    write: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: lines of a user's function between the JSON lines that another program reads."""
    load_gold(write("def score(texts):\n    print('looking')\n    return [1.0] * len(texts)\n"))(TEXTS)
    out, err = capsys.readouterr()
    assert out == "" and "looking" in err


@pytest.mark.parametrize(
    ("signature", "seen"),
    [
        ("prompts, responses, **columns", {"level", "prompts_", "responses_"}),
        ("prompts, responses, level", {"level"}),
        ("prompts, responses", set()),
        ("prompts, responses, level=None, *, responses_=None", {"level", "responses_"}),
    ],
)
def test_columns_arrive_as_far_as_they_are_taken(signature: str, seen: set[str], write: Callable[[str], str]) -> None:
    """Catches: a data set with one column more than the function takes, or with a column called `responses`, which stopped the
    run."""
    from rlhf.reward.sources import FunctionReward

    text = (
        f"seen = set()\ndef score({signature}):\n    here = dict(locals())\n    here.update(here.pop('columns', {{}}))\n"
        "    seen.update(name for name, values in here.items() if values is not None and name not in ('prompts', 'responses'))\n"
        "    return [1.0] * len(responses)\n"
    )
    reward = FunctionReward(write(text))
    rows = [{"prompt": [{"role": "user", "content": "a"}], "level": 1, "prompts": "x", "responses": ["y"]}] * 3
    responses: Any = type("Responses", (), {"texts": TEXTS, "rows": rows})()
    assert reward(responses).tolist() == [1.0] * 3
    assert reward.function.function.__globals__["seen"] == seen


def test_a_judge_that_fails_in_the_middle_leaves_a_checkpoint(
    finished: tuple[Path, Path],
    toy_config: Path,
    tmp_path: Path,
    call: Callable[..., Call],
    write: Callable[[str], str],
) -> None:
    """Catches: updates lost to the gold judge, and a run whose judge gave NaN and which registers the mean of it."""
    name = write(
        "calls = []\ndef score(texts):\n    calls.append(1)\n"
        "    return [float('nan') if len(calls) == 4 else 1.0 * len(t) for t in texts]\n"
    )
    words = ["--config", toy_config / "ppo.yaml", "--registry", finished[0], "--save_steps", 100, "--gold", name]
    done = call("rlhf.stages.ppo", *words, "--name", "judged", "--output_dir", tmp_path / "out")
    assert done.code == 2 and "gave nan for response 1 of" in done.complaint
    latest = checkpoint.latest(tmp_path / "out" / "ppo" / "checkpoints")
    assert latest is not None and latest.name == "checkpoint-1"
    assert json.loads((tmp_path / "out" / "ppo" / "metrics.jsonl").read_text().splitlines()[1])["step"] == 1
    assert not (finished[0] / "ppo" / "judged").exists()


def test_a_judge_that_is_none_is_refused_before_the_training(
    finished: tuple[Path, Path], toy_config: Path, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Catches: a misspelt judge found after hours."""
    shutil.copytree(finished[0], tmp_path / "registry")
    words = ["--config", toy_config / "ppo.yaml", "--registry", tmp_path / "registry", "--gold", "json:nothing"]
    assert "cannot load 'json:nothing'" in call("rlhf.stages.ppo", *words, "--output_dir", tmp_path / "out").complaint
    with pytest.raises(UserError, match="is not a function"):
        load_gold("json:__name__")
