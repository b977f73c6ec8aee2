"""Sampling draws from softmax(logits / temperature), row by row, whatever happens to the neighbours."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import shapes  # noqa: F401  (switches the checks on)
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import BENT, FAMILIES, PROMPTS, build_bent, build_model, rows
from transformers import AutoModelForCausalLM, MambaConfig, MistralConfig, PreTrainedModel

from rlhf.models import decoding, drawing, graphs, logprobs, sampling
from rlhf.models.sampling import Sampled, Sampler, sample
from rlhf.models.sequences import pad

VOCAB = 40
PAD = 0
STOPS = [2, 9, 17, 23, 31]


def draw(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    seed: int = 0,
    length: int = 8,
    temperature: float = 1.0,
    stops: list[int] = STOPS,
    sampler: Sampler = "auto",
    **more: Any,
) -> Sampled:
    ids, mask = pad(prompts, PAD, side="left")
    return sample(
        model,
        ids,
        mask,
        max_new_tokens=length,
        temperature=temperature,
        stop_token_ids=stops,
        pad_token_id=PAD,
        generator=torch.Generator().manual_seed(seed),
        sampler=sampler,
        **more,
    )


@torch.no_grad()
def table(model: PreTrainedModel, tokens: list[int], temperature: float) -> torch.Tensor:
    """Probabilities of the next token after one row, alone, without cache and padding."""
    return (model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double() / temperature).softmax(-1)


@torch.no_grad()
def sample_alone(
    model: PreTrainedModel, prompt: list[int], uniforms: list[float], temperature: float
) -> tuple[list[int], list[float]]:
    """The oracle: one row, a full forward pass for every token, the cumulative sum walked by hand."""
    response: list[int] = []
    logprobs: list[float] = []
    for u in uniforms:
        probs = table(model, prompt + response, temperature).tolist()
        sums = list(itertools.accumulate(probs))
        token = next(i for i, total in enumerate(sums) if total > u * sums[-1])
        response.append(token)
        logprobs.append(float(torch.tensor(probs[token]).log()))
        if token in STOPS:
            break
    return response, logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_sampling_each_alone(family: str, temperature: float) -> None:
    """Catches: wrong positions or padding in the cache, rows mixed up when the batch is cut down, uniforms that move to
    other rows when a neighbour finishes, a temperature that is multiplied, and options inherited from the model."""
    model = build_model(family, VOCAB, dtype=torch.float64)
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    result = draw(model, PROMPTS, seed=4, temperature=temperature)
    generator = torch.Generator().manual_seed(4)
    uniforms = [torch.rand(len(PROMPTS), 1, generator=generator).squeeze(1).tolist() for _ in range(8)]
    for i, prompt in enumerate(PROMPTS):
        response, logprobs = sample_alone(model, prompt, [step[i] for step in uniforms], temperature)
        assert rows(result)[i] == response
        assert result.logprobs[i][result.mask[i]].tolist() == pytest.approx(logprobs, abs=1e-4)
        assert bool(result.stopped[i]) == (response[-1] in STOPS)
    lengths = result.mask.sum(dim=1).tolist()
    assert len(set(lengths)) > 2 and max(lengths) == result.responses.shape[1], "the toy must be ragged"


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    """Catches: any bias of the draw, e.g. a cumulative sum off by one token, at the first step and at cached ones."""
    size, count = 8, 8000
    model = build_model("gpt2", size, dtype=torch.float64)
    prompt = [3, 4, 5]
    tokens = draw(model, [prompt] * count, length=2, temperature=temperature, stops=[size + 1], seed=1).responses
    first = table(model, prompt, temperature)
    chi_square, cells, rest_expected, rest_seen = 0.0, 0, 0.0, 0
    for a in range(size):
        second = table(model, [*prompt, a], temperature)
        for b in range(size):
            expected = count * float(first[a] * second[b])
            seen = int(((tokens[:, 0] == a) & (tokens[:, 1] == b)).sum())
            if expected < 5:  # too rare for the approximation: pooled
                rest_expected, rest_seen = rest_expected + expected, rest_seen + seen
                continue
            chi_square, cells = chi_square + (seen - expected) ** 2 / expected, cells + 1
    if rest_expected >= 5:
        chi_square, cells = chi_square + (rest_seen - rest_expected) ** 2 / rest_expected, cells + 1
    freedom = cells - 1
    assert freedom >= 15
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations; a bias of 5% in one token fails


def test_responses_end_at_the_first_stop_token() -> None:
    """Catches: a stop token that is left out or followed by tokens, padding that counts, and a limit taken for a stop."""
    model = build_model("llama", VOCAB)
    result = draw(model, PROMPTS * 8, length=5, seed=2)
    for i, row in enumerate(rows(result)):
        length = len(row)
        assert 1 <= length <= 5
        assert result.mask[i].tolist() == [t < length for t in range(result.mask.shape[1])]
        assert result.responses[i, length:].tolist() == [PAD] * (result.mask.shape[1] - length)
        assert result.logprobs[i, length:].tolist() == [0.0] * (result.mask.shape[1] - length)
        assert not set(row[:-1]) & set(STOPS)
        assert bool(result.stopped[i]) == (row[-1] in STOPS)
        assert row[-1] in STOPS or length == 5
    assert 0 < int(result.stopped.sum()) < len(result.stopped)


def test_a_row_does_not_depend_on_when_its_neighbours_finish() -> None:
    """Catches: random numbers handed out to unfinished rows only, so that one row's end shifts all others' draws."""
    model = build_model("gpt_neox", VOCAB, dtype=torch.float64)
    one = rows(draw(model, PROMPTS, seed=7))
    changed = [PROMPTS[0], [33], [34, 35], PROMPTS[3], [36], PROMPTS[5], [37, 38], [39]]
    two = rows(draw(model, changed, seed=7))
    kept = [0, 3, 5]
    assert [one[i] for i in kept] == [two[i] for i in kept]
    assert [len(one[i]) for i in (1, 2, 4, 6, 7)] != [len(two[i]) for i in (1, 2, 4, 6, 7)], "neighbours must differ"


def test_finished_rows_leave_the_batch_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a batch that is never cut down (its time is then that of the longest row), or is cut to the wrong rows."""
    model = build_model("llama", VOCAB, dtype=torch.float64)
    assert sampling.fits_loop(model)  # its passes are not counted
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    results = {}
    for share in (0.0, sampling._COMPACT_BELOW, 1.01):
        sizes.clear()
        monkeypatch.setattr(sampling, "_COMPACT_BELOW", share)
        results[share] = (
            draw(model, PROMPTS * 4, length=12, seed=3, sampler="loop"),
            sizes[1:],
        )  # the prompts are computed before
    (never, all_sizes), (usual, some_sizes), (always, least_sizes) = results.values()
    assert set(all_sizes) == {32}
    assert some_sizes[0] > 16 and some_sizes[-1] < 16 and some_sizes == sorted(some_sizes, reverse=True)
    live = [int((usual.mask[:, t] & ~torch.isin(usual.responses[:, t], torch.tensor(STOPS))).sum()) for t in range(11)]
    assert least_sizes == live[: len(least_sizes)]
    for other in (usual, always):
        assert torch.equal(other.responses, never.responses) and torch.equal(other.mask, never.mask)
        torch.testing.assert_close(other.logprobs, never.logprobs, rtol=0, atol=1e-5)


def test_a_token_is_written_behind_the_others_and_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: keys and values that are copied at each token, memory for more tokens than a response may have, free columns that
    are seen, and memory that is not made anew where it is full."""
    model, results = build_model("llama", VOCAB, dtype=torch.float64), list[Sampled]()
    prompts, longest = PROMPTS * 4, max(map(len, PROMPTS))
    assert sampling.fits_loop(model)  # its passes are not counted
    for growth in (1, 3, 32):
        monkeypatch.setattr(decoding, "_GROWTH", growth)
        with Widths() as widths:
            results.append(draw(model, prompts, length=12, seed=3, sampler="loop"))
        steps = results[0].responses.shape[1] - 1
        assert max(widths.joined) == longest, "only prompts are joined"
        assert len(widths.made) == 2 * 2 * -(-steps // growth)  # layers, keys and values
        assert max(widths.made) == longest + min(-(-steps // growth) * growth, 11)
    for other in results[1:]:
        assert torch.equal(other.responses, results[0].responses)
        torch.testing.assert_close(other.logprobs, results[0].logprobs, rtol=0, atol=1e-12)


class Widths(TorchDispatchMode):
    """Columns of the keys and values that are joined to others, and that are copied to larger ones."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: list[int] = []
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        lists = {"aten::cat": self.joined, "aten::constant_pad_nd": self.made}
        if (widths := lists.get(func._schema.name)) is not None and result.dim() == 4:
            widths.append(result.shape[2])
        return result


def test_length_limit_of_one() -> None:
    """Catches: a limit that is off by one, and a second forward pass for a token that nobody will draw."""
    model = build_model("gpt2", VOCAB)
    assert sampling.fits_loop(model)  # its passes are not counted
    calls: list[int] = []
    model.transformer.register_forward_pre_hook(lambda m, args: calls.append(1))
    result = draw(model, PROMPTS, length=1, sampler="loop")
    assert result.responses.shape == (len(PROMPTS), 1) and result.mask.all()
    assert len(calls) == 1


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    """Catches: a search that takes the first index at the border (u = 0 then draws token 0), or runs past the last token."""
    logits = torch.zeros(1, 6)
    logits[0, [0, 3, 5]] = -torch.inf
    below_one = 1 - 2**-24  # the largest number that torch.rand can give
    for u in (0.0, 1e-9, 1 / 3, 0.5, 2 / 3, below_one):
        for scale in (1.0, 7.3):
            token, logprob = drawing.draw_tokens(logits + scale, torch.tensor([[u]]), 1.0)
            assert int(token) in (1, 2, 4)
            assert float(logprob) == pytest.approx(-1.0986123, abs=1e-6)
    # Cumulative sums of fp32 probabilities end a little off 1; the draw must still stay inside.
    wide = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    wide[:, -100:] = -torch.inf
    token, logprob = drawing.draw_tokens(wide, torch.full((64, 1), below_one), 1.0)
    assert int(token.max()) < 50_000 - 100
    with logprobs.positions_at_once(64):  # not a few rows after the other
        together = drawing.draw_tokens(wide, torch.full((64, 1), below_one), 1.0)
    assert torch.equal(token, together[0]) and torch.equal(logprob, together[1])


@pytest.mark.parametrize("sampler", ["loop", "generate"])
def test_at_temperature_zero_the_likeliest_tokens_are_taken(sampler: Sampler) -> None:
    """Catches: a division by 0, and a token that is drawn after all. The oracle is argmax, one row and token at a time."""
    model = build_model("llama", VOCAB, dtype=torch.float64)
    result = draw(model, PROMPTS, temperature=0.0, sampler=sampler)
    for prompt, said in zip(PROMPTS, rows(result), strict=True):
        expected: list[int] = []
        while len(expected) < 8 and not (expected and expected[-1] in STOPS):
            expected.append(int(table(model, prompt + expected, 1.0).argmax()))
        assert said == expected
    assert not result.logprobs.any()


def test_top_p_leaves_the_likeliest_tokens() -> None:
    """Catches: a nucleus without the token that fills it up, or probabilities that no longer add up to 1."""
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    drawn = [drawing.draw_tokens(logits, torch.tensor([[u / 100]]), 1.0, 0.6) for u in range(100)]
    assert {int(token) for token, _ in drawn} == {1, 3}
    for token, logprob in drawn:
        assert float(logprob.exp()) == pytest.approx({1: 4 / 7, 3: 3 / 7}[int(token)], abs=1e-6)
    assert sum(int(token) == 1 for token, _ in drawn) in (57, 58)


def test_on_tokens_gets_the_tokens_of_unfinished_rows() -> None:
    """Catches: tokens of finished rows that are still passed on, and a step that is left out."""
    model, steps = build_model("llama", VOCAB), list[torch.Tensor]()
    result = draw(model, PROMPTS, on_tokens=steps.append)
    assert len(steps) == result.responses.shape[1]
    for t, tokens in enumerate(steps):
        assert tokens.tolist() == result.responses[result.mask[:, t], t].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_opening_that_all_prompts_share_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an opening left out of the cache, out of the mask or out of the positions of what follows it."""
    model = build_model(family, VOCAB, dtype=torch.float64)
    prompts = [[15, 16, 17, *prompt] for prompt in PROMPTS]
    assert sampling.fits_loop(model)  # its passes are not counted
    widths: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared = draw(model, prompts, seed=4, sampler="loop")
    assert widths[:2] == [3, len(PROMPTS) * max(map(len, PROMPTS))]
    monkeypatch.setattr(decoding, "common_prefix", lambda ids, mask: 0)
    plain = draw(model, prompts, seed=4, sampler="loop")
    assert torch.equal(shared.responses, plain.responses) and torch.equal(shared.mask, plain.mask)
    torch.testing.assert_close(shared.logprobs, plain.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["generate", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sampler_draws_the_same(family: str, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a model's own generation config that bends `generate`, fixed-size caches whose unused entries are seen, rows
    mixed up when a batch of fixed sizes is halved. Compiling itself is left to the next test."""
    monkeypatch.setattr(graphs, "layers_for", lambda device: decoding.last_logits)
    model = build_model(family, VOCAB, dtype=torch.float64)
    usual = draw(model, PROMPTS * 2, length=12, seed=6)
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 5.0
    model.generation_config.eos_token_id = 7
    own = model.generation_config
    other = draw(model, PROMPTS * 2, length=12, seed=6, sampler=sampler)
    assert torch.equal(usual.responses, other.responses) and torch.equal(usual.mask, other.mask)
    assert torch.equal(usual.stopped, other.stopped)
    torch.testing.assert_close(usual.logprobs, other.logprobs, rtol=0, atol=1e-5)
    assert model.generation_config is own


@pytest.mark.skipif(not decoding.has_ordered_products(), reason="a CPU, or a torch, without bf16 products of its own")
@pytest.mark.parametrize(
    "family", ["llama", "gpt_neox"]
)  # without biases, and with them; gpt2 has no linear layer but its head
def test_ordered_weights_change_only_the_rounding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: weights of another layer, a lost bias, an order that outlives the rollout (weights then trained in vain), a layer
    with a forward of its own that is overruled. Logits of bf16 have 8 bits."""
    model = build_model(family, VOCAB, dtype=torch.bfloat16)
    linear = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    biases = [layer.bias for layer in linear if layer.bias is not None]
    assert bool(biases) == (family == "gpt_neox")
    for bias in biases:
        torch.nn.init.normal_(bias)
    ids, calls = torch.tensor(PROMPTS[0])[None], list[int]()
    own = linear[0].forward
    linear[0].forward = lambda x: (calls.append(1), own(x))[1]  # type: ignore[method-assign]
    plain = model(input_ids=ids).logits
    with decoding.ordered_weights(model), torch.no_grad():
        ordered = model(input_ids=ids).logits
        assert sum("forward" in vars(layer) for layer in linear) == len(linear)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(input_ids=ids).logits.isfinite().all()
    assert len(calls) == 3
    torch.testing.assert_close(ordered, plain, rtol=2**-6, atol=2**-6 * float(plain.abs().max()))
    with pytest.raises(ZeroDivisionError), decoding.ordered_weights(model):
        1 / 0  # noqa: B018
    assert [layer for layer in linear if "forward" in vars(layer)] == linear[:1]
    monkeypatch.setattr(decoding, "_ORDERED_AT_MOST", 100)
    with decoding.ordered_weights(model):
        assert [layer for layer in linear if "forward" in vars(layer)] == linear[:1]


@pytest.mark.slow
def test_a_compiled_step_draws_the_same() -> None:
    """The real torch.compile, which takes its time."""
    model = build_model("llama", VOCAB, dtype=torch.float64)
    usual, compiled = (draw(model, PROMPTS, length=6, sampler=sampler) for sampler in ("loop", "compiled"))
    assert torch.equal(usual.responses, compiled.responses) and torch.equal(usual.mask, compiled.mask)


def test_prompts_of_any_width_share_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a graph for each width of a rollout's prompts (past eight torch.compile gives up without a word), keys and
    values in another place each time (CUDA graphs are then recorded anew), and what an earlier rollout left in them."""
    torch._dynamo.reset()  # what other tests compiled counts towards the limit
    model, compiled_to = build_model("llama", VOCAB), list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled_to.append(graph)
        return graph.forward

    step = torch.compile(decoding.last_logits, backend=backend, dynamic=False)
    monkeypatch.setattr(graphs, "layers_for", lambda device: step)
    places = set()
    for width in range(1, 13):
        prompts = [[*range(5, 5 + width)], [7, 8][:width], [9], [10]]
        plain = draw(model, prompts, seed=width, sampler="loop")
        compiled = draw(model, prompts, seed=width, sampler="compiled")
        assert torch.equal(plain.responses, compiled.responses) and torch.equal(plain.mask, compiled.mask)
        places.add(graphs._DECODERS[model]._layers[0].keys.data_ptr())
    assert len(compiled_to) == 3, "one for each of 4, 2 and 1 rows"
    assert len(places) == 1


def test_fixed_keys_and_values_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a later batch of more rows, or of longer prompts, that is written past the end of the first one's cache."""
    monkeypatch.setattr(graphs, "layers_for", lambda device: decoding.last_logits)
    model, sizes = build_model("gpt2", VOCAB), []
    for prompts in (PROMPTS[:2], PROMPTS, [[5] * 60, [3]], PROMPTS[:3]):
        plain, compiled = (draw(model, prompts, sampler=sampler) for sampler in ("loop", "compiled"))
        assert torch.equal(plain.responses, compiled.responses)
        sizes.append((graphs._DECODERS[model].rows, graphs._DECODERS[model].width))
    assert sizes == [(2, 64), (8, 64), (8, 128), (8, 128)]


def test_a_model_with_another_state_is_sampled_through_generate() -> None:
    """Mamba keeps no keys and values: every token must be that of its own full forward pass all the same."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.5)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not sampling.fits_loop(model) and sampling.fits_loop(build_model("gpt2", VOCAB))
    prompts = [[5, 6, 7], [10, 11, 12], [20, 21, 22]]  # of one length: Mamba knows no padding
    result = draw(model, prompts, seed=4)
    generator = torch.Generator().manual_seed(4)
    uniforms = [torch.rand(len(prompts), 1, generator=generator).squeeze(1).tolist() for _ in range(8)]
    for i, prompt in enumerate(prompts):
        response, logprobs = sample_alone(model, prompt, [step[i] for step in uniforms], 1.0)
        assert rows(result)[i] == response
        assert result.logprobs[i][result.mask[i]].tolist() == pytest.approx(logprobs, abs=1e-3)  # fp32 twice
    assert len({len(r) for r in rows(result)}) > 1


@pytest.mark.parametrize("family", BENT)
def test_logits_that_are_more_than_the_heads_are_sampled_in_the_loop(
    family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches: Granite, Cohere and Gemma 2 sampled from the bare product of their head, which is another distribution."""
    model = build_bent(family, VOCAB)
    assert sampling.fits_loop(model) and not sampling.fits_loop(model, compiled=True)
    for seed in (4, 5):
        result = draw(model, PROMPTS, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        uniforms = [torch.rand(len(PROMPTS), 1, generator=generator).squeeze(1).tolist() for _ in range(8)]
        for i, prompt in enumerate(PROMPTS):
            response, logprobs = sample_alone(model, prompt, [step[i] for step in uniforms], 1.0)
            assert rows(result)[i] == response
            assert result.logprobs[i][result.mask[i]].tolist() == pytest.approx(logprobs, abs=1e-4)
    assert not capfd.readouterr().err


def test_a_sliding_window_is_not_compiled() -> None:
    """A fixed cache of the whole length would let the first tokens be seen for ever."""
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    assert sampling.fits_loop(model) and not sampling.fits_loop(model, compiled=True)


def test_a_prompt_with_several_responses_is_computed_once() -> None:
    """Catches: K copies of a prompt in the prefill, and responses that go on from another prompt's cache."""
    model = build_model("llama", VOCAB, dtype=torch.float64)
    repeated = [prompt for prompt in PROMPTS[::-1] for _ in range(3)]
    assert sampling.fits_loop(model)  # its passes are not counted
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    result = draw(model, repeated, seed=4, sampler="loop")
    assert seen[0] == len(PROMPTS) and seen[1] <= len(repeated)
    generator = torch.Generator().manual_seed(4)
    uniforms = [torch.rand(len(repeated), 1, generator=generator).squeeze(1).tolist() for _ in range(8)]
    for i, prompt in enumerate(repeated):
        assert rows(result)[i] == sample_alone(model, prompt, [step[i] for step in uniforms], 1.0)[0]
