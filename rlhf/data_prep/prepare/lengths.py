"""Lengths in tokens, as the stages count them, and the rule for longer texts: drop, or cut on a named side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf.base.errors import UserError
from rlhf.data_prep.formats.records import Record
from rlhf.data_prep.formats.rows import Messages
from rlhf.data_prep.prepare.clean import Dropped, without_responses
from rlhf.data_prep.prepare.recipe import Options
from rlhf.data_prep.prepare.tally import Tally
from rlhf.models.catalogue import resolve_model
from rlhf.models.messages import PARTS
from rlhf.models.tokenization import TemplateChange, check_texts, encode_prompt, encode_response, load_tokenizer


class Lengths:
    """Measures and limits records with the tokenizer and chat template of a recipe."""

    def __init__(self, options: Options) -> None:
        assert options.tokenizer is not None
        self.options = options
        self.tokenizer: Any = load_tokenizer(
            resolve_model(options.tokenizer), chat_template=options.chat_template, untrained=True
        )

    def prompt_length(self, prompt: Messages) -> int:
        """Return the tokens of a prompt, template and answer header included."""
        return len(encode_prompt(self.tokenizer, prompt))

    def response_length(self, prompt: Messages, response: Messages) -> int:
        """Return the tokens of a response, stop token included."""
        return len(encode_response(self.tokenizer, prompt, response))

    def limit(self, record: Record, tally: Tally) -> Record:
        """Return the record within the limits of the recipe.

        Raises:
            Dropped: it is too long and the rule is to drop it, or nothing of it fits.
            UserError: the chat template changes its texts.
        """
        o = self.options
        try:
            check_texts(self.tokenizer, record.prompt, [*map(record.answer, range(len(record.responses)))])
        except TemplateChange as change:
            raise UserError(f"{record.place}: {change}; give another chat_template, or leave such rows out") from change
        if o.max_prompt_length is not None and self.prompt_length(record.prompt) > o.max_prompt_length:
            if o.long_prompts == "drop" or any(PARTS in message for message in record.prompt):
                raise Dropped(f"prompt of more than {o.max_prompt_length} tokens")
            record = replace(record, prompt=self._cut_prompt(record.prompt, o.max_prompt_length, o.long_prompts))
            tally.changed("prompt length", f"{record.place}: {o.long_prompts}")
        if o.max_response_length is not None:
            record = self._limit_responses(record, o.max_response_length, tally)
        return record

    def _limit_responses(self, record: Record, limit: int, tally: Tally) -> Record:
        fits = [
            self.response_length(record.prompt, record.answer(place)) <= limit for place in range(len(record.responses))
        ]
        if all(fits):
            return record
        if self.options.long_responses == "drop" or record.parts:
            return without_responses(record, fits, f"response of more than {limit} tokens")
        side = self.options.long_responses

        def cut(response: str) -> str:
            return self._cut(
                response,
                side,
                lambda text: self.response_length(record.prompt, [{"role": "assistant", "content": text}]) <= limit,
            )

        tally.changed("response length", f"{record.place}: {side}")
        return replace(record, responses=[r if ok else cut(r) for r, ok in zip(record.responses, fits, strict=True)])

    def _cut_prompt(self, prompt: Messages, limit: int, side: str) -> Messages:
        """Return the prompt less its earliest exchanges (the system message stays), then less text of its last turn."""
        system, turns = (prompt[:1], prompt[1:]) if prompt[0]["role"] == "system" else ([], prompt)
        while side == "truncate_left" and len(turns) > 1 and self.prompt_length([*system, *turns]) > limit:
            turns = turns[1:]
            while turns[0]["role"] != "user" and len(turns) > 1:
                turns = turns[1:]

        def whole(text: str) -> Messages:
            return [*system, *turns[:-1], {**turns[-1], "content": text}]

        if self.prompt_length([*system, *turns]) <= limit:
            return [*system, *turns]
        return whole(self._cut(turns[-1]["content"], side, lambda text: self.prompt_length(whole(text)) <= limit))

    def _cut(self, text: str, side: str, fits: Any) -> str:
        """Return the longest part of the text, cut between two tokens on one side, that fits.

        Raises:
            Dropped: not even one token fits.
        """
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        at_start = side == "truncate_left"
        # places to cut at, from the shortest rest to the longest; the middle of a character is none
        cuts = sorted({start for start, _ in offsets} if at_start else {end for _, end in offsets}, reverse=at_start)
        low, high = 0, len(cuts)
        while low < high:  # more text never has fewer tokens, but for one at the seam: the last step checks
            middle = (low + high) // 2
            low, high = (middle + 1, high) if fits(_part(text, cuts[middle], at_start)) else (low, middle)
        for index in range(low - 1, -1, -1):
            part = _part(text, cuts[index], at_start).strip()
            if part and fits(part):
                return part
        raise Dropped("nothing fits into the limit of tokens beside the template")


def _part(text: str, cut: int, at_start: bool) -> str:
    return text[cut:] if at_start else text[:cut]
