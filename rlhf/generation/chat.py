"""`rlhf chat --model ppo/demo`: a conversation, at a terminal or through a pipe.

At a terminal Ctrl-C stops the answer, and Ctrl-D or /quit ends the conversation. Standard output holds the answers alone;
scores and remarks go to standard error. Each model of a comparison goes on from its own answers.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rlhf.base.errors import UserError, did_you_mean, run_command
from rlhf.base.redaction import redact
from rlhf.config import parse_config
from rlhf.data_prep.formats.rows import Messages
from rlhf.generation import history
from rlhf.generation.config import ChatConfig
from rlhf.generation.page import say_aloud, score_line, spread
from rlhf.generation.speaker import Answer, Speaker, check_text, open_reward, open_speakers, read_input, scores
from rlhf.models.compute import Compute
from rlhf.models.tokenization import encode_prompt

COMMANDS = {
    "/new": "begin a new conversation",
    "/save FILE": "save this one",
    "/load FILE": "go on with a saved one",
    "/help": "this list",
    "/quit": "end",
}


class Chat:
    """A conversation with one model, or the same with several.

    Raises:
        UserError: a model, reward or saved conversation that cannot be opened.
    """

    def __init__(self, config: ChatConfig) -> None:
        compute = Compute.choose(config)
        self.config = config
        self.speakers = open_speakers(config, compute)
        self.names = [speaker.name for speaker in self.speakers]
        self.source = open_reward(config, self.speakers, compute)
        self.conversations = self._fresh()
        if config.load is not None:
            self.conversations = self._load(Path(config.load))

    def _fresh(self) -> list[Messages]:
        system = self.config.system
        return [[{"role": "system", "content": system}] if system else [] for _ in self.speakers]

    def _load(self, file: Path) -> list[Messages]:
        """Saved conversations, with the system prompt of the options where they have none."""
        loaded = []
        for fresh, said in zip(self._fresh(), history.load(file, len(self.speakers)), strict=True):
            own = [message for message in said[:1] if message["role"] == "system"]
            if own and fresh and own != fresh:
                raise UserError(f"{file} was held under another system prompt; leave --system out, or say the same")
            loaded.append([*(own or fresh), *said[len(own) :]])
        return loaded

    def turn(self, question: str) -> None:
        """Asks all models, shows their answers and remembers them, also one that is nothing but a stop token; a question
        whose answer was stopped before it began is forgotten.

        Raises:
            UserError: the question is no text, or alone does not fit into a model's context, or the answers cannot be scored.
        """
        asked = [[*said, {"role": "user", "content": question}] for said in self.conversations]
        for conversation in asked:
            check_text(conversation)
        read = [self._read(speaker, said) for speaker, said in zip(self.speakers, asked, strict=True)]
        prompts = [speaker.encode(said) for speaker, said in zip(self.speakers, read, strict=True)]
        seed = self.config.seed * 1_000_003 + sum(message["role"] == "user" for message in asked[0])
        answers: list[Answer] = []
        with spread(self.names) as show:
            for number, (speaker, ids) in enumerate(zip(self.speakers, prompts, strict=True)):
                answers.append(say_aloud(speaker, ids, partial(show, number), seed=seed, stoppable=True))
        if not all(answer.tokens for answer in answers):
            print("(no answer: the question is forgotten)", file=sys.stderr)
            return
        self.conversations = [
            [*said, {"role": "assistant", "content": answer.text}] for said, answer in zip(asked, answers, strict=True)
        ]
        if self.config.save is not None:
            self.save(Path(self.config.save))
        if self.source is not None:  # last: what was said stays said where the reward fails
            found = scores(self.source, [{"prompt": said} for said in read], prompts, answers)
            print(score_line(self.names, found), file=sys.stderr, flush=True)

    def _read(self, speaker: Speaker, said: Messages) -> Messages:
        """What the model reads of a conversation."""
        room = max(speaker.context - speaker.length, 0)
        limit = min(self.config.history_tokens or room, room)
        return history.recent(said, limit, lambda messages: len(encode_prompt(speaker.tokenizer, messages)))

    def save(self, file: Path) -> None:
        """Saves the whole conversation, with the turns that the models no longer read."""
        history.save(file, self.names, self.conversations)

    def command(self, line: str) -> bool:
        """Does what a line with a slash says; False ends the conversation.

        Raises:
            UserError: no such command, or a file that cannot be read or written.
        """
        word, _, argument = line.partition(" ")
        file = argument.strip()
        if word in ("/save", "/load") and not file:
            raise UserError(f"{word} needs a file name")
        if word == "/new":
            self.conversations = self._fresh()
        elif word == "/save":
            self.save(Path(file))
        elif word == "/load":
            self.conversations = self._load(Path(file))
        elif word == "/help":
            print("\n".join(f"{command:11s} {what}" for command, what in COMMANDS.items()), file=sys.stderr)
        elif word != "/quit":
            known = [command.split()[0] for command in COMMANDS]
            raise UserError(f"no command '{word}'{did_you_mean(word, known)}; /help lists them")
        return word != "/quit"

    def run(self) -> None:
        """Goes on until /quit or the end of the input. At a terminal a mistake is told and the conversation goes on."""
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            import readline  # noqa: F401  (importing it lets input() edit lines)

            print(f"{', '.join(self.names)}: /help lists the commands, Ctrl-C stops an answer", file=sys.stderr)
        while True:
            try:
                line = read_input(partial(input, "> " if at_terminal else "")).strip()
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line:
                    self.turn(line)
            except EOFError:
                return
            except KeyboardInterrupt:  # not while an answer came, which only ends the answer
                if not at_terminal:
                    raise
                print("\n(/quit or Ctrl-D ends)", file=sys.stderr)
            except UserError as error:
                if not at_terminal:
                    raise
                print(f"error: {redact(str(error))}", file=sys.stderr)


def main() -> None:
    """Command line."""
    Chat(parse_config(ChatConfig)).run()


if __name__ == "__main__":
    run_command(main)
