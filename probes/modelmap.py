"""The model map: where everything is in a causal language model or an image classifier.

Given a live model it names the blocks in depth order, the attention and feed-forward projections of each with their
orientation, the embeddings, norms, output head and tied weights. The rest of the toolkit asks the map and knows no
module name itself.

Structure first, names last:

- *Blocks* are the children of module containers. Containers whose paths differ only in numbers form one chain
  (`encoder.layers.0.blocks`, `encoder.layers.1.blocks`; or `layer1`, `layer2`, `layer3`), so staged models flatten in
  depth order. The chain with as many members as the configuration counts layers is the one; failing that, the chain
  that holds most parameters, followed inwards through stages as long as the inner one holds most of the outer.
- *Orientation* is the module's type (`Linear` and convolutions keep `[out, in]`, GPT-2's `Conv1D` keeps `[in, out]`)
  and, for experts stacked in one three-dimensional parameter, its shape.
- *Roles* (q, k, v, o, gate, up, down, router, ...) come from the few names in use, read within a block only.
- A causal language model is *run* on four tokens: the order of its blocks, its final norm, its causality and
  `logits(backbone(x)) == model(x).logits` are observed, not assumed. The run leaves weights, training modes and
  random state as they were.

A *composite* computes its distribution from two models, one of them inside it at `target` (an inference-time method's
model). It has `states_model()`, which gives the final states of both side by side, and `states_logits(states)`; the
map's `backbone` and `logits` are these two, so whatever goes through them measures the composite. Blocks, head and
roles are those of the model at `target`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from probes.errors import UnsupportedError

Task = Literal["causal_lm", "image_classification"]
Orientation = Literal["out_in", "in_out"]


@dataclass(frozen=True, slots=True)
class Projection:
    """One weight that multiplies activations: y = x W^T (`out_in`) or y = x W (`in_out`).

    Attributes:
        module: path of the module that owns the weight.
        parameter: the weight's name as in `named_parameters()`, so a tied head carries the embedding's.
        role: q, k, v, qkv, o, gate, up, gate_up, down, router, conv, patch, head, or the module's own name.
        in_features: input width; of a convolution the unfolded one, channels / groups x kernel area.
        out_features: output width; of stacked experts, that of one expert.
        orientation: `out_in` for a weight [out, in], `in_out` for [in, out]; of stacked experts, of each W[e].
        experts: how many experts the parameter stacks in its first dimension, or None.
        bias: name of the bias added to y, or None.
        hookable: whether the module computes exactly this projection, so that forward hooks on it see x and y.
    """

    module: str
    parameter: str
    role: str
    in_features: int
    out_features: int
    orientation: Orientation
    experts: int | None = None
    bias: str | None = None
    hookable: bool = True


@dataclass(frozen=True, slots=True)
class Block:
    """One residual block. The convolutions of a CNN block are listed under `feed_forward`."""

    index: int
    name: str
    attention: tuple[Projection, ...]
    feed_forward: tuple[Projection, ...]


@dataclass(frozen=True, slots=True)
class _LogitRule:
    """What a model does to the head's output: z * scale or z / scale, then cap * tanh(z / cap)."""

    scale: float = 1.0
    divide: bool = False
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        # The same operations in the same order as the models, so that the result is theirs to the last bit.
        if self.scale != 1.0:
            logits = logits / self.scale if self.divide else logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


@dataclass(frozen=True, eq=False)
class ModelMap:
    """Names of the parts of one model; made by `ModelMap.of(model)`.

    Attributes:
        model: the mapped model itself; the map copies no weight, so edits to the model are seen at once.
        task: "causal_lm" or "image_classification".
        blocks: the residual blocks in depth order.
        outside: projections outside the blocks other than head and patch projection (Swin's patch merging, poolers).
        embeddings: token tables; of an image model the patch projection or stem, and class and mask tokens.
        position_embeddings: learned position tables, relative position biases included.
        norms: gains and biases of every normalisation layer, BatchNorm included.
        head: path of the output projection.
        final_norm: path of the norm after the last block, or None.
        tied: parameter name -> the name under which `named_parameters()` lists the same tensor.
        vocab_size: width of the output: the vocabulary, padding rows included, or the number of labels.
        roles: for every name in `named_parameters()` the role of its projection, or "head", "embedding" (a table or
            token), "patch", "position", "norm", "scale" (a gain per channel), "bias" or "other".
        composite: whether the distribution comes from two models: blocks, head and roles are then those of the model
            at `target` (what the other one owns is "other"), and neither its weights nor its logits are the whole.
    """

    model: nn.Module = field(repr=False)
    task: Task
    blocks: tuple[Block, ...] = field(repr=False)
    outside: tuple[Projection, ...]
    embeddings: tuple[str, ...]
    position_embeddings: tuple[str, ...] = field(repr=False)
    norms: tuple[str, ...] = field(repr=False)
    head: str
    final_norm: str | None
    tied: dict[str, str]
    vocab_size: int
    roles: dict[str, str] = field(repr=False)
    _linear: tuple[Projection, ...] = field(repr=False)
    _rule: _LogitRule = field(repr=False)
    composite: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> ModelMap:
        """Map a model.

        Args:
            model: a Hugging Face causal language model or image classifier, or any plain `nn.Module` classifier.

        Returns:
            The map; it refers to `model` and changes nothing in it.

        Raises:
            UnsupportedError: an encoder-only, sequence-to-sequence, multimodal, headless, quantised or adapter-wrapped
                model, or a language model whose logits the map cannot reproduce.
        """
        if _is_composite(model):
            return _around(cls.of(model.get_submodule(_INSIDE)), model)
        task = _task(model)
        head = _find_head(model, task)
        chain = _find_chain(model, head)
        roles, placed = _classify(model, task, head, chain)
        if task == "causal_lm":
            run = _observe(model, chain)
            chain = [chain[i] for i in run.order]
            final_norm, rule = run.final_norm, _logit_rule(model, head, run)
        else:
            final_norm, rule = _norm_after(model, chain), _LogitRule()

        def named(*wanted: str) -> tuple[str, ...]:
            return tuple(name for name, role in roles.items() if role in wanted)

        return cls(
            model=model,
            task=task,
            blocks=tuple(_block(i, path, [p for owner, p in placed if owner == path]) for i, path in enumerate(chain)),
            outside=tuple(p for owner, p in placed if owner is None and p.role not in {"head", "patch"}),
            embeddings=named("embedding", "patch"),
            position_embeddings=named("position"),
            norms=named("norm"),
            head=head,
            final_norm=final_norm,
            tied=_tied(model),
            vocab_size=next(p.out_features for _, p in placed if p.role == "head"),
            roles=roles,
            _linear=tuple(p for _, p in placed if p.hookable),
            _rule=rule,
        )

    def projections(self) -> Iterator[Projection]:
        """Every projection but the head and the patch projection: block by block, then those outside the blocks."""
        for block in self.blocks:
            yield from block.attention
            yield from block.feed_forward
        yield from self.outside

    def linear_modules(self) -> tuple[Projection, ...]:
        """Every module that is one linear map (Linear, Conv1D, convolution), head and patch projection included.

        Forward hooks on these modules see the projection's own input and output. Stacked experts and routers that
        keep a bare parameter are not among them; `projections()` lists those with `hookable=False`. Where a model
        hands a module's weight to a fused kernel (Mamba's convolution and `dt_proj`), hooks on it never fire.
        """
        return self._linear

    def block_of(self, parameter_name: str) -> int | None:
        """Index of the block that owns the parameter, buffer or module of this name; None outside the blocks."""
        index = {block.name: block.index for block in self.blocks}
        path = parameter_name
        while path and path not in index:
            path = path.rpartition(".")[0]
        return index.get(path)

    def role_of(self, parameter_name: str) -> str | None:
        """Role of a parameter (see `roles`), tied names included; None for a name the model does not have."""
        return self.roles.get(self.tied.get(parameter_name, parameter_name))

    def default_exclude(self) -> tuple[str, ...]:
        """Names of the parameters that no edit touches unless asked to.

        Norm gains and biases, gains per channel, position tables, token embeddings (a head tied to them included),
        class and mask tokens. The patch projection of an image model is a projection like any other and not excluded.
        """
        return tuple(name for name, role in self.roles.items() if role in {"norm", "scale", "position", "embedding"})

    def backbone(self, model: nn.Module | None = None) -> nn.Module:
        """The language model without its head; `.last_hidden_state` [B, T, d] of its output follows the final norm.

        Of a composite they are the final states of both models, side by side.

        Args:
            model: another instance of the same architecture; the mapped model by default.
        """
        self._expect_language_model()
        model = self.model if model is None else model
        return cast(Any, model).states_model() if self.composite else _backbone(model)

    def logits(self, hidden: Tensor, model: nn.Module | None = None) -> Tensor:
        """Logits of final hidden states, with the model's own scaling and soft-capping.

        Args:
            hidden: any [..., d] slice of the backbone's `last_hidden_state`.
            model: another instance of the same architecture; the mapped model by default.

        Returns:
            [..., vocabulary], equal to `model(...).logits` at the same positions.
        """
        self._expect_language_model()
        model = self.model if model is None else model
        if self.composite:
            return cast(Tensor, cast(Any, model).states_logits(hidden))
        return self._rule(_apply_head(model, self.head, hidden))

    def expect_single(self) -> None:
        """Refuse a composite, for what looks into the weights, gradients or blocks of one model.

        Raises:
            UnsupportedError: the distribution comes from two models, and parts of one would pass for the whole.
        """
        if self.composite:
            raise UnsupportedError(
                f"expected one model with weights of its own, found {type(self.model).__name__}, whose answers come "
                "from two; look into the model it was made from"
            )

    @property
    def logit_rule(self) -> dict[str, float | bool | None]:
        """What the model does to its head's output z: z * scale, or z / scale if `divide`; then cap * tanh(z / cap).

        Of a composite it is what the model at `target` does; its `states_logits` has seen to it.
        """
        return {"scale": self._rule.scale, "divide": self._rule.divide, "cap": self._rule.cap}

    def _expect_language_model(self) -> None:
        if self.task != "causal_lm":
            raise UnsupportedError("expected a causal language model, found an image classifier; call the model itself")


# ---------------------------------------------------------------------------------------------------- composites

_INSIDE = "target"  # path of the model inside a composite


def _is_composite(model: nn.Module) -> bool:
    return all(callable(getattr(model, name, None)) for name in ("states_model", "states_logits"))


def _around(inside: ModelMap, model: nn.Module) -> ModelMap:
    """The map of a composite, from that of the model inside it."""

    def path(name: str) -> str:
        return f"{_INSIDE}.{name}"

    def paths(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(path, names))

    def moved(projections: tuple[Projection, ...]) -> tuple[Projection, ...]:
        return tuple(
            replace(
                p, module=path(p.module), parameter=path(p.parameter), bias=None if p.bias is None else path(p.bias)
            )
            for p in projections
        )

    if inside.task == "causal_lm":
        _check_composite(model)
    roles = {path(name): role for name, role in inside.roles.items()}
    return replace(
        inside,
        model=model,
        composite=True,
        blocks=tuple(
            Block(block.index, path(block.name), moved(block.attention), moved(block.feed_forward))
            for block in inside.blocks
        ),
        outside=moved(inside.outside),
        embeddings=paths(inside.embeddings),
        position_embeddings=paths(inside.position_embeddings),
        norms=paths(inside.norms),
        head=path(inside.head),
        final_norm=None if inside.final_norm is None else path(inside.final_norm),
        tied=_tied(model),
        roles={name: roles.get(name, "other") for name, _ in model.named_parameters()},
        _linear=moved(inside._linear),
    )


def _check_composite(model: Any) -> None:
    """Refuse a composite whose logits are not those of its own states."""
    kind, device = type(model).__name__, next(model.parameters()).device
    ids = torch.tensor([[0, 1, 2, 3]], device="cpu" if device.type == "meta" else device)  # [1, T]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with _undisturbed(model, ids.device):
        states = model.states_model()(**inputs).last_hidden_state  # [1, T, d + d_a]
        logits, own = model.states_logits(states), model(**inputs).logits
    if not _same(own, logits):
        raise UnsupportedError(f"expected logits that are those of the final states, found others in {kind}")


# ------------------------------------------------------------------------------------------ what kind of model


def _task(model: nn.Module) -> Task:
    """Tell language models from classifiers, and refuse the rest in one clear line."""
    kind = type(model).__name__
    wanted = "expected a decoder-only causal language model or an image classifier"
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise UnsupportedError(f"{wanted}, found {kind} with peft adapters; call merge_and_unload() on it first")
    parameters = list(model.parameters())
    if not all(parameter.dtype.is_floating_point for parameter in parameters):
        raise UnsupportedError(f"{wanted} in floating point, found quantised weights in {kind}; load it dequantised")
    if parameters and all(p.is_meta for p in parameters) and not hasattr(model, "hf_device_map"):
        raise UnsupportedError(f"{wanted} with weights, found {kind} without any (meta device); load the checkpoint")
    if not isinstance(model, PreTrainedModel):
        if any(isinstance(m, PreTrainedModel) and m.main_input_name != "pixel_values" for m in model.modules()):
            raise UnsupportedError(f"{wanted}, found one wrapped in {kind}; pass the model inside")
        return "image_classification"
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        if kind.endswith("ForImageClassification"):
            return "image_classification"
        raise UnsupportedError(f"{wanted}, found {kind}; load it with AutoModelForImageClassification")
    if config.is_encoder_decoder:
        raise UnsupportedError(f"{wanted}, found {kind}, a sequence-to-sequence model; these are not supported")
    if model.main_input_name != "input_ids" or any(hasattr(config, f"{x}_config") for x in ("vision", "audio")):
        raise UnsupportedError(f"{wanted}, found {kind}, which reads more than tokens; these are not supported")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UnsupportedError(f"{wanted}, found {kind}, an encoder-only model; these are not supported")
    if model.get_output_embeddings() is None or _backbone(model) is model:
        raise UnsupportedError(f"{wanted}, found {kind} without output head; load it with AutoModelForCausalLM")
    return "causal_lm"


def _text_config(model: nn.Module) -> Any:
    """Configuration of a Hugging Face model; None for a plain module."""
    return model.config.get_text_config() if isinstance(model, PreTrainedModel) else None


def _backbone(model: nn.Module) -> nn.Module:
    """The model under the head; `model` itself where there is none."""
    base = cast(nn.Module, model.base_model)
    if base is not model:
        return base
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


# ------------------------------------------------------------------------------------------------ head and blocks


def _linear_shape(module: nn.Module) -> tuple[int, int, Orientation] | None:
    """(in, out, orientation) of a module that is one linear map, else None."""
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if isinstance(module, nn.Linear):
        return weight.shape[1], weight.shape[0], "out_in"
    if isinstance(module, Conv1D):
        return weight.shape[0], weight.shape[1], "in_out"
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return weight[0].numel(), weight.shape[0], "out_in"
    return None


def _find_head(model: nn.Module, task: Task) -> str:
    """Path of the output projection: what the model declares, or the last fitting linear module."""
    linear = {name: (module, shape[1]) for name, module in model.named_modules() if (shape := _linear_shape(module))}
    if task == "causal_lm":
        declared = cast(Any, model).get_output_embeddings()
        fitting: list[str] = [name for name, (module, _) in linear.items() if module is declared]
    else:
        config = _text_config(model)
        fitting = [name for name, (_, width) in linear.items() if config is None or width == config.num_labels]
        fitting = [name for name in fitting if isinstance(linear[name][0], nn.Linear)] or fitting
    if not fitting:
        raise UnsupportedError(f"expected a linear output layer, found none in {type(model).__name__}")
    return fitting[-1]


def _find_chain(model: nn.Module, head: str) -> list[str]:
    """Paths of the blocks in the order they are registered."""
    modules = dict(model.named_modules())
    chains: dict[str, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            chain = chains.setdefault(re.sub(r"\d+", "*", name), [])
            for child, element in module.named_children():
                path = f"{name}.{child}".lstrip(".")
                if next(element.parameters(), None) is not None and not f"{head}.".startswith(f"{path}."):
                    chain.append(path)

    def size(chain: list[str]) -> int:
        return sum(p.numel() for path in chain for p in modules[path].parameters())

    def within(inner: list[str], outer: list[str]) -> bool:
        return all(any(path.startswith(f"{block}.") for block in outer) for path in inner)

    config = _text_config(model)
    depths = getattr(config, "depths", None)
    depth = sum(depths) if depths else getattr(config, "num_hidden_layers", None)
    if matching := [chain for chain in chains.values() if chain and len(chain) == depth]:
        return max(matching, key=size)

    # A residual block holds several matrices; a container of single layers (a shortcut, a conv-norm pair) is no chain.
    compound = [
        [path for path in chain if sum(p.ndim > 1 for p in modules[path].parameters()) > 1]
        for key, chain in chains.items()
        if "expert" not in key
    ]
    compound = [chain for chain in compound if chain]
    if compound:
        chain = max(compound, key=size)
        while inner := [c for c in compound if within(c, chain) and 2 * size(c) > size(chain)]:
            chain = max(inner, key=size)
        return chain
    single = [name for name, module in modules.items() if _linear_shape(module) and name != head]
    if not single:
        raise UnsupportedError(f"expected layers before the output layer, found none in {type(model).__name__}")
    return single


def _norm_after(model: nn.Module, chain: list[str]) -> str | None:
    """The last normalisation layer registered after the last block."""
    names = [name for name, _ in model.named_modules()]
    after = names[names.index(chain[-1]) + 1 :]
    norms = [n for n in after if not n.startswith(f"{chain[-1]}.") and _is_norm(model.get_submodule(n))]
    return norms[-1] if norms else None


# ------------------------------------------------------------------------------------------------ parameter roles

_ROLES = {
    alias: role
    for role, aliases in {
        "q": "q_proj query wq Wq to_q q_lin projection_query",
        "k": "k_proj key wk Wk to_k k_lin projection_key",
        "v": "v_proj value wv Wv to_v v_lin projection_value",
        "qkv": "qkv_proj qkv query_key_value c_attn Wqkv in_proj_weight",
        "q_a": "q_a_proj",
        "q_b": "q_b_proj",
        "kv_a": "kv_a_proj_with_mqa kv_a_proj",
        "kv_b": "kv_b_proj",
        "o": "o_proj wo attn_out",
        "gate": "gate_proj",
        "up": "up_proj fc1 c_fc fc_in dense_h_to_4h w3 wi lin1 linear1 dense1 pwconv1",
        "gate_up": "gate_up_proj input_linear weights_in",
        "down": "down_proj fc2 fc_out dense_4h_to_h w2 lin2 linear2 dense2 pwconv2 output_linear weights_out",
        "router": "router shared_expert_gate wg",
    }.items()
    for alias in aliases.split()
}
_OUTPUTS = {"out_proj", "c_proj", "dense", "proj", "output", "Wo"}  # attention or feed-forward: the path tells
_ATTENTION_ROLES = {"q", "k", "v", "qkv", "q_a", "q_b", "kv_a", "kv_b", "o"}
_FEED_FORWARD_ROLES = {"gate", "up", "gate_up", "down", "router"}
_ATTENTION_PATH = re.compile(r"attn|attention")
_FEED_FORWARD_PATH = re.compile(r"mlp|ffn|feed_forward|expert|moe")
_MIXER_PATH = re.compile(r"mixer|mamba|ssm|recurrent|temporal")  # what stands in for attention in hybrid models
_POSITION = re.compile(r"(^|[._])(wpe|pos|positions?|positional|relative)([._]|$)")


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and bool(own) and all(p.ndim <= 1 for p in own)


def _attends(path: str, role: str | None) -> bool:
    """Whether a projection mixes positions (attention and what stands in for it): by its path, else by its role."""
    if _ATTENTION_PATH.search(path) or _FEED_FORWARD_PATH.search(path):
        return _ATTENTION_PATH.search(path) is not None
    if role in _ATTENTION_ROLES | _FEED_FORWARD_ROLES:
        return role in _ATTENTION_ROLES
    return _MIXER_PATH.search(path) is not None


def _projection_role(path: str, module: nn.Module, siblings: set[str]) -> str:
    """Role of the projection at `path`, relative to its block; `siblings` are the other children of its parent."""
    parent, _, leaf = path.rpartition(".")
    if leaf in _ROLES:
        return _ROLES[leaf]
    if isinstance(module, _ConvNd):
        return "conv"
    if parent.endswith("router"):
        return "router"
    if leaf == "w1":
        return "gate" if "w3" in siblings else "up"
    if leaf == "gate":
        return "router" if "experts" in siblings else "gate"
    if leaf in _OUTPUTS:
        if _attends(parent, None):
            return "o"
        return "up" if "intermediate" in parent else "down"
    return "linear" if leaf.isdecimal() else leaf


def _plain_role(path: str, module: nn.Module, local: str, parameter: nn.Parameter) -> str:
    """Role of a parameter that is not the weight of a projection."""
    name = f"{path}.{local}"
    if _POSITION.search(name):
        return "position"
    if _is_norm(module):
        return "norm"
    if isinstance(module, nn.Embedding) or re.search("token|class_emb", local):
        return "embedding"
    if local.endswith("bias"):
        return "bias"
    if parameter.numel() == max(parameter.shape, default=1) and re.search("scale|lambda|gamma", name):
        return "scale"
    return "other"


def _weight_shape(
    path: str, module: nn.Module, local: str, role: str, width: int
) -> tuple[int, int, Orientation, int | None] | None:
    """(in, out, orientation, experts) of a weight, bare parameters included; None if it multiplies no activations."""
    parameter = cast(Tensor, module._parameters[local])
    if local == "weight" and (shape := _linear_shape(module)):
        return *shape, None
    if parameter.ndim == 3 and "expert" in f"{path}.{type(module).__name__}".lower():
        orientation = _expert_orientation(parameter, role, module, width)
        experts, a, b = parameter.shape
        return (b, a, orientation, experts) if orientation == "out_in" else (a, b, orientation, experts)
    if parameter.ndim == 2 and (role == "router" or local == "in_proj_weight"):  # used through F.linear
        return parameter.shape[1], parameter.shape[0], "out_in", None
    return None


def _expert_orientation(parameter: Tensor, role: str, module: nn.Module, width: int) -> Orientation:
    """Orientation of the slices [a, b] of stacked experts: the axis as wide as the model is where they meet it."""
    a, b = parameter.shape[1:]
    reads, writes = role in {"gate", "up", "gate_up"}, role == "down"
    if (a == width) != (b == width) and (reads or writes):
        return "out_in" if (b == width) == reads else "in_out"
    transposed = getattr(module, "is_transposed", None)  # what transformers' own expert kernels go by
    if transposed is None:
        found = f"{tuple(parameter.shape)} in {type(module).__name__}"
        raise UnsupportedError(f"expected stacked experts whose shape tells input from output, found {found}")
    return "in_out" if transposed else "out_in"


def _classify(
    model: nn.Module, task: Task, head: str, chain: list[str]
) -> tuple[dict[str, str], list[tuple[str | None, Projection]]]:
    """Give every parameter a role, and list the projections with the path of the block that owns each."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    stem = set(list(modules)[: list(modules).index(chain[0])]) if task == "image_classification" else set()
    width = getattr(_text_config(model), "hidden_size", -1)
    roles: dict[str, str] = {}
    placed: list[tuple[str | None, Projection]] = []
    for path, module in modules.items():
        owner = next((block for block in chain if f"{path}.".startswith(f"{block}.")), None)
        siblings = {name for name, _ in modules[path.rpartition(".")[0]].named_children()}
        for local, parameter in module.named_parameters(recurse=False):
            name = names[id(parameter)]
            if name in roles and path != head and not isinstance(module, nn.Embedding):
                continue  # tied: listed where it is first met, but a head always, and a token table has its role
            own_path = path if local == "weight" else f"{path}.{local}"
            role = _projection_role(own_path.removeprefix(f"{owner}.") if owner else own_path, module, siblings)
            shape = _weight_shape(path, module, local, role, width)
            if shape is None:
                roles[name] = _plain_role(path, module, local, parameter)
                continue
            if path == head:
                role = "head"
            elif path in stem and owner is None:
                role = "patch"
            roles.setdefault(name, role)
            n_in, n_out, orientation, experts = shape
            bias = module._parameters.get(local.replace("weight", "bias") if "weight" in local else f"{local}_bias")
            projection = Projection(
                module=path,
                parameter=name,
                role=role,
                in_features=n_in,
                out_features=n_out,
                orientation=orientation,
                experts=experts,
                bias=None if bias is None else names[id(bias)],
                hookable=_linear_shape(module) is not None,
            )
            placed.append((owner, projection))
    return {name: roles[name] for name in names.values()}, placed


def _block(index: int, path: str, projections: list[Projection]) -> Block:
    attends = [_attends(p.parameter.removeprefix(path), p.role) for p in projections]
    return Block(
        index=index,
        name=path,
        attention=tuple(p for p, yes in zip(projections, attends, strict=True) if yes),
        feed_forward=tuple(p for p, yes in zip(projections, attends, strict=True) if not yes),
    )


def _tied(model: nn.Module) -> dict[str, str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: names[id(parameter)] for name, parameter in every if name != names[id(parameter)]}


# ---------------------------------------------------------------------------------- what a language model really does


@dataclass(frozen=True, slots=True)
class _Run:
    """What one run on a few tokens showed."""

    order: list[int]  # indices into the chain as registered, in the order they ran
    hidden: Tensor  # [2, T, d] the backbone's last hidden state
    logits: Tensor  # [2, T, vocabulary] the model's own
    final_norm: str | None


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run in eval mode without gradients; leave every module's mode and the random state as they were."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _observe(model: nn.Module, chain: list[str]) -> _Run:
    """Run the backbone, then the whole model, on two rows of four tokens that differ in the last one."""
    kind, device = type(model).__name__, cast(torch.device, model.device)
    if device.type == "meta":  # weights offloaded by accelerate, whose hooks move the input where it belongs
        device = torch.device("cpu")
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]], device=device)  # [2, T]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    order: list[int] = []
    outputs: dict[str, Any] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _m, _x, i=i: order.append(i))
        for i, path in enumerate(chain)
    ]
    hooks += [
        module.register_forward_hook(lambda _m, _x, y, path=path: outputs.__setitem__(path, y))
        for path, module in model.named_modules()
        if _is_norm(module) and not any(path.startswith(f"{block}.") for block in chain)
    ]
    try:
        with _undisturbed(model, device):
            hidden = _backbone(model)(**inputs).last_hidden_state
            for hook in hooks:
                hook.remove()
            logits = model(**inputs).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}; try model(input_ids) yourself"
        raise UnsupportedError(f"expected {kind} to run on four tokens, found {found}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if sorted(order) != list(range(len(chain))):
        raise UnsupportedError(f"expected each of {len(chain)} blocks of {kind} to run once, found {len(order)} runs")
    if not _same(logits[0, :-1], logits[1, :-1], 1e-3):
        found = f"{kind} whose logits depend on later tokens (an encoder?)"
        raise UnsupportedError(f"expected a causal model, found {found}; these are not supported")
    norms = [path for path, output in outputs.items() if isinstance(output, Tensor) and torch.equal(output, hidden)]
    return _Run(order=order, hidden=hidden, logits=logits, final_norm=norms[-1] if norms else None)


def _same(a: Tensor, b: Tensor, relative: float = 0.0) -> bool:
    """Equal up to `relative`, or up to a few roundings, of the largest finite entry of `a`; NaN equals NaN."""
    finite = a[a.isfinite()].abs()
    size = float(finite.max()) if finite.numel() else 0.0
    tolerance = max(relative, 16 * torch.finfo(a.dtype).eps) * size
    return torch.allclose(a.float(), b.to(a.device).float(), rtol=0.0, atol=tolerance, equal_nan=True)


def _apply_head(model: nn.Module, head: str, hidden: Tensor) -> Tensor:
    module = model.get_submodule(head)
    return cast(Tensor, module(hidden.to(cast(Tensor, module.weight).dtype)))


def _logit_rule(model: nn.Module, head: str, run: _Run) -> _LogitRule:
    """The scaling and soft-capping in the configuration under which the map's logits are the model's own."""
    config = _text_config(model)

    def settings(*keys: str) -> list[float]:
        return [value for key in keys if (value := getattr(config, key, None)) is not None]

    # One configuration key, two meanings: Granite divides by `logits_scaling`, HyperCLOVA X multiplies.
    scales = [(scale, True) for scale in settings("logits_scaling")]
    scales += [(scale, False) for scale in settings("logit_scale", "lm_head_multiplier", "logits_scaling")]
    caps = settings("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
    with torch.no_grad():
        raw = _apply_head(model, head, run.hidden)
    for (scale, divide), cap in product([*scales, (1.0, False)], [*caps, None]):
        rule = _LogitRule(scale, divide, cap)
        if _same(run.logits, rule(raw)):
            return rule
    raise UnsupportedError(
        f"expected logits that are the head of the last hidden state, scaled or soft-capped, found others in "
        f"{type(model).__name__}; it cannot be measured"
    )
