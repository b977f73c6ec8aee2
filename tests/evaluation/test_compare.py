"""The whole evaluation of toy policies, against figures that are made in another way."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged import JudgeServer, World, toy_gold
from toys import Call

from rlhf.base.text import distinct_n, repetition
from rlhf.config import EvaluationConfig, parse_config
from rlhf.evaluation import measure
from rlhf.evaluation.compare import FORMAT, figures, run
from rlhf.evaluation.frontier import best_of_n_kl
from rlhf.evaluation.judges import conversation_text
from rlhf.models.compute import Compute
from rlhf.models.responses import Answers
from rlhf.models.sequences import Sequences
from rlhf.models.tokenization import TEMPLATES, encode_prompt
from rlhf.registry import Registry
from rlhf.report.compare_page import write_comparison
from rlhf.reward.scorer import open_scorer
from rlhf.reward.sources import ModelReward, Responses, RewardError

MODELS = ("ppo/toy", "ppo/snaps")
NAMES = ["sft/toy@1", "ppo/toy@1", "ppo/snaps@1"]


def options(world: World, folder: Path, *words: object, models: tuple[str, ...] = MODELS) -> EvaluationConfig:
    given = ["--models", *models, *world.common, "--output_dir", str(folder), *map(str, words)]
    return parse_config(EvaluationConfig, given)


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the evaluation is that this file reads."""
    place = tmp_path_factory.mktemp("evaluation")
    run(options(world, place, "--gold", "judged:toy_gold", "--runs", world.run))
    return place


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def figure(result: dict[str, Any], model: str, name: str) -> float:
    (line,) = [line for line in result["models"] if line["name"] == model]
    return line["figures"][name]["value"]


def test_the_result_has_all_of_its_parts(result: dict[str, Any]) -> None:
    """A part that another program reads and that is not there, or under another name."""
    assert result["format"] == FORMAT == 1
    assert [line["name"] for line in result["models"]] == NAMES
    assert (result["reference"], result["baseline"], result["reward"]) == ("sft/toy@1", "sft/toy@1", "reward/toy@1")
    assert result["gold"] == {"toy_gold": "judged:toy_gold"} and result["prompts"]["count"] == 6
    assert result["marks"] == [] and result["sampling"]["temperature"] == 1.0
    shown = {"score", "gold/toy_gold", "kl", "kl_k3", "kl_full", "entropy", "length", "stop_rate", "repetition"}
    shown |= {"distinct_1", "distinct_2", "distinct_3", "distinct_2_all", "base_perplexity"}
    for line in result["models"]:
        assert set(line["figures"]) == shown and line["hash"] and line["marks"] == []
        assert set(line["overlap"].values()) == {0} and line["name"] in line["overlap"]
        for name, value in line["figures"].items():
            assert (value["low"] is None) == (name == "distinct_2_all"), name
            assert value["low"] is None or value["low"] <= value["value"] <= value["high"], name
    assert result["chat_judge"] is None and result["tax"]["tasks"] == {}
    assert set(result["tax"]["texts"]["models"]) == set(NAMES)


def test_figures_are_those_of_the_samples(
    result: dict[str, Any], samples: list[dict[str, Any]], world: World, folder: Path
) -> None:
    """Scores of another policy's answers, or in another order. The oracle scores the kept tokens one by one."""
    assert [(s["number"], s["sample"]) for s in samples] == [(p, s) for p in range(6) for s in range(3)]
    registry = Registry(world.registry)
    scorer = open_scorer(registry.get("reward/toy"), registry, options(world, folder), Compute(torch.device("cpu"), torch.float32), 1)  # noqa: E501  # fmt: skip
    for name in NAMES:
        own = [s["models"][name] for s in samples]
        texts = [answer["response"] for answer in own]
        assert [answer["scores"]["gold/toy_gold"] for answer in own] == pytest.approx(toy_gold(texts), abs=1e-5)
        for key in ("score", "gold/toy_gold"):
            mean = sum(answer["scores"][key] for answer in own) / 18
            assert figure(result, name, key) == pytest.approx(mean)
        assert figure(result, name, "kl") == pytest.approx(sum(answer["kl"] for answer in own) / 18)
        assert figure(result, name, "length") == sum(answer["tokens"] for answer in own) / 18
        kept, *_ = [answers for answers in kept_answers(folder) if answers["texts"] == texts]
        prompt = [scorer.encode([{"role": "user", "content": s["prompt"]}], "") for s in samples]
        rows = [[*p[:-1], *tokens] for p, tokens in zip(prompt, kept["tokens"], strict=True)]
        assert [answer["scores"]["score"] for answer in own] == pytest.approx(scorer(rows).tolist(), abs=1e-3)


def test_a_reward_model_of_another_tokenizer_reads_texts(
    world: World, folder: Path, samples: list[dict[str, Any]]
) -> None:
    """Token ids of one vocabulary read as those of another: any number comes out, and no error. As an independent gold scorer,
    the toy reward model under another template has to score what a person would type into it."""
    registry = Registry(world.registry)
    compute = Compute(torch.device("cpu"), torch.float32)
    scorer = open_scorer(registry.get("reward/toy"), registry, options(world, folder), compute, 4)
    scorer.tokenizer.chat_template = TEMPLATES["plain"]
    asked = [[{"role": "user", "content": s["prompt"]}] for s in samples[:4]]
    texts = [s["models"]["ppo/toy@1"]["response"] for s in samples[:4]]
    ids = torch.zeros(4, 3, dtype=torch.long)
    wrong = Sequences(prompts=ids, prompt_mask=ids == 0, responses=ids, mask=ids == 0)
    given = Responses(sequences=wrong, batches=[], texts=texts, rows=[{"prompt": prompt} for prompt in asked])
    found = ModelReward(scorer, reads_texts=True)(given)
    expected = [scorer([encode_prompt(scorer.tokenizer, p) + own_ids(scorer.tokenizer, t)]) for p, t in zip(asked, texts, strict=True)]  # noqa: E501  # fmt: skip
    assert found.tolist() == pytest.approx([float(score) for score in expected], abs=1e-3)
    long = dataclasses.replace(given, texts=["film " * 300, *texts[1:]])
    with pytest.raises(RewardError, match=r"has \d{3,} tokens .* its context is 256"):
        ModelReward(scorer, reads_texts=True)(long)


def own_ids(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def kept_answers(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in (folder / "kept").glob("*.json")]
    return [one for one in found if isinstance(one, dict) and one.get("samples") == 3]


def test_the_reference_is_no_distance_from_itself(result: dict[str, Any]) -> None:
    """A KL against the untuned base, or against the policy that was opened before."""
    assert [figure(result, "sft/toy@1", name) for name in ("kl", "kl_k3", "kl_full")] == [0, 0, 0]
    assert all(figure(result, name, "kl_full") > 0.01 for name in NAMES[1:])
    assert figure(result, "ppo/toy@1", "kl_full") != figure(result, "ppo/snaps@1", "kl_full")


def test_win_rates_are_counted_pair_by_pair(result: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """A win rate of the baseline against the policy, or of answers to different prompts."""
    lines = {(line["model"], line["kind"]): line for line in result["win_rates"]}
    assert set(lines) == {(name, kind) for name in NAMES[1:] for kind in ("reward", "gold")}
    assert {line["judge"] for line in result["win_rates"]} == {"reward/toy@1", "toy_gold"}
    for (name, kind), line in lines.items():
        key = {"reward": "score", "gold": "gold/toy_gold"}[kind]
        pairs = [(s["models"][name]["scores"][key], s["models"]["sft/toy@1"]["scores"][key]) for s in samples]
        assert line["value"] == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / 18)
        assert (line["pairs"], line["unjudged"], line["baseline"]) == (18, 0, "sft/toy@1")
        longer = [s["models"][name]["tokens"] - s["models"]["sft/toy@1"]["tokens"] for s in samples]
        assert line["length_difference"] == pytest.approx(sum(longer) / 18)


def test_best_of_n_of_the_reference(result: dict[str, Any]) -> None:
    """A curve of the policy's answers; n above the samples; a score that falls with n, which the proxy's own cannot."""
    found = result["best_of_n"]
    assert (found["model"], found["prompts"], found["samples"]) == ("sft/toy@1", 3, 8)
    assert [line["n"] for line in found["curve"]] == [1, 2, 4, 8]
    assert [line["kl"] for line in found["curve"]] == [best_of_n_kl(n) for n in (1, 2, 4, 8)]
    values = [line["score"]["value"] for line in found["curve"]]
    assert values == sorted(values) and values[0] < values[-1]
    assert {fit["scorer"] for fit in found["fits"]} == {"score", "gold/toy_gold"}
    assert {fit["form"] for fit in found["fits"]} == {"best_of_n"}


def test_the_frontier_has_every_snapshot(result: dict[str, Any]) -> None:
    """Snapshots that are all the last one, or gains that are not over the reference. The last snapshot is the registered
    policy, to the last bit."""
    points = {point["model"]: point for point in result["frontier"]["points"]}
    assert set(points) == {"ppo/toy@1", "ppo/snaps@1", *(f"snaps:{i}" for i in range(1, 5))}
    last, registered = points["snaps:4"], points["ppo/snaps@1"]
    assert (last["run"], last["update"], registered["run"]) == ("snaps", 4, None)
    assert last["kl"] == registered["kl"] and last["gold"] == registered["gold"]
    assert len({point["kl"]["value"] for point in points.values()}) == 5
    for point in points.values():
        gain = point["score"]["value"] - figure(result, "sft/toy@1", "score")
        assert point["score_gain"]["value"] == pytest.approx(gain)
        assert point["sqrt_kl"] == pytest.approx(math.sqrt(point["kl"]["value"]))
    fits = {fit["scorer"]: fit for fit in result["frontier"]["fits"]}
    assert set(fits) == {"score", "gold/toy_gold"} and {fit["run"] for fit in fits.values()} == {"snaps"}
    assert all(fit["points"] == 4 and fit["form"] == "ppo" for fit in fits.values())
    best = result["frontier"]["recommended"]
    assert best["gold"] == "toy_gold" and best["model"] in points


def test_a_second_call_samples_nothing_again(
    world: World, folder: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation that starts anew after an interruption, or when a judge is added; and answers of other options that are
    taken for those that were asked for."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the policy was opened")

    monkeypatch.setattr(measure, "load_policy", refuse)
    again = run(options(world, folder, "--gold", "judged:toy_gold", "--runs", world.run))
    volatile = ("created", "seconds")
    plain = json.loads(json.dumps({k: v for k, v in again.items() if k not in volatile}))
    assert plain == {k: v for k, v in result.items() if k not in volatile}
    with pytest.raises(AssertionError, match="the policy was opened"):
        run(options(world, folder, "--temperature", 0.5))


def test_checks_stand_beside_score_and_kl(
    world: World, folder: Path, tmp_path: Path, call: Callable[..., Call]
) -> None:
    """Figures of another model's answers, or of sampled ones. `rlhf generate`, which opens models in its own way, agrees."""
    file = tmp_path / "films.jsonl"
    greedy = ("--response_length", 12, "--temperature", 0)
    place = [*greedy, "--registry", world.registry, "--device", "cpu", "--dtype", "float32"]
    own = call("rlhf.generation.generate", "--model", "ppo/toy", "--prompt", "A movie", *place).out.strip()
    rows = [{"prompt": 'Write one sentence of a movie review that starts with "The"', "reference": "The film is good"},
            {"prompt": "A movie", "reference": ["A movie was great", own or "x"]}]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(folder / "kept", tmp_path / "out" / "kept")
    checks = ("--checks", f"translation={file}", "--check_length", 12, "--best_of", 0)
    found = run(options(world, tmp_path / "out", *checks, models=("ppo/toy",)))
    names = {f"check/films/{name}" for name in ("bleu", "chrf")}
    for line in found["models"]:
        assert names < set(line["figures"]) and {"score", "kl"} < set(line["figures"])
        words = ["--model", line["name"], "--dataset", file, "--check", "translation"]
        said = call("rlhf.generation.generate", *words, *place).err
        for name in names:
            value = line["figures"][name]["value"]
            assert f"{line['name']} {name.split('/')[-1]}: {value:.3f}" in said
    assert any(figure(found, "ppo/toy@1", name) > 0 for name in names)
    page = write_comparison([tmp_path / "out"], tmp_path / "page.html").read_text()
    assert "check/films/chrf" in page


def test_a_broken_snapshot_does_not_cost_the_rest(world: World, folder: Path, tmp_path: Path) -> None:
    """One half-copied file, and nothing of the evaluation is left; or a point that is missing without a word."""
    shutil.copytree(world.run, tmp_path / "snaps")
    weights = tmp_path / "snaps" / "ppo" / "checkpoints" / "snapshot-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    shutil.copytree(folder / "kept", tmp_path / "out" / "kept")
    found = run(options(world, tmp_path / "out", "--runs", tmp_path / "snaps", "--best_of", 0))
    assert [p["update"] for p in found["frontier"]["points"] if p["run"]] == [1, 3, 4]
    (mark,) = found["marks"]
    assert (
        "snapshot snaps:2 left out" in mark
        and "the sha256 of adapter_model.safetensors is not the one in checksums.json" in mark
    )
    assert found["best_of_n"] is None and found["frontier"]["recommended"] is None, "no gold, no recommendation"


def test_people_and_a_chat_model_as_judges(world: World, folder: Path, tmp_path: Path) -> None:
    """Verdicts that land on the other policy: a judge who counts letters has to agree with a count of letters."""
    shutil.copytree(folder / "kept", tmp_path / "out" / "kept")
    table, filled = tmp_path / "pairs.csv", tmp_path / "filled.csv"

    def reply(first: str, second: str) -> str:
        return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"

    common = ("--best_of", 0, "--judge_pairs", 8)
    run(options(world, tmp_path / "out", *common, "--export_comparison", table))
    with table.open(encoding="utf-8-sig", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        row["verdict"] = reply(row["answer_a"], row["answer_b"])
    with filled.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    server = JudgeServer(reply)
    try:
        chat = ("--judge_url", server.url, "--judge_model", "counter", "--judge_prices", 1.0, 10.0)
        found = run(options(world, tmp_path / "out", *common, *chat, "--verdicts", filled))
    finally:
        server.close()
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    chosen = sorted(samples, key=lambda s: (s["sample"], s["number"]))[:8]
    for name in NAMES[1:]:
        sides = [(len(s["models"][name]["response"]), len(s["models"]["sft/toy@1"]["response"])) for s in chosen]
        expected = sum((a > b) + (a == b) / 2 for a, b in sides) / 8
        for kind, judge in (("people", "people"), ("chat", "counter")):
            (line,) = [r for r in found["win_rates"] if r["model"] == name and r["kind"] == kind]
            assert (line["value"], line["pairs"], line["judge"]) == (pytest.approx(expected), 8, judge)
    told = found["chat_judge"]
    assert (
        told["model"] == "counter"
        and told["asked"] == len(server.requests)
        and told["split"] == dict.fromkeys(NAMES[1:], 0)
    )
    assert told["cost"] == pytest.approx((told["tokens"][0] + 10 * told["tokens"][1]) / 1e6)


def test_prompts_that_were_trained_on_are_marked(world: World, toy_data: Path, tmp_path: Path) -> None:
    """A score on prompts that the model knows, without a word."""
    words = (
        "--split",
        "train",
        "--dataset",
        toy_data,
        "--best_of",
        0,
        "--reward",
        "judged:prompted",
        "--num_prompts",
        3,
    )
    found = run(options(world, tmp_path, *words, models=("sft/toy",)))
    (line,) = found["models"]
    assert line["overlap"] == {"sft/toy@1": 3} and line["marks"] == [
        "3 of 3 prompts are among those that sft/toy@1 was trained on"
    ]
    assert found["win_rates"] == [] and found["frontier"]["points"] == []


def test_a_gold_scorer_that_fails_is_named(world: World, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "kept", tmp_path / "kept")
    with pytest.raises(RewardError, match="judged:broken_gold must give"):
        run(options(world, tmp_path, "--gold", "judged:broken_gold", "--best_of", 0))
    assert not (tmp_path / "evaluation.json").exists()


# Figures by hand


def test_figures_by_hand() -> None:
    """Two prompts with two answers each. Entropy is a mean over tokens: (4 + 2 + 1 + 3) / (2 + 1 + 1 + 4) = 1.25; of answers it
    would be (2 + 2 + 1 + .75) / 4. Distinct words: 'a b', 'a c' have 3 of 4; 'd', 'd d d d' have 1 of 5."""
    given = Answers(
        samples=2,
        texts=["a b", "a c", "d", "d d d d"],
        tokens=[[1, 2], [1], [3], [3, 3, 3, 2]],
        stopped=[True, False, False, True],
        sums={"kl": [1.0, 2.0, 3.0, 6.0], "kl_k3": [0.0] * 4, "kl_full": [2.0] * 4, "entropy": [4.0, 2.0, 1.0, 3.0]},
    )
    found = figures(given, {"score": np.array([1.0, 2.0, 3.0, 4.0])})
    values = {name: value["value"] for name, value in found.items()}
    assert values["score"] == 2.5 and values["kl"] == 3.0 and values["kl_full"] == 2.0
    assert values["entropy"] == pytest.approx(1.25) and values["length"] == 2.0 and values["stop_rate"] == 0.5
    assert values["distinct_1"] == pytest.approx((3 / 4 + 1 / 5) / 2)
    assert values["distinct_2_all"] == pytest.approx(3 / 5)
    assert values["distinct_3"] == 0.5, "of the second prompt: the first has no answer of three words"
    assert (found["score"]["low"], found["score"]["high"]) == (1.5, 3.5), "draws of whole prompts: 1.5, 2.5 or 3.5"


def test_repetition_by_hand() -> None:
    """Six words have three 4-grams; 'x y x y x y' has two different ones. A text of three words has none."""
    assert repetition("x y x y x y") == pytest.approx(1 - 2 / 3)
    assert repetition("the film is great fun") == 0 == repetition("no no no")
    assert distinct_n(["x y", "x y"], 2) == 0.5


def test_a_judge_reads_the_whole_conversation() -> None:
    """The last question alone ("and why?") cannot be judged."""
    turns = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "No."}]
    assert (
        conversation_text([*turns, {"role": "user", "content": "Why?"}])
        == "user: Is it good?\n\nassistant: No.\n\nuser: Why?"
    )
    assert conversation_text(turns[:1]) == "Is it good?"


# The command


def test_the_command_prints_what_matters(world: World, folder: Path, tmp_path: Path, call: Callable[..., Call]) -> None:
    """A table without the models, or a forced comparison without its mark."""
    shutil.copytree(folder / "kept", tmp_path / "kept")
    words = ("--models", *MODELS, *world.common, "--output_dir", tmp_path, "--gold", "judged:toy_gold")
    done = call("rlhf.evaluation.__main__", *words, "--runs", world.run)
    assert done.code == 0, done.err[-3000:]
    assert all(name in done.out for name in NAMES) and "against sft/toy@1" in done.out
    assert "recommended by toy_gold: " in done.out and "perplexity on plain text: sft/toy@1 " in done.out
    assert str(tmp_path / "evaluation.json") in done.out.replace("\n", "")


@pytest.mark.parametrize(
    "given, told",
    [
        ({"models": "ppo/toi"}, "did you mean 'ppo/toy'"),
        ({"models": "reward/toy"}, "is no policy"),
        ({"dataset": "/no/such/data"}, "no data at /no/such/data"),
        ({"gold": "no_module:f"}, "no_module:f"),
        ({"gold": "reward/toi"}, "did you mean 'reward/toy'"),
        ({"judge_url": "http://localhost:1/v1"}, "needs both"),
        ({"verdicts": "/no/such.csv"}, "no file /no/such.csv"),
        ({"texts": "/no/such.txt"}, "cannot read the plain text /no/such.txt"),
        ({"max_prompt_length": 2}, "more than max_prompt_length=2"),
        ({"response_length": 100_000}, "does not fit into the model's context"),
        ({"temperature": 0}, "temperature must be above 0"),
    ],
)
def test_what_a_user_gets_wrong(
    world: World, tmp_path: Path, call: Callable[..., Call], given: dict[str, Any], told: str
) -> None:
    """A traceback, or a complaint after an hour of sampling."""
    base = options(world, tmp_path / "out", models=("ppo/toy",))
    plain = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    chosen = {
        k: plain[k] for k in ("models", "dataset", "registry", "output_dir", "device", "dtype", "wandb_mode")
    } | given
    words = [w for k, v in chosen.items() for w in (f"--{k}", *(v if isinstance(v, list) else [v]))]
    assert told in call("rlhf.evaluation.__main__", *words).complaint
    assert not (tmp_path / "out" / "evaluation.json").exists()
