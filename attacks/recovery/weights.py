"""Change some weights of a live model for a while, and put them back bit for bit.

Quantisation, pruning, noise and interpolation are all one edit of single weight tensors: W -> f(name, W). `changed`
applies it in place, one tensor at a time, keeps a copy of what stood there in main memory, and restores it however the
block is left. Modules, hooks, modes, gradients, dtypes and devices are never touched.

`targets` says which tensors such an edit usually concerns: the weights of the linear maps in the blocks, experts
stacked in one parameter included, with the axis along which each is multiplied by its input. Embeddings, output head,
norms, biases and the routers of a mixture of experts stay as they are, as in the quantisers and pruners in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from probes.errors import UnsupportedError, UsageError
from probes.modelmap import ModelMap, Projection

Edit = Callable[[str, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class Target:
    """One weight tensor that multiplies activations.

    Attributes:
        name: its name in `named_parameters()`.
        block: index of the block that owns it; None outside the blocks.
        in_axis: axis of `matrix(W)` that the input runs along.
        kernel: whether it is a convolution's kernel [out, in / groups, ...].
    """

    name: str
    block: int | None
    in_axis: int
    kernel: bool = False

    def matrix(self, weight: Tensor) -> Tensor:
        """The tensor as it multiplies its input: a kernel unfolded to [out, inputs of one output], others as is."""
        return weight.flatten(1) if self.kernel else weight

    def through(self, edit: Callable[[Tensor, int], Tensor], weight: Tensor) -> Tensor:
        """`edit(matrix, in_axis)` in the tensor's own shape."""
        return edit(self.matrix(weight), self.in_axis).reshape(weight.shape)


def targets(model_map: ModelMap, *, head: bool = False, embeddings: bool = False) -> dict[str, Target]:
    """The weights of the linear maps in the blocks, in depth order.

    Args:
        model_map: of the model.
        head: the output head as well (with a tied head that is the token table).
        embeddings: token tables and an image model's patch projection as well.

    Returns:
        Parameter name -> target; a tied tensor is there once.

    Raises:
        UnsupportedError: no block has a linear map.
    """
    model_map.expect_single()
    parameters = dict(model_map.model.named_parameters())
    found: dict[str, Target] = {}

    def add(projection: Projection) -> None:
        name, transposed = projection.parameter, projection.orientation == "in_out"
        stacked = projection.experts is not None
        found.setdefault(
            name,
            Target(
                name=name,
                block=model_map.block_of(name),
                in_axis=int(stacked) + int(not transposed),
                kernel=not stacked and parameters[name].ndim > 2,
            ),
        )

    for block in model_map.blocks:
        for projection in (*block.attention, *block.feed_forward):
            if projection.role != "router":
                add(projection)
    if not found:
        raise UnsupportedError(
            f"expected blocks with linear maps, found none in {type(model_map.model).__name__}; "
            "its weights cannot be changed one map at a time"
        )
    for projection in model_map.linear_modules():
        if (head and projection.role == "head") or (embeddings and projection.role == "patch"):
            add(projection)
    for name in model_map.embeddings if embeddings else ():
        if parameters[name].ndim == 2:  # a table of tokens; its rows are what the first block reads
            found.setdefault(name, Target(name, None, 1))
    return found


@contextmanager
def changed(
    model: nn.Module, edit: Edit, names: Iterable[str] | None = None, *, model_map: ModelMap | None = None
) -> Iterator[tuple[str, ...]]:
    """The model with some of its weights replaced, inside a `with` block.

    Args:
        model: any module; inside the block its parameters are the same objects with other values.
        edit: called once for each tensor with its name and the tensor, which it must not write to. It returns what
            takes its place (of the same shape, on any device, in any floating type: it is cast to the tensor's own),
            or None to leave it as it is.
        names: parameter names; `targets` of the model by default. A tied tensor is changed once, under the first of
            its names that is given.
        model_map: the model's map, built when `names` is absent and this is too.

    Yields:
        Names of the tensors that were replaced.

    Raises:
        UsageError: a name that the model does not have.
        UnsupportedError: weights that are not in memory, or a replacement that is not finite.
        ValueError: a replacement of another shape.
    """
    if names is None:
        names = targets(model_map if model_map is not None and model_map.model is model else ModelMap.of(model))
    parameters = _once(dict(model.named_parameters(remove_duplicate=False)), names)
    kept: list[tuple[Tensor, Tensor]] = []  # where it stood, what stood there
    done: list[str] = []
    try:
        for name, parameter in parameters.items():
            tensor = parameter.detach()
            new = edit(name, tensor)
            if new is None:
                continue
            if new.shape != tensor.shape:
                raise ValueError(f"expected a tensor {list(tensor.shape)} for {name}, found {list(new.shape)}")
            new = new.detach().to(tensor)
            if not bool(new.isfinite().all()):
                raise UnsupportedError(f"expected finite weights, found others in {name}; check the checkpoint")
            kept.append((tensor, tensor.to("cpu", copy=True)))
            tensor.copy_(new)
            done.append(name)
            del new
        yield tuple(done)
    finally:
        for tensor, saved in reversed(kept):  # reversed: of overlapping tensors the first copy is the original
            tensor.copy_(saved)


def _once(parameters: Mapping[str, nn.Parameter], names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The named parameters, each tensor under the first name given for it."""
    chosen: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name in names:
        parameter = parameters.get(name)
        if parameter is None:
            raise UsageError(f"expected names of the model's parameters, found {name}; see named_parameters()")
        if parameter.is_meta:
            raise UnsupportedError(f"expected weights in memory, found {name} elsewhere; load the model on one device")
        if id(parameter) not in seen:
            seen.add(id(parameter))
            chosen[name] = parameter
    return chosen
