"""The quantities of the supervised stages' audit in causal order, each with its cause, what to do, and what it explains."""

from __future__ import annotations

from rlhf.doctor.audit.compare import Quantity
from rlhf.doctor.health.findings import CHECKS

_OUTCOMES = [check.name for check in CHECKS if {"sft", "reward", "pretrain"} & set(check.stages)]


def _quantity(name: str, cause: str, action: str, source: str = "docs/house.md, one preference's way") -> Quantity:
    return Quantity(name=name, cause=cause, action=action, explains=tuple(_OUTCOMES), source=source)


ROWS_DRAWN = _quantity(
    "rows_drawn",
    "rows are trained on again before the others were",
    "look at the sampler: each epoch has an order of its own, and each row comes once in it",
)
TOKENS = _quantity(
    "tokens",
    "the tokens that are trained on are not those of their data rows",
    "look at what renders and cuts the rows: the chat template is applied once to prompt and answer of one row, the answer "
    "ends in one stop token, and rows that are too long are left out and not cut",
)
RATINGS = _quantity(
    "ratings",
    "the ratings are not those of the data rows, or belong to other responses",
    "look at what orders the responses of a prompt and their ratings: a higher rating is better",
)
PADDING = _quantity(
    "padding",
    "the mask does not cover exactly the tokens of each row",
    "make masks from the lengths of the rows, and never from token != pad",
)
LABELS = _quantity(
    "labels",
    "the labels are not the answer's tokens, its stop token included, with no loss on prompt and padding",
    "look at what masks the prompt; labels stand at their own tokens, and are shifted once, by the loss",
)
DROPOUT = _quantity(
    "dropout",
    "the model drops another share than the options say",
    "look at lora_dropout, and at what switches the model to training and back",
)
FROZEN_WEIGHTS = _quantity(
    "frozen_weights",
    "weights that do not train are not those of the registered parent, or have changed",
    "look at what loads and merges the base and its adapters, and keep frozen weights out of the optimiser",
)
SCORES = _quantity(
    "scores",
    "the scores are not those of the reward model at the last token of each response",
    "look at the place where the score is read: the last real token, never padding",
)
SFT_LOSS = _quantity(
    "loss",
    "the loss is not the mean negative log-likelihood of the answers' tokens over the whole update",
    "look at the shift of the labels by one, at the tokens that count, and at the divisor: all labelled tokens of the update",
)
RANKING_LOSS = _quantity(
    "loss",
    "the loss is not -log sigmoid(better - worse), averaged over the pairs of each prompt, and over prompts and microbatches",
    "look at the sign, at which of a pair is the better, at ties, margins and weights, and at the divisor",
    "Ouyang et al. 2022, eq. 1",
)
GRADIENTS_ZEROED = _quantity(
    "gradients_zeroed",
    "gradients of an earlier update are still there when the next begins",
    "set the gradients to zero after each optimiser step",
)
GRADIENT = _quantity(
    "gradient",
    "the gradient is not that of the loss",
    "look at what is cut off from the loss, at what scales it, and at the sum over microbatches",
)
GRADIENT_CLIPPING = _quantity(
    "gradient_clipping",
    "the gradients are not scaled down to max_grad_norm",
    "clip the norm of all gradients together, once, before the optimiser's step",
)
LEARNING_RATE = _quantity(
    "learning_rate",
    "the step size is not what the schedule should have at this update",
    "step the schedule once for each update, and give it the number of all updates of the run",
)
OPTIMIZER_STEP = _quantity(
    "optimizer_step",
    "the weights did not move as AdamW moves them",
    "look at the optimiser's states, betas and weight_decay, and whether it holds the weights that are used",
)
NORMALIZATION = _quantity(
    "normalization",
    "mean and spread in the manifest are not those of the scores that should become 0 and 1",
    "look at the rows that are scored for it, and at what is written into the manifest",
)
SAVED_SCORES = _quantity(
    "saved_scores",
    "the registered reward model does not score as the trained one did",
    "look at what saves the adapter and the head, and at the parent that they are put on",
)
