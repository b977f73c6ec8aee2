"""Decoding by recorded steps: the code that a GPU runs, with a stand-in for the CUDA graph that replays on a CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import FAMILIES, PROMPTS, build_bent, build_model, rows
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from rlhf.models import decoding, graphs, packing, roles, sampling
from rlhf.models.compute import Compute
from rlhf.models.drawing import ResponseBuffer, Sampled
from rlhf.models.roles import SharedModels
from rlhf.models.sampling import Sampler, sample
from rlhf.models.sequences import pad

VOCAB = 40
STOPS = [2, 9, 17, 23, 31]


class Tape(TorchDispatchMode):
    """A graph's stand-in: every replay must run the first one's operators, on the tensors of the same addresses.

    What a CUDA graph would do in silence fails here: numbers of the host that change from step to step, tensors that were
    made anew, and looks at the device.
    """

    recorded: list[Tape]

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()
        self.step, self.replays = step, 0
        self.first: list[Any] = []
        self.trace: list[Any] = []

    def __call__(self) -> None:
        self.trace, self.alive, self.made = [], list[Tensor](), set[int]()
        with graphs.no_host_waits(), self:
            self.step()
        self.first = self.first or self.trace
        self.replays += 1
        assert self.trace == self.first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        places = [x.untyped_storage().data_ptr() for x in flat if isinstance(x, Tensor)]
        outside = [place for place in places if place not in self.made]
        numbers = [x for x in flat if isinstance(x, (int, float, bool))]
        constant = func is torch.ops.aten.lift_fresh.default  # a number of the code, as a tensor
        if not constant:
            self.trace.append((str(func), outside, numbers))
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and (constant or x.untyped_storage().data_ptr() not in places):
                self.made.add(x.untyped_storage().data_ptr())
                self.alive.append(x)  # or its address would be another's
        return out


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The steps that were recorded; a CPU takes itself for a device with graphs."""
    made: list[Tape] = []

    def record(step: Callable[[], None], device: torch.device, pool: Any) -> Tape:
        made.append(Tape(step))
        return made[-1]

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "layers_for", lambda device: decoding.last_logits)
    for module in (graphs, roles, sampling):
        monkeypatch.setattr(module, "records", lambda device: True)
    return made


def draw(model: PreTrainedModel, prompts: list[list[int]], sampler: Sampler = "auto", **options: Any) -> Sampled:
    ids, mask = pad(prompts, 0, side="left")
    settings = {"max_new_tokens": 12, "temperature": 1.0, "stop_token_ids": STOPS, "pad_token_id": 0}
    generator = torch.Generator().manual_seed(options.pop("seed", 5))
    return sample(model, ids, mask, generator=generator, sampler=sampler, **{**settings, **options})


def assert_same(one: Sampled, other: Sampled) -> None:
    assert rows(one) == rows(other)
    assert torch.equal(one.responses, other.responses) and torch.equal(one.stopped, other.stopped)
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("look_every", [1, 3, 8, 50])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.8}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_sample_what_the_loop_samples(
    family: str, options: dict[str, Any], look_every: int, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a graph that reads an old cache, mask, position or number of the step; rows mixed up when the batch is halved;
    tokens after a stop that the host has not seen yet."""
    model = build_model(family, VOCAB, dtype=torch.float64)
    monkeypatch.setattr(ResponseBuffer, "look_every", look_every)
    expected = draw(model, PROMPTS * 4, "loop", **options)
    assert_same(draw(model, PROMPTS * 4, **options), expected)
    assert tapes and sum(tape.replays for tape in tapes) > len(tapes)
    if look_every == 1 and not options:
        assert len(tapes) > 1, "the batch must be halved"


@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed"])
def test_every_attention_reads_the_mask(attention: str, tapes: list[Tape]) -> None:
    """Catches: a boolean mask that is added to the scores, and unused columns of the cache that are attended to."""
    model = build_model("llama", VOCAB)
    if attention == "packed":
        assert packing.pack_rows(model)
    else:
        model.set_attn_implementation(attention)
    assert_same(draw(model, PROMPTS), draw(model, PROMPTS, "loop"))
    assert tapes


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
def test_heads_that_are_more_than_a_product_are_recorded(family: str, tapes: list[Tape]) -> None:
    """Catches: the bare product in place of scaled or capped logits."""
    model = build_bent(family, VOCAB)
    assert_same(draw(model, PROMPTS), draw(model, PROMPTS, "loop"))
    assert tapes


def test_batches_fall_into_a_few_sizes() -> None:
    """Catches: a graph for every number of rows; a size that wastes more than a third, or that is too small."""
    sizes = [graphs.size_class(rows) for rows in range(1, 257)]
    assert all(rows <= size < 1.5 * rows for rows, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert [graphs.width_class(tokens) for tokens in (1, 63, 64, 65, 128, 129)] == [64, 64, 64, 128, 128, 192]


def test_idle_rows_fill_a_batch_up(tapes: list[Tape]) -> None:
    """Catches: rows that no prompt has which are returned, or which keep the batch from being halved."""
    model = build_model("llama", VOCAB, dtype=torch.float64)
    for count in (7, 5, 1):
        sampled = draw(model, (PROMPTS * 2)[:count])
        assert len(sampled.responses) == count
        assert_same(sampled, draw(model, (PROMPTS * 2)[:count], "loop"))
    decoder = graphs._DECODERS[model]
    assert decoder.rows == 8 and {1, 3, 6, 8} <= set(decoder._steps) <= {1, 2, 3, 4, 6, 8}


def test_a_shorter_limit_ends_before_the_buffer_does() -> None:
    """Catches: tokens past the limit of a batch whose tensors were made for longer responses, and stops among them."""
    model = build_model("llama", VOCAB, dtype=torch.float64)
    for length in (12, 3, 1):
        short = draw(model, PROMPTS, max_new_tokens=length)
        assert_same(short, draw(model, PROMPTS, "loop", max_new_tokens=length))
        assert short.responses.shape[1] <= length
    assert graphs._DECODERS[model].buffer.length == 12


def test_nothing_moves_between_rollouts(tapes: list[Tape]) -> None:
    """Catches: merged weights, a cache or random numbers in new tensors for each rollout, for which steps would be recorded anew,
    and weights of the last rollout that are read in the next."""
    base = build_model("llama", VOCAB)
    assert packing.pack_rows(base)
    models = SharedModels(
        base, LoraConfig(r=4, target_modules="all-linear"), Compute(torch.device("cpu"), torch.float32)
    )
    counts, answers = [], []
    for seed in range(4):
        with torch.no_grad():
            for parameter in models.trainable("policy").values():
                parameter.add_(0.2 * torch.randn_like(parameter))
        prompts = [*PROMPTS[:7], [*range(5, 8 + 4 * seed)]]
        with models.merged_policy() as policy:
            answers.append(rows(draw(policy, prompts, seed=seed)))
            assert answers[-1] == rows(draw(policy, prompts, "loop", seed=seed))
        counts.append(len(tapes))
    assert counts[-1] == counts[1] <= 4 and answers[0][0] != answers[1][0]


def test_moved_weights_are_recorded_anew(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a graph that goes on reading weights which are no longer there."""
    model = build_model("llama", VOCAB, dtype=torch.float64)
    draw(model, PROMPTS)
    first = len(tapes)
    draw(model, PROMPTS, seed=6)
    assert len(tapes) == first
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data
    assert_same(draw(model, PROMPTS), draw(model, PROMPTS, "loop"))
    assert len(tapes) > first
    second = len(tapes)
    assert_same(draw(model, PROMPTS, temperature=0.7), draw(model, PROMPTS, "loop", temperature=0.7))
    assert len(tapes) > second, "a temperature is part of the step"


def test_a_large_cache_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: keys and values that take the memory of the training that follows, and a model that lives as long as they."""
    model = build_model("llama", VOCAB)
    draw(model, PROMPTS)
    assert model in graphs._DECODERS
    monkeypatch.setattr(graphs, "stays", lambda nbytes, device: nbytes < 1000)
    draw(model, PROMPTS)
    assert model not in graphs._DECODERS
    monkeypatch.undo()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Words:
    """Stop strings by hand: ends where the last two tokens are of one parity."""

    def __call__(self, ids: Tensor, scores: Any) -> Tensor:
        return (ids[:, -1] % 5 == 0) & (ids[:, -2 if ids.shape[1] > 1 else -1] % 2 == 0)


@pytest.mark.parametrize("look_every", [1, 5])
def test_stop_strings_and_listeners_get_each_token_once(look_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: tokens after a stop string that the host had not seen when they were drawn, or that are passed on."""
    model = build_model("llama", VOCAB, dtype=torch.float64)
    monkeypatch.setattr(ResponseBuffer, "look_every", look_every)
    heard: dict[Sampler, list[list[int]]] = {"auto": [], "loop": []}
    results = [
        draw(model, PROMPTS, sampler, stop_strings=Words(), on_tokens=lambda x, to=steps: to.append(x.tolist()))
        for sampler, steps in heard.items()
    ]
    assert_same(*results)
    steps = [step for step in heard["auto"] if step]
    assert steps == [step for step in heard["loop"] if step]
    assert sum(map(len, steps)) == int(results[0].mask.sum())
    plain = draw(model, PROMPTS)
    assert results[0].mask.sum() < plain.mask.sum(), "a stop string must end something"


def test_auto_records_where_the_model_and_the_memory_allow(
    tapes: list[Tape], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches: a rollout that ends for want of memory, or in a refusal of CUDA, where the loop would have done."""
    model = build_model("llama", VOCAB, dtype=torch.float64)
    expected = draw(model, PROMPTS, "loop")
    need = 4 * graphs.cache_bytes(model, 8 * 64)
    for total, recorded in ((need, True), (need - 1, False)):
        graphs._DECODERS.pop(model, None)
        tapes.clear()
        monkeypatch.setattr(graphs, "total_bytes", lambda device, total=total: total)
        assert_same(draw(model, PROMPTS), expected)
        assert bool(tapes) == recorded
    monkeypatch.setattr(graphs, "total_bytes", lambda device: need)

    def refuse(*_: Any) -> Any:
        raise graphs.NotRecordable("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", refuse)
    with pytest.raises(graphs.NotRecordable):
        draw(model, PROMPTS, "compiled")
    assert_same(draw(model, PROMPTS), expected)
    assert "without CUDA graphs: operation not permitted" in capfd.readouterr().err
    assert_same(draw(model, PROMPTS), expected)
    assert not capfd.readouterr().err and model not in graphs._DECODERS


def test_models_that_wait_or_move_are_sampled_in_the_loop(tapes: list[Tape]) -> None:
    """Catches: a step that looks at its numbers (an expert that no token chose), and weights that come and go."""
    waiting, moving = build_model("llama", VOCAB), build_model("llama", VOCAB)
    own = waiting.model.layers[0].mlp.forward
    waiting.model.layers[0].mlp.forward = lambda x: own(x) if bool(x.isfinite().all()) else x
    moving.model.layers[1]._hf_hook = object()
    for model in (waiting, moving):
        assert sampling.fits_loop(model) and not sampling.fits_loop(model, compiled=True, tokens=20)
        draw(model, PROMPTS)
        assert not tapes


@pytest.mark.parametrize(("window", "recorded"), [(17, True), (16, False)])
def test_a_window_wider_than_the_rows_is_recorded(window: int, recorded: bool, tapes: list[Tape]) -> None:
    """A fixed cache holds all columns; a window that leaves the first ones out would need another. PROMPTS have 5 tokens."""
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    assert_same(draw(model, PROMPTS), draw(model, PROMPTS, "loop"))
    assert bool(tapes) == recorded


@pytest.mark.parametrize("heads", [2, 8])
def test_one_token_attends_without_repeated_keys(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: query heads that read another group's keys, and keys that are copied for each of them."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, 1, 4), torch.randn(3, heads, 16, 4), torch.randn(3, heads, 16, 4)
    mask = torch.rand(3, 1, 1, 16) < 0.5
    mask[..., 0] = True
    expected = packing._attend(query, key, value, mask, 0.5, 0.0)
    monkeypatch.setattr(packing, "repeat_kv", lambda x, n: 1 / 0)
    torch.testing.assert_close(packing._attend_fused(query, key, value, mask, 0.5, 0.0), expected)


def test_waits_are_refused() -> None:
    """Catches: a mode that lets a wait through, or refuses what does not wait."""
    x = torch.arange(6.0)
    waits: list[Callable[[], Any]] = [
        x.sum().item, x.tolist, lambda: bool(x.any()), lambda: int(x[0]), lambda: x.nonzero(), lambda: x[x > 2],
        lambda: torch.equal(x, x), lambda: x.unique(), lambda: x.long().bincount(), lambda: x.cpu(), lambda: x.numpy(),
        lambda: x.masked_fill_(x > 9, 0.0)[x > 2], lambda: x.repeat_interleave(torch.ones(6, dtype=torch.long)),
        lambda: x.masked_select(x > 2),
    ]  # fmt: skip
    for wait in waits:
        with pytest.raises(graphs.HostWait), graphs.no_host_waits():
            wait()
    with graphs.no_host_waits():
        assert x[torch.tensor([1, 2])].sum().shape == ()
        x.index_put_((torch.tensor([1]),), torch.ones(1))
        x.repeat_interleave(torch.ones(6, dtype=torch.long), output_size=6)
        torch.where(x > 2, x, 0.0).masked_fill(x > 3, 1.0)
