"""An edit that was made elsewhere: the weights of another checkpoint, audited as if an editor had made them.

    method: {name: given, overrides: {path: edited-by-another-tool}}

The other checkpoint is compared with the source: kind of model, names, shapes and types of all tensors, vocabulary and
tokenizer, and every setting of the configuration that the model computes with. Where all agree, its tensors are written
over a copy of the source, which keeps the source's configuration, tokenizer and chat template: the weights are the only
thing that differs between the two arms of the audit. Weights of another number type are refused: rounding them is an
edit of its own (quantisation is a known way to bring back what was hidden), so whoever wants it does it first.

Nothing is known about how the edit was made. If its makers chose anything by looking at the control set, the reference
or these criteria, the audit cannot see it.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator
from torch import Tensor

from probes.errors import UnsupportedError, UsageError
from unlearn.checkpoints.checkpoint import Checkpoint, open_checkpoint, write_edited
from unlearn.checkpoints.loading import load_config, tokenizer_digests
from unlearn.checkpoints.tensorfile import TensorInfo
from unlearn.checkpoints.writer import refuse_overlap
from unlearn.editors.base import EditContext, EditResult
from unlearn.mistakes import Mistakes
from unlearn.requests.yamlfile import Document, Schema, parse

if TYPE_CHECKING:
    from probes.modelmap import ModelMap

# Settings that no pass over a record reads: provenance, what is returned, generation, initialisation.
_NEUTRAL = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "name_or_path",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype",
    "transformers_version", "transformers_weights", "use_cache",
}  # fmt: skip
_DROPOUT = ("dropout", "_pdrop", "_drop", "drop_path_rate")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _path(value: object) -> object:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected the folder of the edited checkpoint, found none")
    return value


class GivenParameters(Schema):
    """Hyper-parameters; the names are those of a method preset.

    Attributes:
        path: the edited checkpoint, a folder or `.gguf` file. A relative path starts at the working folder; a request
            makes its own absolute.
    """

    path: Annotated[str, BeforeValidator(_path)]


class GivenEditor:
    """An edit made elsewhere, as a registered editor."""

    name: ClassVar[str] = "given"
    version: ClassVar[str] = "1"
    paper: ClassVar[str] = "none: made elsewhere"
    needs_retain: ClassVar[bool] = False
    needs_forget: ClassVar[bool] = False
    inference_time: ClassVar[bool] = False

    def __init__(self, parameters: dict[str, Any]) -> None:
        """Validate parameters.

        Raises:
            UsageError: listing every mistake.
        """
        self.parameters = parse(Document(self.name, Path(), parameters, {}, Mistakes(self.name)), GivenParameters)

    def selected(self, model_map: ModelMap) -> list[str]:
        """Names of all parameters: any of them may differ."""
        return [name for name, _ in model_map.model.named_parameters()]

    def passes(self, n_forget: int, n_retain: int) -> dict[str, int]:
        """None: no record is read."""
        return {"forward": 0, "forward_backward": 0}

    def identify(self, source: Checkpoint) -> str:
        """The other checkpoint's tensor digest, once it is known to fit the source.

        Raises:
            UsageError: there is no checkpoint, or it does not fit the source: every mismatch at once.
            UnsupportedError: it is an adapter, quantised, or of a kind that cannot be audited.
        """
        other = self._open(source)
        check_match(source, other, self.parameters.path)
        return other.tensor_digest()

    def edit(self, context: EditContext, out: Path) -> EditResult:
        """Compare the other checkpoint with the source and write its weights as the edited copy.

        Raises:
            UsageError: there is no checkpoint, or it does not fit the source: every mismatch at once.
            UnsupportedError: it is an adapter, quantised, or of a kind that cannot be audited.
            IntegrityError: a weight is NaN or infinite, or the output and the other checkpoint overlap.
        """
        source, other = context.source, self._open(context.source)
        check_match(source, other, self.parameters.path)
        if other.path is not None:
            refuse_overlap(out, other.path)

        def replace(name: str, weight: Tensor) -> Tensor | None:
            theirs = other.load_tensor(name)
            kind = _BITS[weight.element_size()]
            return None if torch.equal(theirs.view(kind), weight.view(kind)) else theirs

        deltas = write_edited(source, out, replace)
        return EditResult(
            deltas=deltas,
            parameters={"path": other.name},
            statistics={"tensors": len(source.tensor_names()), "changed_tensors": len(deltas)},
            warnings=_warnings(source, other, changed=bool(deltas)),
        )

    def _open(self, source: Checkpoint) -> Checkpoint:
        path = Path(self.parameters.path).expanduser()
        if not path.exists():
            raise UsageError(
                f"{self.parameters.path}: expected the folder of an edited checkpoint, found nothing there; a relative "
                "path starts at the working folder"
            )
        # Reopened as a copy of its source is, which settles whether code of the checkpoint may run.
        return open_checkpoint(path) if source.kind == "live" else source.reopen(path)


def check_match(source: Checkpoint, other: Checkpoint, where: str) -> None:
    """Refuse a checkpoint that is not the source with other weights.

    Args:
        source: the checkpoint before the edit.
        other: after it.
        where: how messages call it.

    Raises:
        UsageError: every mismatch at once.
    """
    mistakes = Mistakes(where)

    def differ(what: str) -> None:
        mistakes.add(where, 0, what)

    if other.task != source.task:
        differ(f"expected a {source.task} checkpoint as the source is, found {other.task}")
    _compare_tensors(_infos(source), _infos(other), differ)
    if names := _differing_settings(source, other):
        differ(
            f"expected the source's configuration, found {len(names)} settings that differ: {', '.join(names[:8])}"
            + (", ..." if len(names) > 8 else "")
        )
    if source.task == other.task == "causal_lm" and not _same_tokenizer(source, other):
        differ("expected the source's tokenizer or none, found another; its tokens would mean other text")
    mistakes.raise_any()


def _infos(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    return {info.name: info for shard in checkpoint.weight_shards() for info in shard.tensors}


def _compare_tensors(mine: dict[str, TensorInfo], theirs: dict[str, TensorInfo], differ: Any) -> None:
    """Report missing and unknown tensors, other shapes and other types, one line each."""
    if missing := [name for name in mine if name not in theirs]:
        differ(f"expected the source's {len(mine)} tensors, found {len(missing)} missing, {missing[0]} first")
    if extra := [name for name in theirs if name not in mine]:
        differ(
            f"expected the source's tensors alone, found {len(extra)} that it lacks, {extra[0]} first; save it as the "
            "source is saved (adapters merged, tied weights once)"
        )
    shared = [name for name in mine if name in theirs]
    if other := [name for name in shared if mine[name].shape != theirs[name].shape]:
        first = other[0]
        differ(
            f"expected the source's shapes, found {len(other)} that differ: {first} is {list(theirs[first].shape)} for "
            f"{list(mine[first].shape)}"
        )
    if other := [name for name in shared if mine[name].dtype != theirs[name].dtype]:
        pairs = Counter(f"{theirs[name].dtype} for {mine[name].dtype}" for name in other)
        differ(
            f"expected the source's number types, found {len(other)} tensors that differ "
            f"({', '.join(sorted(pairs))}), {other[0]} first; convert the source to the same type and give that as the "
            "checkpoint, or save the edited one in the source's"
        )


def _differing_settings(source: Checkpoint, other: Checkpoint) -> list[str]:
    """Names of the settings that the models compute with and that differ.

    As written they may differ in form alone (another version of transformers), so where they do the configurations are
    read the way the models' are and compared again.
    """
    differing = _differing(source.config, other.config)
    if differing:
        with suppress(UnsupportedError):  # the checkpoint's own code defines its configuration
            differing = _differing(_resolved(source), _resolved(other))
    return differing


def _resolved(checkpoint: Checkpoint) -> dict[str, Any]:
    folder = checkpoint.path
    if folder is None or not folder.is_dir():
        return checkpoint.config
    content: dict[str, Any] = load_config(folder).to_dict()
    return content


def _differing(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    absent = object()
    return sorted(
        key
        for key in {*mine, *theirs}
        if key not in _NEUTRAL
        and not key.endswith(_DROPOUT)
        and _plain(mine.get(key, absent)) != _plain(theirs.get(key, absent))
    )


def _plain(value: Any) -> Any:
    """A setting with the keys of its mappings as text, as a file has them."""
    return {str(key): _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _same_tokenizer(source: Checkpoint, other: Checkpoint) -> bool:
    """Whether both turn text into the same tokens; a checkpoint without a tokenizer of its own takes the source's."""
    mine, theirs = source.tokenizer_digest(), other.tokenizer_digest()
    if theirs is None or mine == theirs:
        return True
    if mine is None:
        return False
    return tokenizer_digests(source.load_tokenizer())[0] == tokenizer_digests(other.load_tokenizer())[0]


def _warnings(source: Checkpoint, other: Checkpoint, *, changed: bool) -> list[str]:
    found = []
    if not changed:
        found.append("the given checkpoint is the source: no weight differs, and the copy is the original")
    template = other.chat_template_digest()
    if template is not None and template != source.chat_template_digest():
        found.append("the given checkpoint has another chat template; the copy keeps the source's")
    return found
