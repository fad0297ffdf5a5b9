"""What the toolkit asks of transformers: is this model one we can measure, load it, load its tokenizer.

Always from local files, never with code from the checkpoint unless asked for, with the number type and the attention
implementation spelled out. Whatever transformers raises leaves here as one line.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from probes.errors import ResourceError, UnlearnError, UnsupportedError, UsageError
from unlearn.checkpoints.diskmap import is_difference
from unlearn.checkpoints.manifest import DIFFERENCE, template_digest, text_digest

Task = Literal["causal_lm", "image_classification"]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_DIFFERENCES: dict[str, Task] = {
    "ULDForCausalLM": "causal_lm",
    "ULDForImageClassification": "image_classification",
}
_QUANTISED = ("qweight", "qzeros", "SCB", "absmax", "quant_map", "weight_scale", "weight_scale_inv", "g_idx")


def task_of(config: Mapping[str, Any], where: str, *, trust_remote_code: bool = False) -> Task:
    """What a model is for, from its config.

    Args:
        config: content of `config.json`.
        where: the checkpoint's name, for messages.
        trust_remote_code: accept architectures that transformers does not know.

    Raises:
        UsageError: the config names no model, or one that brings its own code.
        UnsupportedError: neither a decoder language model nor an image classifier, or a quantised one.
    """
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind, named = config.get("model_type"), config.get("architectures") or []
    if not isinstance(kind, str) or not isinstance(named, list):
        raise UsageError(f"{where}: expected model_type in config.json, found none; save the model with transformers")
    if kind == DIFFERENCE:
        return _task_of_difference(config, where, trust_remote_code=trust_remote_code)
    if kind not in CONFIG_MAPPING_NAMES and not trust_remote_code:
        raise UsageError(
            f"{where}: expected an architecture that transformers has, found {kind}; update transformers, "
            "or pass --trust-remote-code to run the checkpoint's own code"
        )
    causal, images = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    architecture = str(named[0]) if named else causal.get(kind) or images.get(kind) or kind
    if isinstance(config.get("quantization_config"), dict):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise _quantised(where, str(method))
    if "ForImageClassification" in architecture:
        return "image_classification"
    if config.get("is_encoder_decoder") or kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        found = "a sequence-to-sequence model"
    elif kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder"):
        found = "an encoder"
    elif architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    else:
        found = "another kind of model"
    raise UnsupportedError(
        f"{where}: expected a causal language model or an image classifier, found {found} ({architecture}); "
        "use a decoder checkpoint with its language-modelling head"
    )


def _task_of_difference(config: Mapping[str, Any], where: str, *, trust_remote_code: bool) -> Task:
    """What a difference of two models is for: its architecture says it, and its target has to be of that task."""
    target, named = config.get("target"), config.get("architectures")
    if not isinstance(target, dict):
        raise UsageError(f"{where}: expected the target's config in config.json, found none; write the folder again")
    task = _DIFFERENCES.get(str(named[0])) if isinstance(named, list) and named else None
    if task is None:
        raise UnsupportedError(f"{where}: expected {' or '.join(_DIFFERENCES)}, found another kind of difference")
    if task_of(target, f"{where} (target)", trust_remote_code=trust_remote_code) != task:
        raise UnsupportedError(f"{where}: expected a target for {task}, as the architecture says, found another kind")
    return task


def refuse_quantised(tensors: Mapping[str, str], where: str) -> None:
    """Refuse packed weights that the config does not own up to.

    Args:
        tensors: name to safetensors type.
        where: the checkpoint's name.

    Raises:
        UnsupportedError: there is a tensor that only quantised layers have.
    """
    for name, dtype in tensors.items():
        if dtype.startswith("F8") or name.rpartition(".")[2] in _QUANTISED:
            raise _quantised(where, name)


def known_dtype(name: str) -> torch.dtype:
    """A torch type by its name.

    Raises:
        UsageError: not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise UsageError(f"expected a dtype among {', '.join(DTYPES)}, found {name}; choose one of them")
    return DTYPES[name]


def known_device(name: str) -> torch.device:
    """A torch device by its name.

    Raises:
        ResourceError: this machine does not have it.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ResourceError(f"expected a device of this machine, found {name}; choose cpu or another one") from None


def load_config(folder: Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The config object of a checkpoint folder (or of a GGUF file in it, with `gguf_file`).

    An attention implementation that the file asks for is dropped: it may need a package or a device that is not here.
    """
    from transformers import AutoConfig

    options |= {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with transformers_errors(str(folder)):
        config = AutoConfig.from_pretrained(folder, **options)
        config._attn_implementation = None
        return config


def skeleton(task: Task, config: Any, where: str, *, trust_remote_code: bool = False) -> nn.Module:
    """The model without memory for its weights: its parameters, ties and default attention can be asked."""
    with transformers_errors(where), torch.device("meta"):
        return cast(nn.Module, _auto(task).from_config(config, trust_remote_code=trust_remote_code))


def attention_of(model: nn.Module) -> str:
    """The attention implementation a model is set to; "eager" where it has no choice."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) or "eager"


def load_pretrained(task: Task, folder: Path, *, dtype: str, device: str, attention: str, **options: Any) -> nn.Module:
    """Load a model for measuring: explicit types, evaluation mode, every weight from the file.

    Args:
        task: which auto class.
        folder: local checkpoint folder.
        dtype: a key of `DTYPES`.
        device: where the model goes.
        attention: "sdpa" or "eager".
        options: further arguments of `from_pretrained`.

    Raises:
        UsageError: an unknown dtype, or weights that the model needs are not in the checkpoint.
        UnsupportedError: transformers cannot load it.
        ResourceError: it does not fit in memory, or the device does not exist.
    """
    wanted, place = known_dtype(dtype), known_device(device)
    with transformers_errors(str(folder)):
        model, info = _auto(task).from_pretrained(
            folder,
            dtype=wanted,
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise UsageError(
                f"{folder}: expected every weight of the model, found {len(missing)} missing, {missing[0]} first; "
                "they would be random, so use a complete checkpoint"
            )
        return cast(nn.Module, model.to(place).eval())


def is_as(model: nn.Module, dtype: str, device: str) -> bool:
    """Whether a live model already has this dtype and device throughout; an assistant keeps a dtype of its own."""
    wanted, place = known_dtype(dtype), known_device(device)
    state = list((cast(Any, model).target if is_difference(model) else model).state_dict().values())
    return all(t.device == place and (not t.is_floating_point() or t.dtype == wanted) for t in state)


def converted(model: nn.Module, dtype: str, device: str) -> nn.Module:
    """A copy of a live model in evaluation mode; tables that are computed, not stored, keep their precision.

    Raises:
        UsageError: an unknown dtype.
        ResourceError: it does not fit in memory, or the device does not exist.
    """
    wanted, place = known_dtype(dtype), known_device(device)
    with transformers_errors(type(model).__name__):
        if is_difference(model):
            whole = cast(Any, model)
            target = converted(whole.target, dtype, device)
            return cast(nn.Module, type(whole).over(target, whole.config, whole.assistant_tensors()).eval())
        model = copy.deepcopy(model)
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(wanted)
        return model.to(place).eval()


def save_beside(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    """Write config, generation config and tokenizer of a live model into a folder that gets its weights."""
    config: Any = getattr(model, "config", None)
    with transformers_errors(type(model).__name__):
        if hasattr(config, "save_pretrained"):
            config = copy.deepcopy(config)
            config.architectures = [type(model).__name__]
            config.dtype = next(model.parameters()).dtype
            config.save_pretrained(folder)
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def tokenizer_digests(tokenizer: Any) -> tuple[str | None, str | None]:
    """Digests of a live tokenizer (its serialised form, padding and truncation aside) and of its chat template."""
    if tokenizer is None:
        return None, None
    fast = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = json.loads(fast.to_str()) if fast is not None else {"vocab": tokenizer.get_vocab()}
    for setting in ("padding", "truncation"):  # change with every call, define nothing
        content.pop(setting, None)
    template = getattr(tokenizer, "chat_template", None)
    return text_digest(json.dumps(content, sort_keys=True)), template_digest(template)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer of a checkpoint folder (or of a GGUF file in it, with `gguf_file`)."""
    from transformers import AutoTokenizer

    with transformers_errors(f"{folder}: tokenizer"):
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )


def check_tokenizer(tokenizer: Any, config: Any, where: str) -> None:
    """Refuse a tokenizer that turns text into ids the model has no embedding for.

    Special tokens do not count: a padding token added without an embedding is common and never reaches the model.

    Raises:
        UsageError: it belongs to another model.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    highest = max((index for index in tokenizer.get_vocab().values() if index not in special), default=-1)
    if rows is not None and highest >= rows:
        raise UsageError(
            f"{where}: expected a tokenizer with ids below {rows}, the model's vocabulary, found id {highest}; "
            "use the tokenizer that was saved with this model"
        )


@contextmanager
def transformers_errors(where: str) -> Iterator[None]:
    """Silence transformers' progress bars and warnings, and turn what it raises into one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except UnlearnError:
        raise
    except MemoryError:
        raise _no_memory(where) from None
    except Exception as error:  # third-party code on files from anywhere: any exception type can come out
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason:
            raise _no_memory(where) from None
        if isinstance(error, ImportError):
            raise ResourceError(f"{where}: a package is missing ({reason}); install it") from None
        raise UnsupportedError(f"{where}: transformers cannot load it ({type(error).__name__}: {reason})") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _auto(task: Task) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    return AutoModelForCausalLM if task == "causal_lm" else AutoModelForImageClassification


def _quantised(where: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: expected floating-point weights, found quantised ones ({found}); dequantise the model first"
    )


def _no_memory(where: str) -> ResourceError:
    return ResourceError(f"{where}: expected enough memory for the model, ran out; try --dtype bfloat16")
