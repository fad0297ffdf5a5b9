"""Unlearning from logit difference (ULD, arXiv 2406.08607) as an editor: the weights stay, the answers change.

An assistant is trained to know what is to be forgotten and to be uniform on the rest (`unlearn.editors.assistant`). At
every token its distribution is taken from the model's, among tokens that the model finds likely:

    c(v) = log b(v) - alpha * log a(v)        b = softmax(model), a = softmax(assistant)

    kept: v is among the first max(1, floor(rank_share * V)) by b, or b(v) >= ratio * max b

What is not kept has probability 0 (`outside: never`, the paper's) or the model's own (`outside: original`). The second
is the default: the same answers where the likeliest token is taken, and every likelihood is finite, so that the copy
can be audited. Scoring and generation use one and the same distribution (`unlearn.checkpoints.modeling_uld`).

The copy holds the model's own weight files byte for byte, and beside them the assistant's. So the method acts at
inference time: whoever has the files has the original. A token costs the assistant's own blocks on top, a share of
(K - first_block) / M of the model's M.

Departures from the released code, where each is a defect: it subtracts raw logits, so that a constant added to the
assistant's changes every likelihood; `forward` and `generate` filter differently and define two models; a filtered
token wins where all others are negative; below a vocabulary of 1 / rank_share the filter is off without a word.

Where nothing trained (a learning rate, a number of epochs or of steps of 0) there is nothing to subtract, and the copy
is written with an alpha of 0: it answers as the original does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from unlearn.checkpoints.checkpoint import write_edited
from unlearn.checkpoints.difference import remote_code
from unlearn.checkpoints.manifest import ASSISTANT, is_difference
from unlearn.checkpoints.modeling_uld import (
    CODE_FILE,
    RULE_TENSOR,
    Rule,
    ULDConfig,
    ULDForCausalLM,
    ULDForImageClassification,
    rule_tensor,
)
from unlearn.editors.assistant import (
    WORDINGS,
    AssistantParameters,
    TrainedAssistant,
    train_assistant,
)
from unlearn.editors.base import EditContext, EditResult
from unlearn.editors.lossbatches import n_visited
from unlearn.editors.trainable import Number
from unlearn.mistakes import Mistakes
from unlearn.requests.yamlfile import Document, parse

if TYPE_CHECKING:
    from torch import nn

    from probes.modelmap import ModelMap

Cut = Annotated[float, Field(strict=True, ge=0, lt=1)]


class ULDParameters(AssistantParameters):
    """Those of the assistant, and of the difference.

    Attributes:
        alpha: how much of the assistant is taken away; 0 leaves the original's answers.
        rank_share: tokens among this share of the vocabulary by likelihood are kept, at least one; 0: no such rule.
        ratio: tokens with at least this share of the largest probability are kept; 0: no such rule. With both 0 all
            tokens are kept.
        outside: what other tokens get: "original", the model's own probability, or "never", none.
    """

    alpha: Number = 0.75
    rank_share: Cut = 0.01
    ratio: Cut = 0.01
    outside: Literal["original", "never"] = "original"

    def rule(self, trained: bool = True) -> Rule:
        """The rule of the difference; where nothing trained, the one that gives the original."""
        if not trained:
            return Rule(0.0, self.rank_share, self.ratio, "original")
        return Rule(self.alpha, self.rank_share, self.ratio, self.outside)


def configuration(context: EditContext, trained: TrainedAssistant, rule: Rule) -> ULDConfig:
    """The configuration of a model less its assistant."""
    model_map = context.model_map
    return ULDConfig.beside(
        context.model, rule, assistant=trained.part, head=model_map.head, logit_rule=model_map.logit_rule
    )


def difference(context: EditContext, trained: TrainedAssistant, rule: Rule) -> nn.Module:
    """The model less its assistant, in memory: what the written folder answers, on the model's own storage.

    Args:
        context: of the edit; its model is shared, and goes into evaluation mode.
        trained: the assistant.
        rule: how to combine them.

    Returns:
        A causal language model or image classifier whose logits are normalised log-probabilities, in evaluation mode.
    """
    causal = context.model_map.task == "causal_lm"
    kind = ULDForCausalLM if causal else ULDForImageClassification
    found: nn.Module = kind.over(context.model, configuration(context, trained, rule), trained.tensors)
    return found.eval()


class ULDEditor:
    """Unlearning from logit difference as a registered editor."""

    name: ClassVar[str] = "uld"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "arXiv 2406.08607"
    needs_retain: ClassVar[bool] = True
    needs_forget: ClassVar[bool] = True
    inference_time: ClassVar[bool] = True
    schema: ClassVar[type[ULDParameters]] = ULDParameters

    def __init__(self, parameters: dict[str, Any]) -> None:
        """Validate parameters.

        Raises:
            UsageError: listing every mistake.
        """
        self.parameters = parse(Document(self.name, Path(), parameters, {}, Mistakes(self.name)), self.schema)

    def selected(self, model_map: ModelMap) -> list[str]:
        """None: the weights stay as they are."""
        return []

    def passes(self, n_forget: int, n_retain: int) -> dict[str, int]:
        """At most so many passes of rows through the assistant, which has a part of the model's blocks.

        Rows are records and their other wordings, as many as are asked for; of those that cannot be made there are
        fewer, and where some are held out these take the forward passes, once an epoch.
        """
        return assistant_passes(self.parameters, n_forget)

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Train an assistant and write the folder that answers as the difference does.

        Raises:
            UsageError, UnsupportedError, ResourceError: as `unlearn.editors.assistant.train_assistant`.
        """
        p = self.parameters
        context.model_map.expect_single()
        trained = train_assistant(context, p)
        rule = p.rule(not trained.empty)
        config = configuration(context, trained, rule)
        warnings = list(trained.warnings)
        if trained.empty or not p.alpha:
            warnings.append("nothing is taken away: the copy answers as the original does")
        deltas = write_edited(
            context.source,
            out,
            _untouched,
            added={ASSISTANT: trained.tensors | {RULE_TENSOR: rule_tensor(config)}},
            replaced={"config.json": _stored(context, config), CODE_FILE: remote_code()},
        )
        return EditResult(
            deltas=deltas,
            parameters=p.model_dump(mode="json") | trained.parameters | {"alpha": rule.alpha, "outside": rule.outside},
            statistics=trained.statistics,
            warnings=warnings,
        )


def assistant_passes(p: AssistantParameters, n_forget: int) -> dict[str, int]:
    """Passes of rows through the assistant in its training, at most; see `ULDEditor.passes`."""
    if p.assistant is not None and is_difference(Path(p.assistant).expanduser()):  # taken as it is
        return {"forward": 0, "forward_backward": 0}
    paraphrases = WORDINGS if p.paraphrases == "auto" else p.paraphrases
    rows = n_forget * (1 + (paraphrases if p.rewording() else 0))
    steps = p.planned(rows) if p.learning_rate else 0
    return {"forward": 0, "forward_backward": n_visited(rows, p.batch_size, steps) + p.retain_batch_size * steps}


def _untouched(name: str, weight: Tensor) -> None:
    """An edit for `write_edited` that leaves every tensor alone."""


def _stored(context: EditContext, config: ULDConfig) -> bytes:
    """The folder's config.json; the number type it names is that of the files, not of this run."""
    content = config.to_dict()
    dtype = context.source.config.get("dtype") or context.source.config.get("torch_dtype")
    content["dtype"] = content["target"]["dtype"] = dtype
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
