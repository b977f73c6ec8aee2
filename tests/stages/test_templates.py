"""Templates through the real stages: what is refused or left out before training, and what later stages go on with.

The shared cases are those of RLHF_SHARED_CASES, or of shared/cases beside the repository.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toys import Call
from transformers import AutoTokenizer

from rlhf.config import SFTConfig
from rlhf.models.templates import TEMPLATES
from rlhf.models.tokenization import encode_prompt, load_tokenizer
from rlhf.registry import Registry
from rlhf.stages import sft

CASES = Path(os.environ.get("RLHF_SHARED_CASES", Path(__file__).parents[3] / "shared" / "cases"))
shared = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATES["chatml"]
)
DATED = "{{ strftime_now('%d %b %Y') }}\n" + TEMPLATES["chatml"]
USER = [{"role": "user", "content": "What is the film?"}]


class Desk:
    """Runs stages on a template and data of the test's own."""

    def __init__(self, call: Callable[..., Call], folder: Path, config: Path) -> None:
        self.call, self.folder, self.config = call, folder, config
        self.registry, self.template = folder / "registry", folder / "mine.jinja"

    def run(self, stage: str, *more: object) -> Call:
        places = ["--registry", self.registry, "--output_dir", self.folder / "out", "--wandb_mode", "disabled"]
        template = ["--chat_template", self.template] if stage == "sft" and "--chat_template" not in more else []
        return self.call(f"rlhf.stages.{stage}", "--config", self.config / f"{stage}.yaml", *template, *places, *more)

    def talks(self, *rows: list[dict[str, str]]) -> Path:
        file = self.folder / "talks.jsonl"
        file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        return file

    def prompt(self, artefact: str) -> str:
        tokenizer = load_tokenizer(str(Registry(self.registry).get(artefact).path))
        return str(tokenizer.decode(encode_prompt(tokenizer, USER)))

    def data(self, artefact: str = "sft/toy") -> dict[str, Any]:
        return Registry(self.registry).get(artefact).manifest.data


@pytest.fixture
def desk(call: Callable[..., Call], tmp_path: Path, toy_config: Path) -> Desk:
    return Desk(call, tmp_path, toy_config)


def talk(number: int, answer: str = "The plot is good") -> list[dict[str, str]]:
    return [{"role": "user", "content": f"film {number}"}, {"role": "assistant", "content": answer}]


SHORT = ["--max_steps", 2, "--max_length", 512]


# Inputs of the same kinds as the shared cases


def test_a_change_in_a_late_row_stops_sft_and_reward(desk: Desk) -> None:
    """Only the first rows were looked at, so reasoning was cut from all others. The two splits of a file are one file to its
    owner: the first row of both is named."""
    desk.template.write_text(
        TEMPLATES["chatml"].replace("message['content']", "message['content'].split('</think>')[-1]")
    )
    rows = [*map(talk, range(30)), *(talk(n, "<think>was</think>good") for n in range(30, 60))]
    complaint = desk.run("sft", "--dataset", desk.talks(*rows), *SHORT).complaint
    assert (
        "talks.jsonl, row 31: the chat template changes the answer '<think>was</think>good': it writes 'good"
        in complaint
    )
    assert desk.run("sft", *SHORT).code == 0, "the toy's own data has no reasoning"
    pairs = [
        {"prompt": f"film {n}", "chosen": "good", "rejected": "bad" if n < 30 else "<think></think>bad"}
        for n in range(60)
    ]
    file = desk.folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert (
        "pairs.jsonl, row 31: the chat template changes the answer" in desk.run("reward", "--dataset", file).complaint
    )


def test_prompts_that_the_template_changes_stop_ppo(desk: Desk) -> None:
    """The policy answers another question than the reward is asked about."""
    desk.template.write_text(TEMPLATES["chatml"].replace("message['content']", "message['content'][:80]"))
    assert desk.run("sft", *SHORT).code == 0
    file = desk.folder / "prompts.jsonl"
    texts = [f"film {n}" + " good" * (20 * (n >= 30)) for n in range(60)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    complaint = desk.run("ppo", "--dataset", file, "--reward", "rlhf.reward.parity:deviation").complaint
    assert "prompts.jsonl, row 31: the chat template changes the text of user 'film 30 good" in complaint


def test_a_refused_row_is_left_out_and_counted(desk: Desk) -> None:
    """One system turn among thousands of rows ended in a message without its file and row."""
    desk.template.write_text(NO_SYSTEM)
    system = [{"role": "system", "content": "good"}]
    rows = [[*system, *talk(n)] if n == 7 else talk(n) for n in range(40)]
    run = desk.run("sft", "--dataset", desk.talks(*rows), *SHORT)
    assert run.code == 0 and "no system turns; another --chat_template may (row 8 of " in run.out
    (reason,) = (reason for counts in desk.data()["dropped"].values() for reason in counts)
    assert "of system, user: no system turns" in reason
    assert [8] in [rows for by_reason in desk.data()["dropped_rows"].values() for rows in by_reason.values()]
    none = desk.run("sft", "--dataset", desk.talks(*([*system, *talk(n)] for n in range(40))), *SHORT)
    assert "the chat template can write none of the" in none.complaint and "no system turns" in none.complaint


def test_a_header_without_generation_prompt_stops_sft(desk: Desk) -> None:
    """The policy was trained to write whose turn it is."""
    desk.template.write_text(TEMPLATES["chatml"].partition("{% if add_generation_prompt")[0])
    assert "writes '<|im_start|>assistant' between the prompt and the answer" in desk.run("sft", *SHORT).complaint


def test_the_date_of_sft_is_that_of_all_later_stages(desk: Desk) -> None:
    """PPO a day later asked with another date than SFT was trained with, and so did whoever took the exported folder."""
    desk.template.write_text(DATED)
    run = desk.run("sft", "--template_date", "2024-03-05")
    assert run.code == 0 and "the chat template writes the date, which is 2024-03-05 from here on" in run.out
    assert Registry(desk.registry).get("sft/toy").manifest.config["template_date"] == "2024-03-05"
    assert desk.run("reward").code == 0 and desk.run("ppo").code == 0
    expected = f"05 Mar 2024\n<|im_start|>user\n{USER[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert [desk.prompt(f"{stage}/toy") for stage in ("sft", "reward", "ppo")] == [expected] * 3
    folder = desk.folder / "exported"
    exported = desk.call("rlhf.sharing", "export", "ppo/toy", folder, "--registry", desk.registry)
    assert exported.code == 0, exported.err
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False) == expected


def test_a_resumed_run_keeps_its_date(tmp_path: Path, toy_base: Callable[[str], Path]) -> None:
    """Resumed after midnight, a run goes on with other texts than it began with."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "mine.jinja").write_text(DATED)

    def first_line(**options: Any) -> tuple[str, str | None]:
        config = SFTConfig(name="toy", model_name_or_path="base", dataset="data", **options)
        run: Any = SimpleNamespace(config=config, folder=tmp_path)
        tokenizer = load_tokenizer(str(toy_base("llama")), chat_template=str(tmp_path / "mine.jinja"))
        sft.freeze_template_date(run, tokenizer)
        return str(tokenizer.apply_chat_template(USER, tokenize=False)).splitlines()[0], run.config.template_date

    today = first_line()
    assert today[1] is not None and (tmp_path / "checkpoints" / sft.DATE_FILE).read_text() == today[1]
    (tmp_path / "checkpoints" / sft.DATE_FILE).write_text("2024-03-05")
    assert first_line(resume=True) == ("05 Mar 2024", "2024-03-05")
    assert first_line() == today


# The shared cases


@shared
def test_reasoning_from_row_11(desk: Desk) -> None:
    template, data = CASES / "template_that_cuts_reasoning.jinja", CASES / "reasoning_from_row_11.jsonl"
    complaint = desk.run("sft", "--chat_template", template, "--dataset", data, *SHORT).complaint
    assert (
        "reasoning_from_row_11.jsonl, row 12: the chat template changes the answer '<think>" in complaint
    )  # rows count from 1


@shared
def test_system_turn_in_one_row(desk: Desk) -> None:
    desk.template.write_text(NO_SYSTEM)
    run = desk.run("sft", "--dataset", CASES / "system_turn_in_one_row.jsonl", *SHORT)
    assert run.code == 0 and "(row 8 of " in run.out and sum(desk.data()["rows"].values()) == 199


@shared
def test_template_with_bom(desk: Desk) -> None:
    assert desk.run("sft", "--chat_template", CASES / "template_with_bom.jinja", *SHORT).code == 0
    assert desk.prompt("sft/toy").startswith("<|im_start|>user\n")


@shared
def test_template_without_generation_prompt(desk: Desk) -> None:
    template = CASES / "template_without_generation_prompt.jinja"
    assert "between the prompt and the answer" in desk.run("sft", "--chat_template", template, *SHORT).complaint


@shared
def test_template_with_todays_date(desk: Desk) -> None:
    template = CASES / "template_with_todays_date.jinja"
    assert desk.run("sft", "--chat_template", template, "--template_date", "1999-12-31", *SHORT).code == 0
    assert desk.prompt("sft/toy").startswith("31 Dec 1999\n<|im_start|>user\n")
