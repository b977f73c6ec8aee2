"""Sequence classifiers with one output: transformers' own where they fit a model, and generic ones for the others."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf.models.anatomy import anatomy, left_justified, run_backbone, takes
from rlhf.models.compute import quiet_transformers

#: End of the names of generic classes, in `architectures` of a saved config.
GENERIC = "ForScoring"


def fresh_classifier(config: PreTrainedConfig, causal: PreTrainedModel) -> Any:
    """Return a classifier without weights for a causal model's backbone: transformers' own if there is one that fits.

    It fits if its `score` reads this very backbone, rows padded on either side included.
    """
    made_of = anatomy(causal)
    root = made_of.trunk.partition(".")[0]
    with torch.device("meta"):
        try:
            library: Any = AutoModelForSequenceClassification.from_config(config)
        except (ValueError, AttributeError):  # none for this type of model
            library = None
        score = getattr(library, "score", None)
        if (
            made_of.reads_padding
            and isinstance(score, nn.Linear)
            and score.in_features == made_of.width
            and type(getattr(library, root, None)) is type(getattr(causal, root))
            and takes(library, "position_ids")
        ):
            return library
        settings: Any = config
        settings.scored_trunk, settings.scored_width = made_of.trunk, made_of.width
        return generic_class(cast(Any, type(causal)))(config)


def open_classifier(folder: Any, **options: Any) -> Any:
    """Load a saved classifier, transformers' own or a generic one; raises what transformers raises."""
    quiet_transformers()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if is_generic(config):
        kind: Any = generic_class(cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)])
        return kind.from_pretrained(folder, config=config, use_safetensors=True, **options)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, **options
    )


def last_scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
    """Return a reward model's raw scores (B,) fp32, each read at its row's last token by the mask (B, T), whatever token it is.

    transformers' classifiers score every token and pick the last that is not the pad token, which a policy may draw, too.
    """
    outputs: list[Tensor] = []
    score = getattr(model, "score", None)  # peft's wrappers pass the name on
    hook = score.register_forward_hook(lambda *call: outputs.append(call[-1])) if isinstance(score, nn.Module) else None
    try:
        scores = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options).logits
    finally:
        if hook is not None:
            hook.remove()
    if outputs and outputs[-1].shape[:2] == input_ids.shape:
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask.bool() * columns).argmax(dim=1)
        scores = outputs[-1][torch.arange(len(last), device=last.device), last]
    return scores.squeeze(-1).float()


def is_generic(config: PreTrainedConfig) -> bool:
    """Return True for the config of a saved generic classifier, which plain transformers has no class for."""
    return any(name.endswith(GENERIC) for name in config.architectures or [])


@functools.cache
def generic_class(causal: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a class of models with a causal class's backbone and a linear score of the last real token's state."""
    family: Any = next(kind for kind in causal.__mro__ if kind.__name__.endswith("PreTrainedModel"))

    class Scoring(family):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.trunk: str = config.scored_trunk
            root = self.trunk.partition(".")[0]
            setattr(self, root, getattr(causal(config), root))
            self.score = nn.Linear(config.scored_width, 1, bias=False)
            self.post_init()

        @classmethod
        def is_custom_code(cls) -> bool:
            return False  # or loading would leave buffers that no file holds as they are in memory

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
        ) -> SequenceClassifierOutput:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            order = left_justified(mask)  # no token sees the padding that then follows it
            states = run_backbone(cast(Any, self), input_ids.gather(1, order), mask.gather(1, order).long())
            last = mask.sum(dim=1) - 1
            return SequenceClassifierOutput(
                logits=self.score(states[torch.arange(len(states), device=last.device), last])
            )

    Scoring.__name__ = Scoring.__qualname__ = (
        causal.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + GENERIC
    )
    return Scoring
