"""`rlhf chat --model ppo/demo`: a conversation, at a terminal or through a pipe.

At a terminal Ctrl-C stops the answer, and Ctrl-D or /quit ends the conversation. Standard output contains only the answers;
scores and remarks go to standard error. Each model of a comparison continues its own conversation.
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
from rlhf.generation.chat_model import ChatModel, check_text, open_models, open_reward, scores
from rlhf.generation.config import ChatConfig
from rlhf.generation.terminal import answer_view, read_input, score_line, stream_answer
from rlhf.models.compute import Compute
from rlhf.models.responses import Answer, Answers
from rlhf.models.tokenization import encode_prompt

COMMANDS = {
    "/new": "begin a new conversation",
    "/save FILE": "save this one",
    "/load FILE": "continue a saved one",
    "/help": "show this list",
    "/quit": "end",
}


class Chat:
    """Conversations with one model or several, which all get the same questions.

    Raises:
        UserError: a model, reward or saved conversation that cannot be opened.
    """

    def __init__(self, config: ChatConfig) -> None:
        compute = Compute.choose(config)
        self.config = config
        self.models = open_models(config, compute)
        self.names = [model.name for model in self.models]
        self.source = open_reward(config, self.models, compute)
        self.conversations = self._fresh()
        if config.load is not None:
            self.conversations = self._load(Path(config.load))

    def _fresh(self) -> list[Messages]:
        system = self.config.system
        return [[{"role": "system", "content": system}] if system else [] for _ in self.models]

    def _load(self, file: Path) -> list[Messages]:
        """Return saved conversations, with the system prompt of the options where they have none."""
        loaded = []
        for fresh, messages in zip(self._fresh(), history.load(file, len(self.models)), strict=True):
            own = [message for message in messages[:1] if message["role"] == "system"]
            if own and fresh and own != fresh:
                raise UserError(
                    f"{file} was held under another system prompt; leave --system out, or repeat that prompt"
                )
            loaded.append([*(own or fresh), *messages[len(own) :]])
        return loaded

    def turn(self, question: str) -> None:
        """Ask all models, show their answers and add them to the conversations.

        A question whose answer was stopped before its first token is forgotten; a stop token alone is an answer.

        Raises:
            UserError: the question is not text, or alone does not fit into a model's context, or the answers cannot be scored.
        """
        longer = [[*messages, {"role": "user", "content": question}] for messages in self.conversations]
        for conversation in longer:
            check_text(conversation)
        inputs = [self._input(model, messages) for model, messages in zip(self.models, longer, strict=True)]
        prompts = [model.encode(messages) for model, messages in zip(self.models, inputs, strict=True)]
        seed = self.config.seed * 1_000_003 + sum(message["role"] == "user" for message in longer[0])
        answers: list[Answer] = []
        with answer_view(self.names) as show:
            for number, (model, ids) in enumerate(zip(self.models, prompts, strict=True)):
                answers.append(stream_answer(model, ids, partial(show, number), seed=seed, stoppable=True))
        if not all(answer.tokens for answer in answers):
            print("(no answer: the question is forgotten)", file=sys.stderr)
            return
        self.conversations = [
            [*messages, {"role": "assistant", "content": answer.text}]
            for messages, answer in zip(longer, answers, strict=True)
        ]
        if self.config.save is not None:
            self.save(Path(self.config.save))
        if self.source is not None:  # last, so that a reward that fails does not cost the answers
            values = scores(self.source, [{"prompt": messages} for messages in inputs], prompts, Answers.of(answers))
            print(score_line(self.names, values), file=sys.stderr, flush=True)

    def _input(self, model: ChatModel, messages: Messages) -> Messages:
        """Return the part of a conversation that fits the model's context and `history_tokens`."""
        room = max(model.context - model.length, 0)
        limit = min(self.config.history_tokens or room, room)
        return history.recent(messages, limit, lambda part: len(encode_prompt(model.tokenizer, part)))

    def save(self, file: Path) -> None:
        """Save the whole conversations, including turns that no longer fit the models' context."""
        history.save(file, self.names, self.conversations)

    def command(self, line: str) -> bool:
        """Run a command line that begins with a slash; return False to end the conversation.

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
            words = [command.split()[0] for command in COMMANDS]
            raise UserError(f"no command '{word}'{did_you_mean(word, words)}; /help lists them")
        return word != "/quit"

    def run(self) -> None:
        """Run until /quit or the end of the input. At a terminal, the conversation continues after a user's mistake."""
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
            except KeyboardInterrupt:  # during an answer, it ends the answer alone
                if not at_terminal:
                    raise
                print("\n(/quit or Ctrl-D ends)", file=sys.stderr)
            except UserError as error:
                if not at_terminal:
                    raise
                print(f"error: {redact(str(error))}", file=sys.stderr)


def main() -> None:
    """Run the command line."""
    Chat(parse_config(ChatConfig)).run()


if __name__ == "__main__":
    run_command(main)
