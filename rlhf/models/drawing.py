"""Drawing tokens from logits, and the responses that they become.

Nothing in `ResponseBuffer.take` waits for the device, so that it can be recorded with the step that makes the logits.

Legend: B responses, R response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StopStringCriteria, TopPLogitsWarper

from rlhf.models.logprobs import position_chunks

#: Steps between looks at a GPU's finished rows.
_LOOK_EVERY = 8


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Responses to a batch of prompts."""

    responses: Tensor
    """(B, R) int64: sampled tokens, the stop token included, then padding."""
    mask: Tensor
    """(B, R) bool: True at sampled tokens; always a prefix of at least one token."""
    logprobs: Tensor
    """(B, R) fp32: log-probability of each token under the model that sampled it, nats; 0 where masked."""
    stopped: Tensor
    """(B,) bool: True where the response ended in a stop token within the length limit."""


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How tokens are drawn from logits, and which end a response."""

    temperature: float
    top_p: float
    stop_token_ids: tuple[int, ...]
    pad_token_id: int


class ResponseBuffer:
    """Unfinished responses (B, R): draws their tokens and records where they end."""

    def __init__(
        self,
        uniform: Tensor,
        options: DrawOptions,
        stop_strings: StopStringCriteria | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
    ) -> None:
        """`uniform` (R, B, 1) holds the random number by which each token is picked from its logits."""
        length, size = uniform.shape[:2]
        self.uniform, self.options, self.length = uniform, options, length
        self.stop_strings, self.on_tokens = stop_strings, on_tokens
        device = uniform.device
        self.stops = torch.tensor(options.stop_token_ids, dtype=torch.long, device=device)
        self.responses = torch.full((size, length), options.pad_token_id, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(size, length, dtype=torch.float32, device=device)
        self.mask = torch.zeros(size, length, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(size, dtype=torch.bool, device=device)

    @property
    def look_every(self) -> int:
        """Steps between looks at the finished rows: a look makes the host wait for a GPU."""
        return 1 if self.stops.device.type == "cpu" or self.on_tokens is not None else _LOOK_EVERY

    def draw(self, t: int, logits: Tensor, rows: Tensor) -> Tensor:
        """Draw token t of some rows from their logits (rows, V); tokens of finished rows are not stored."""
        tokens = self.take(t, logits, rows)
        self.look(t, rows)
        return tokens

    def take(self, t: int | Tensor, logits: Tensor, rows: Tensor) -> Tensor:
        """Draw and store token t, a number or (1,), of some rows; stop strings wait for `look`."""
        options = self.options
        tokens, token_logprobs = draw_tokens(logits, self.uniform[t, rows], options.temperature, options.top_p)
        live = ~self.stopped[rows]
        self.responses[rows, t] = torch.where(live, tokens, options.pad_token_id)
        self.logprobs[rows, t] = torch.where(live, token_logprobs, 0.0)
        self.mask[rows, t] = live
        self.stopped[rows] |= live & (tokens[:, None] == self.stops).any(dim=1)
        return tokens

    def look(self, t: int, rows: Tensor) -> None:
        """End the rows whose token t completes a stop string, and pass on the tokens t, if anyone wants them.

        Later tokens may have been drawn already; rows that end here lose theirs.
        """
        if self.on_tokens is not None:
            self.on_tokens(self.responses[rows, t][self.mask[rows, t]])
        if self.stop_strings is not None:
            ended = self.mask[rows, t] & self.stop_strings(self.responses[rows, : t + 1], cast(Any, None))
            self.stopped[rows] |= ended
            self.mask[rows, t + 1 :] &= ~ended[:, None]

    def restart(self, other: ResponseBuffer) -> None:
        """Begin another buffer's responses in these tensors, where they are; rows beyond its own count as finished."""
        size = len(other.stopped)
        self.uniform[: other.length, :size].copy_(other.uniform)
        self.responses.fill_(self.options.pad_token_id)
        self.logprobs.zero_()
        self.mask.zero_()
        self.stopped.fill_(True)
        self.stopped[:size] = False
        self.stop_strings, self.on_tokens = other.stop_strings, other.on_tokens

    def copy_to(self, other: ResponseBuffer) -> None:
        """Store these responses in the buffer that `restart` began from."""
        for name in ("responses", "logprobs", "mask"):
            getattr(other, name).copy_(getattr(self, name)[: len(other.stopped), : other.length])
        other.stopped.copy_(self.stopped[: len(other.stopped)])

    def finished(self) -> Sampled:
        """Return the responses, cut to the longest."""
        width = int(self.mask.sum(dim=1).max())
        mask = self.mask[:, :width]
        return Sampled(
            responses=torch.where(mask, self.responses[:, :width], self.options.pad_token_id),
            mask=mask,
            logprobs=torch.where(mask, self.logprobs[:, :width], 0.0),
            stopped=self.stopped,
        )


def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return one token a row of (B, V) logits by inverse CDF, and its log-probability in fp32.

    `torch.multinomial` draws a random number for every entry of the vocabulary, on one thread; this takes one a row.
    """
    if temperature == 0:  # the limit: all of the probability is on one token
        return logits.argmax(dim=-1), logits.new_zeros(len(logits), dtype=torch.float32)
    parts = [_draw(few, numbers, temperature, top_p) for few, numbers in position_chunks(logits, uniform)]
    tokens, logprobs = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return tokens, logprobs


def _draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if top_p < 1:
        warp: Any = TopPLogitsWarper(top_p)
        logits = warp(None, logits)
    probabilities = torch.softmax(logits, dim=-1)
    cdf = probabilities.cumsum(dim=-1)
    # right=True: the first index whose cdf exceeds u, so a token of probability 0 is never drawn, not even at u = 0.
    tokens = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)
    return tokens.squeeze(1), probabilities.gather(1, tokens).log().squeeze(1)
