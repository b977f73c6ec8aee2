"""What is computed on sampled responses: the same whatever the padding and the neighbours, and read at the right position."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_models import (
    MODES,
    PAD,
    REWARD_MEAN,
    REWARD_STD,
    VOCAB,
    float64_norm,
    ppo_config,
    reward_model,
    role_models,
    shared_models,
)
from torch import Tensor
from toys import FAMILIES
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.models import sampling
from rlhf.models.classifiers import last_scores
from rlhf.models.roles import Role, RoleModels
from rlhf.models.sampling import Sampled
from rlhf.models.sequences import Sequences, length_sorted_batches, pad
from rlhf.ppo import forward
from rlhf.ppo.rollout import Penalties, SamplingOptions, evaluate_sequences, respond
from rlhf.ppo.types import Rollout
from rlhf.reward import sources
from rlhf.reward.scorer import score_tokens
from rlhf.reward.sources import AdapterReward, Responses
from rlhf.run.memory import rollout_bytes

OPENING = [5, 6, 7, 8, 9, 10]
#: Ragged on both sides; the first three share an opening, the last one nothing. Some end in the stop token 2, one holds
#: the token that is also padding, and one is a single token.
ROWS = [
    ([*OPENING, 11], [20, 21, 22, 2]),
    ([*OPENING, 12, 13, 14], [30]),
    ([*OPENING, 15, 16], [25, PAD, PAD, 26, 27, 28]),
    ([40, 41, 42], [2]),
    ([44], [33, 34, 35]),
]
OPTIONS = SamplingOptions(max_new_tokens=6, temperature=1.0, stop_token_ids=list(range(2, VOCAB, 4)), pad_token_id=PAD)


def sequences(rows: list[tuple[list[int], list[int]]], *, left: int = 0, right: int = 0) -> Sequences:
    """Rows as a batch, with that many columns more of padding than needed; the padding is not even the pad token."""
    prompts, prompt_mask = pad([p for p, _ in rows], 47, side="left")
    responses, mask = pad([r for _, r in rows], 46, side="right")

    def widen(x: Tensor, fill: int | bool, *, at_left: bool) -> Tensor:
        return torch.nn.functional.pad(x, (left, 0) if at_left else (0, right), value=fill)

    return Sequences(
        prompts=widen(prompts, 47, at_left=True),
        prompt_mask=widen(prompt_mask, False, at_left=True),
        responses=widen(responses, 46, at_left=False),
        mask=widen(mask, False, at_left=False),
    )


@torch.no_grad()
def outputs(models: RoleModels, batch: Sequences, temperature: float = 0.8) -> list[dict[str, list[float]]]:
    """All figures of each row, padding left out."""
    *_, entropy, full_kl = forward.compared_logprobs(models, batch, temperature)
    tables = {
        "policy": forward.token_logprobs(models, "policy", batch, temperature),
        "entropy": entropy,
        "full_kl": full_kl,
        "reference": forward.token_logprobs(models, "reference", batch, temperature),
        "values": forward.token_values(models, batch),
        "score": sources.sequence_scores(models, batch)[:, None],
    }
    if models.shared_trunk:
        tables["policy, one pass"], tables["values, one pass"] = forward.logprobs_and_values(models, batch, temperature)
    return [
        {name: (x[i] if name == "score" else x[i][batch.mask[i]]).tolist() for name, x in tables.items()}
        for i in range(len(batch))
    ]


def assert_close(one: dict[str, list[float]], two: dict[str, list[float]]) -> None:
    for name, figures in one.items():
        assert two[name] == pytest.approx(figures, abs=1e-10, rel=0), name


@pytest.fixture(autouse=True)
def _true_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", float64_norm)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_neighbours_change_nothing(family: str, mode: str, tmp_path: Path) -> None:
    """Catches: positions counted from the padding, a mask derived from the pad token, attention to padding, figures of one
    row in another's place, and an opening that is shared though a row does not have it."""
    models = role_models(family, tmp_path / "reward", ppo_config(**MODES[mode]))
    alone = [outputs(models, sequences([row]))[0] for row in ROWS]
    for rows in ([0, 1, 2], [2, 3, 0, 4, 1], [4, 3], [1, 2, 1]):
        for left, right in ((0, 0), (2, 5)):
            together = outputs(models, sequences([ROWS[i] for i in rows], left=left, right=right))
            for i, row in zip(rows, together, strict=True):
                assert_close(alone[i], row)
    assert alone[0]["policy"] != pytest.approx(alone[0]["reference"], abs=1e-3), "the adapters must matter"
    assert alone[0]["score"] != pytest.approx(alone[1]["score"], abs=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_side_of_the_padding_changes_nothing(family: str, mode: str, tmp_path: Path) -> None:
    """Catches: positions or attention that count on padding being on the left, where a reward model was trained with it on the
    right."""
    models = role_models(family, tmp_path / "reward", ppo_config(**MODES[mode]))
    rows = [p + r for p, r in ROWS]
    roles: tuple[Role, ...] = ("policy", "value", "reward", "reference")
    for role in roles:
        with torch.no_grad(), models.role(role):
            alone = torch.cat([models.hidden(*pad([row], PAD, side="left"))[0] for row in rows])
            for side in ("left", "right"):
                ids, mask = pad(rows, 47, side=side)
                torch.testing.assert_close(models.hidden(ids, mask)[mask], alone, rtol=0, atol=1e-10, msg=role)


def sampled(batch: Sequences, stopped: list[bool]) -> Sampled:
    return Sampled(
        responses=batch.responses,
        mask=batch.mask,
        logprobs=torch.zeros(batch.mask.shape),
        stopped=torch.tensor(stopped),
    )


def scores_of(models: RoleModels, batch: Sequences, batch_size: int) -> Tensor:
    batches = length_sorted_batches(batch.lengths, batch_size)
    return AdapterReward(models)(Responses(sequences=batch, batches=batches, texts=[], rows=[]))


def evaluate(models: RoleModels, batch: Sequences, batch_size: int) -> Rollout:
    stopped = [True, False, False, True, False]
    penalties = Penalties(missing_eos=1.5, min_length=3, short_response=0.25)
    return evaluate_sequences(
        models,
        batch,
        sampled(batch, stopped),
        scores_of(models, batch, batch_size),
        prompt=torch.arange(len(batch)),
        temperature=0.8,
        batches=length_sorted_batches(batch.lengths, batch_size),
        penalties=penalties,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_figures_are_those_of_the_rows_whatever_the_batch_size(family: str, mode: str, tmp_path: Path) -> None:
    """Catches: length-sorted batches whose results are not put back in order, or are cut or shifted with their padding."""
    models = role_models(family, tmp_path / "reward", ppo_config(**MODES[mode]))
    alone = [outputs(models, sequences([row]))[0] for row in ROWS]
    for size in (1, 2, 5):
        rollout = evaluate(models, sequences(ROWS, left=1, right=2), size)
        for i, row in enumerate(alone):
            got = {
                "policy": rollout.logprobs,
                "reference": rollout.ref_logprobs,
                "entropy": rollout.entropy,
                "values": rollout.values,
            }
            for name, table in got.items():
                assert table[i][rollout.mask[i]].tolist() == pytest.approx(row[name], abs=1e-10, rel=0), name
                assert table[i][~rollout.mask[i]].abs().sum() == 0
            assert float(rollout.raw_scores[i]) == pytest.approx(row["score"][0], abs=1e-10, rel=0)
        # lengths 4, 1, 6, 1, 3; the second, third and fifth have no stop token
        expected = [0.0, 1.5 + 0.5, 1.5, 0.5, 1.5]
        assert (rollout.raw_scores - rollout.scores).tolist() == pytest.approx(expected, abs=1e-12)


def test_penalties() -> None:
    """Catches: a penalty that replaces the score, counts tokens the wrong way round, or punishes responses that stopped."""
    penalties = Penalties(missing_eos=2.0, min_length=4, short_response=0.5)
    scores = penalties.apply(
        torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.tensor([True, False, True, False]), torch.tensor([4, 9, 1, 3])
    )
    assert scores.tolist() == [1.0, -1.0, -2.5, -2.5]
    nothing = Penalties().apply(torch.tensor([1.0]), torch.tensor([False]), torch.tensor([1]))
    assert nothing.tolist() == [1.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_that_of_the_trained_classifier_at_the_last_token(family: str, tmp_path: Path) -> None:
    """Catches: a score read one token too early or late, another adapter, a head that was not loaded, and a mean or standard
    deviation that is applied the wrong way. The oracle is the reward model itself, run by transformers."""
    config = ppo_config()
    models = shared_models(family, tmp_path / "reward", config)
    classifier = reward_model(family, tmp_path / "reward", config)
    batch = sequences(ROWS)
    # transformers reads the rightmost token that is not padding, so padding must be a token that no row ends in.
    ids, mask = pad([p + r for p, r in ROWS], 45, side="right")
    classifier.get_base_model().config.pad_token_id = 45
    with torch.no_grad():
        raw = classifier(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
    expected = ((raw - REWARD_MEAN) / REWARD_STD).tolist()
    assert scores_of(models, batch, 2).tolist() == pytest.approx(expected, abs=1e-10, rel=0)
    assert max(expected) - min(expected) > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_response_may_end_in_the_pad_token(family: str, tmp_path: Path) -> None:
    """Catches: transformers' rule, the last token that is not the pad token, where PPO goes by the mask."""
    models = shared_models(family, tmp_path / "reward", ppo_config())
    classifier = reward_model(family, tmp_path / "reward", ppo_config())
    ends = [([5, 6, 7], [8, 9, PAD]), ([5, 6], [PAD]), ([5, 6, 7], [8, PAD, PAD]), ([10], [11, 2])]
    rows = [p + r for p, r in ends]
    expected = scores_of(models, sequences(ends), 4) * REWARD_STD + REWARD_MEAN
    torch.testing.assert_close(score_tokens(classifier, rows, PAD, 2), expected, rtol=0, atol=1e-6, check_dtype=False)
    ids, mask = pad(rows, PAD, side="left")
    with torch.no_grad():
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        left = last_scores(classifier, ids, mask.long(), position_ids=positions)
        library = (
            classifier(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits.squeeze(1).float()
        )
    torch.testing.assert_close(left, expected, rtol=0, atol=1e-6, check_dtype=False)
    assert ((library - left).abs() > 1e-3).tolist() == [True, True, True, False]


def test_prompts_with_seeds_of_their_own_share_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an evaluation whose answers change with the number that is sampled together."""
    monkeypatch.setattr(sampling, "SAMPLED_AT_ONCE", 2)
    models, prompts = shared_models("llama", tmp_path / "reward", ppo_config()), [prompt for prompt, _ in ROWS]
    together, _ = respond(models, prompts, OPTIONS, reference=False, seed=[3, 5, 7])
    for first, seed in ((0, 3), (2, 5), (4, 7)):
        alone, _ = respond(models, prompts[first : first + 2], OPTIONS, reference=False, seed=seed)
        for row, (response, mask) in enumerate(zip(alone.responses, alone.mask, strict=True)):
            assert response[mask].tolist() == together.responses[first + row][together.mask[first + row]].tolist()


def test_an_evaluation_samples_what_little_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a batch that does not shrink with the memory, and one below the usual size."""
    causal = shared_models("llama", tmp_path / "reward", ppo_config()).causal
    need = {n: rollout_bytes(causal, responses=n, prompt=9, response=6, recorded=False) for n in (64, 128, 256)}
    for rows, room in ((256, need[256]), (128, need[256] - 1), (128, need[128]), (64, need[128] - 1), (64, 0)):
        monkeypatch.setattr(sampling, "total_bytes", lambda device, room=room: room / sampling._SHARE_AT_ONCE)
        assert sampling.sampled_together(causal, 9, 6) == rows


def test_values_are_read_before_the_token_and_do_not_know_it(tmp_path: Path) -> None:
    """Catches: V(s_t) read one position late, where it has already seen the token whose baseline it is."""
    models = shared_models("gpt2", tmp_path / "reward", ppo_config())
    prompt, response = ROWS[0]

    def values(tokens: list[int]) -> list[float]:
        return outputs(models, sequences([(prompt, tokens)]))[0]["values"]

    whole = values(response)
    for t in range(len(response)):
        other = [*response[:t], 39, *response[t + 1 :]]
        changed = [abs(a - b) > 1e-6 for a, b in zip(whole, values(other), strict=True)]
        assert changed == [u > t for u in range(len(response))]
    # The first value is that of the prompt alone: the value adapter and head on its last token.
    with torch.no_grad(), models.role("value"):
        hidden = models.peft.get_base_model()(
            input_ids=torch.tensor([prompt]), output_hidden_states=True
        ).hidden_states[-1][0, -1]
    by_hand = hidden @ models.value_head.weight[0] + models.value_head.bias[0]
    assert whole[0] == pytest.approx(by_hand.item(), abs=1e-10)


def test_temperature_divides_policy_and_reference_alike(tmp_path: Path) -> None:
    """Catches: a temperature that reaches only one of them, so that the KL of equal models is not 0."""
    models = shared_models("gpt2", tmp_path / "reward", ppo_config())
    prompt, response = ROWS[0]
    row = torch.tensor([prompt + response])
    figures = outputs(models, sequences(ROWS), temperature=0.5)[0]
    for role in ("policy", "reference"):
        with torch.no_grad(), models.role(role):  # type: ignore[arg-type]
            logits = models.causal(input_ids=row).logits[0, len(prompt) - 1 : -1]
        table = (logits / 0.5).log_softmax(-1)
        expected = [float(table[t, token]) for t, token in enumerate(response)]
        assert figures[role] == pytest.approx(expected, abs=1e-10, rel=0)
        if role == "policy":
            entropies = [-sum(float(x.exp() * x) for x in position) for position in table]
            assert figures["entropy"] == pytest.approx(entropies, abs=1e-10, rel=0)


@pytest.mark.parametrize(("mode", "temperature"), [("lora", 1.0), ("lora", 0.6), ("full", 0.6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_training_forward_agree(family: str, mode: str, temperature: float, tmp_path: Path) -> None:
    """Catches: a sampler that draws from another distribution than PPO scores: top-k, another temperature, another adapter,
    wrong positions in the cache, or rows that are mixed up when finished ones leave the batch."""
    models = role_models(family, tmp_path / "reward", ppo_config(dtype="float32", **MODES[mode]))
    options = dataclasses.replace(OPTIONS, temperature=temperature)
    batch, drawn = respond(models, [p for p, _ in ROWS] * 3, options, reference=False, seed=3)
    rollout = evaluate_sequences(
        models,
        batch,
        drawn,
        scores_of(models, batch, 4),
        prompt=torch.arange(len(batch)),
        temperature=temperature,
        batches=length_sorted_batches(batch.lengths, 4),
        penalties=Penalties(missing_eos=1.0),
    )
    gap = (rollout.sampler_logprobs - rollout.logprobs).abs()
    assert float(gap.max()) < 2e-5
    assert float(gap[~rollout.mask].max()) == 0.0
    assert len(set(rollout.mask.sum(dim=1).tolist())) > 2, "the toy must be ragged"
    assert float((rollout.logprobs - rollout.ref_logprobs).abs().max()) > 1e-2


def test_the_adapter_may_stay_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an option that merges all the same, one that samples from the base, or from the last role's adapter."""
    models = shared_models("llama", tmp_path / "reward", ppo_config())
    prompts = [p for p, _ in ROWS] * 3
    merged, _ = respond(models, prompts, OPTIONS, reference=False, seed=3)
    monkeypatch.setattr(models, "merged_policy", None)
    beside, _ = respond(models, prompts, dataclasses.replace(OPTIONS, merge_adapter=False), reference=False, seed=3)
    assert torch.equal(merged.responses, beside.responses) and torch.equal(merged.mask, beside.mask)


def test_same_seed_same_responses_and_the_reference_has_no_adapter(tmp_path: Path) -> None:
    """Catches: a draw from the global generator, and an evaluation of the reference that samples the policy."""
    models = shared_models("gpt2", tmp_path / "reward", ppo_config())
    prompts = [p for p, _ in ROWS] * 4

    def draw(seed: int, reference: bool) -> tuple[list[list[int]], Sampled]:
        batch, drawn = respond(models, prompts, OPTIONS, reference=reference, seed=seed)
        return [r[m].tolist() for r, m in zip(batch.responses, batch.mask, strict=True)], drawn

    torch.manual_seed(0)
    first = draw(1, reference=False)[0]
    torch.manual_seed(1)
    assert draw(1, reference=False)[0] == first
    assert draw(2, reference=False)[0] != first
    batch, drawn = respond(models, prompts, OPTIONS, reference=True, seed=1)
    with torch.no_grad():
        reference = forward.token_logprobs(models, "reference", batch, 1.0)
    torch.testing.assert_close(drawn.logprobs.double(), reference, rtol=0, atol=1e-5)


def test_select_keeps_the_rows() -> None:
    """Catches: padding cut from the wrong side, or a field left behind when rows are selected."""
    batch = sequences(ROWS, left=2, right=3)

    def rows(of: Sequences) -> list[tuple[list[int], list[int]]]:
        return [
            (p[pm].tolist(), r[m].tolist())
            for p, pm, r, m in zip(of.prompts, of.prompt_mask, of.responses, of.mask, strict=True)
        ]

    part = batch.select(torch.tensor([3, 0]))
    assert rows(part) == [ROWS[3], ROWS[0]]
    assert part.prompts.shape == part.prompt_mask.shape == (2, 7) and part.responses.shape == part.mask.shape == (2, 4)
    assert part.lengths.tolist() == [4, 11]
