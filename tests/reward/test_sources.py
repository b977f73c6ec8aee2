"""Sources of reward: functions, classifiers, endpoints, and their sum."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import Call, build_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from rlhf.base import http
from rlhf.base.errors import UserError
from rlhf.models.compute import Compute
from rlhf.models.sequences import Sequences
from rlhf.reward import sources
from rlhf.reward.sources import (
    ClassifierReward,
    EndpointReward,
    FunctionReward,
    ModelReward,
    Responses,
    Reward,
    RewardError,
)
from rlhf.run import checkpoint

ROWS = [
    {"prompt": [{"role": "user", "content": "The"}], "level": 1},
    {"prompt": [{"role": "user", "content": "A film"}], "level": 2},
    {"prompt": [{"role": "user", "content": "It is"}], "level": 3},
]
TEXTS = ["The film is good", "bad", "A movie is very awful"]


def responses() -> Responses:
    tokens, mask = torch.ones(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.bool)
    return Responses(
        sequences=Sequences(prompts=tokens, prompt_mask=mask, responses=tokens, mask=mask),
        batches=[torch.arange(3)],
        texts=TEXTS,
        rows=ROWS,
    )


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module with a function `score` of this body; returns how it is named in a config."""
    monkeypatch.syspath_prepend(tmp_path)
    made: list[str] = []

    def make(body: str) -> str:
        name = f"toy_reward_{tmp_path.name.replace('-', '_')}_{len(made)}"
        made.append(name)
        (tmp_path / f"{name}.py").write_text(f"calls = []\ndef score(prompts, responses, **columns):\n    {body}\n")
        return f"{name}:score"

    return make


@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [
        ("reward/demo@2", ModelReward, "demo"),
        ("http://127.0.0.1:8000/v1/score", EndpointReward, "endpoint"),
        ("https://x.org/reward/demo", EndpointReward, "endpoint"),
        ("package.module:score", FunctionReward, "score"),
        ("org/model", ClassifierReward, "model"),
        ("reward/folder/model", ClassifierReward, "model"),
        ("", ClassifierReward, ""),
    ],
)
def test_each_form_of_name_has_one_kind(name: str, kind: type[sources.Kind], label: str) -> None:
    """Catches: a URL that is taken for a hub name, a folder for a registered model, and a name that no kind matches."""
    assert sources.kind_of(name) is kind and kind.label(name) == label


# ---- functions ------------------------------------------------------------------------------------------------------


def test_function_sees_prompts_texts_and_columns(write: Callable[[str], str]) -> None:
    """Catches: rows of one prompt given to another's response, and columns that do not arrive."""
    body = "return [len(r) + 100 * level + len(p[-1]['content']) for p, r, level in zip(prompts, responses, columns['level'])]"
    got = FunctionReward(write(body))(responses())
    assert got.tolist() == [16 + 100 + 3, 3 + 200 + 6, 21 + 300 + 5]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return [1.0, 2.0]", "must give 3 scores, one for each response; got 2"),
        ("return [1.0, float('nan'), 2.0]", "gave nan for response 2 of 3"),
        ("return [1.0, 2.0, 'high']", "gave 'high' for response 3 of 3"),
        ("return '123'", "must give 3 scores"),
        ("return None", "must give a list of 3 numbers, got NoneType"),
        ("return [True, False, True]", "gave True for response 1 of 3"),
        ("return columns['nothing']", r"failed at .*\.py:3: KeyError: 'nothing'"),
    ],
)
def test_scores_that_are_none_are_named(body: str, complaint: str, write: Callable[[str], str]) -> None:
    """Catches: a score that broadcasts, is silently NaN, or a traceback of our code for a mistake in the user's."""
    with pytest.raises(RewardError, match=complaint):
        FunctionReward(write(body))(responses())


def test_sum_is_weighted_and_each_part_is_kept(write: Callable[[str], str]) -> None:
    """Catches: weights in another order than the sources, and parts that are logged weighted."""
    one, two = FunctionReward(write("return [1, 2, 3]")), FunctionReward(write("return [10, 20, 30]"))
    total, parts = Reward({"one": one, "two": two}, [2.0, -0.1])(responses())
    assert total.tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert {name: part.tolist() for name, part in parts.items()} == {"one": [1, 2, 3], "two": [10, 20, 30]}


# ---- endpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> Iterator[Callable[[list[Any]], tuple[str, list[Any]]]]:
    """Serves these answers one after the other (a number is an HTTP status); its URL and the payloads it was sent."""
    servers = []

    def serve(answers: list[Any]) -> tuple[str, list[Any]]:
        seen: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = answers[min(len(seen), len(answers)) - 1]
                body = b"" if isinstance(answer, int) else json.dumps(answer).encode()
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/score", seen

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_endpoint_is_asked_in_batches_and_again_when_it_is_busy(
    endpoint: Callable[..., tuple[str, list[Any]]],
) -> None:
    """Catches: one request for a whole rollout, answers in another order, and a run that dies of one 503."""
    url, seen = endpoint([503, {"scores": [1.5, -2]}, {"scores": [0.25]}])
    assert EndpointReward(url, 2, 10.0)(responses()).tolist() == [1.5, -2.0, 0.25]
    assert [len(payload["responses"]) for payload in seen] == [2, 2, 1]
    assert seen[0] == {"prompts": [ROWS[0]["prompt"], ROWS[1]["prompt"]], "responses": TEXTS[:2]}


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ([{"score": [1]}], "gave no scores: 'scores'"),
        ([{"scores": [1, 2]}], "must give 3 scores, one for each response; got 2"),
        ([404], "gave no scores: 404"),
        ([500], "gave no scores: .*500"),
        ([[1, 2, 3]], "gave no scores"),
    ],
)
def test_endpoint_without_scores_is_named(
    answers: list[Any],
    complaint: str,
    endpoint: Callable[..., tuple[str, list[Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches: an error page taken for scores, and endless retries."""
    monkeypatch.setattr(http, "WAITS", (0.1,))
    url, seen = endpoint(answers)
    with pytest.raises(RewardError, match=complaint):
        EndpointReward(url, 16, 10.0)(responses())
    assert len(seen) <= 2


def test_dead_endpoint_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a traceback of the network library."""
    monkeypatch.setattr(http, "WAITS", (0.1,))
    with pytest.raises(RewardError, match=r"reward endpoint http://127\.0\.0\.1:9/ gave no scores"):
        EndpointReward("http://127.0.0.1:9/", 16, 1.0)(responses())


# ---- classifiers ----------------------------------------------------------------------------------------------------


def save_classifier(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, labels: int = 1, padless: bool = False
) -> None:
    config = build_model("gpt2", len(tokenizer)).config
    config.num_labels, config.pad_token_id = labels, tokenizer.pad_token_id
    torch.manual_seed(4)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if padless:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("pad_token")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)


@pytest.mark.parametrize("template", ["{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", None])
def test_classifier_reads_through_its_own_template(
    template: str | None, toy_base: Callable[[str], Path], tmp_path: Path
) -> None:
    """Catches: our template or tokenizer for another family's model, padding that is read, an order that sorting changed."""
    tokenizer = AutoTokenizer.from_pretrained(toy_base("gpt2"))
    tokenizer.chat_template = template
    save_classifier(tmp_path, tokenizer)
    got = ClassifierReward(str(tmp_path), Compute(torch.device("cpu"), torch.float32), 2)(responses())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for row, text, score in zip(ROWS, TEXTS, got.tolist(), strict=True):
        question = row["prompt"][0]["content"]  # type: ignore[index]
        alone = (
            tokenizer(f"<user>{question}<assistant>{text}") if template is not None else tokenizer(str(question), text)
        )
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([alone.input_ids])).logits.item()
        assert score == pytest.approx(expected, abs=1e-5)
    assert len({round(x, 3) for x in got.tolist()}) == 3


def test_conversation_longer_than_the_classifier_reads(toy_base: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches: an IndexError of learned positions, or the noise of rotary ones beyond those that were trained."""
    tokenizer = AutoTokenizer.from_pretrained(toy_base("gpt2"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    save_classifier(tmp_path, tokenizer)
    asked = dataclasses.replace(responses(), texts=["good", "z" * 300, "bad"])
    with pytest.raises(RewardError, match="its context is 256: shorten"):
        ClassifierReward(str(tmp_path), Compute(torch.device("cpu"), torch.float32), 2)(asked)


def test_classifiers_that_cannot_score_are_refused(toy_base: Callable[[str], Path], tmp_path: Path) -> None:
    """Catches: a sentiment classifier whose first class is taken for a score, rows scored at their padding, a bare traceback."""
    compute = Compute(torch.device("cpu"), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(toy_base("gpt2"))
    save_classifier(tmp_path / "two", tokenizer, labels=2)
    with pytest.raises(UserError, match="has 2 outputs; a reward model has one"):
        ClassifierReward(str(tmp_path / "two"), compute, 2)
    save_classifier(tmp_path / "padless", tokenizer, padless=True)
    with pytest.raises(UserError, match="has no pad token"):
        ClassifierReward(str(tmp_path / "padless"), compute, 2)
    with pytest.raises(UserError, match="no reward source 'some/where'"):
        ClassifierReward("some/where", compute, 2)


# ---- through the command line ---------------------------------------------------------------------------------------


def test_ppo_with_a_function_alone_needs_no_reward_model(
    finished: tuple[Path, Path],
    toy_config: Path,
    tmp_path: Path,
    call: Callable[..., Call],
    write: Callable[[str], str],
) -> None:
    """Catches: a value model that cannot start without a reward adapter, and a run that hides which scores it was given."""
    shutil.copytree(finished[0], tmp_path / "registry")
    words = ["--config", toy_config / "ppo.yaml", "--registry", tmp_path / "registry", "--policy", "sft/toy"]
    name = write("return [float(len(r)) for r in responses]")
    done = call("rlhf.stages.ppo", *words, "--reward", name, "--name", "length", "--output_dir", tmp_path / "out")
    assert done.code == 0, done.err[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "objective/raw_score" in row)
    assert first["objective/raw_score"] > 0 and "objective/score/score" not in first

    words += ["--reward", "reward/toy", name, "--reward_weights", 1.0, 0.5, "--name", "both"]
    done = call("rlhf.stages.ppo", *words, "--output_dir", tmp_path / "both")
    assert done.code == 0, done.err[-3000:]
    row = json.loads((tmp_path / "both" / "ppo" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["objective/raw_score"] == pytest.approx(
        row["objective/score/toy"] + 0.5 * row["objective/score/score"], abs=1e-5
    )


def test_source_that_fails_in_the_middle_leaves_a_checkpoint(
    finished: tuple[Path, Path],
    toy_config: Path,
    tmp_path: Path,
    call: Callable[..., Call],
    write: Callable[[str], str],
) -> None:
    """Catches: updates lost because an endpoint or a function gave out between two checkpoints."""
    # The evaluation before training asks once, each update once, and the one after the first update once.
    name = write("calls.append(1); return [1.0 * len(r) for r in responses][: 0 if len(calls) == 4 else None]")
    words = ["--config", toy_config / "ppo.yaml", "--registry", finished[0], "--policy", "sft/toy", "--save_steps", 100]
    words += ["--audit_steps", 0]  # which would ask once more
    done = call("rlhf.stages.ppo", *words, "--reward", name, "--name", "broken", "--output_dir", tmp_path)
    assert "must give 8 scores, one for each response; got 0" in done.complaint
    latest = checkpoint.latest(tmp_path / "ppo" / "checkpoints")
    assert latest is not None and latest.name == "checkpoint-1"
