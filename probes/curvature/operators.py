"""The Hessian and the Gauss-Newton matrix of a mean loss, as operators that multiply vectors and are never formed.

For a loss L(theta) = 1/N sum_n l(z_n(theta)), with z_n the logits at the n-th completion token (or of the n-th image)
and l the cross entropy, in nats,

    H = d^2 L / d theta^2                            the Hessian
    G = 1/N sum_n J_n^T (diag(p_n) - p_n p_n^T) J_n  the generalised Gauss-Newton matrix (GGN)

with J_n = d z_n / d theta and p_n = softmax(z_n). What G leaves out of H is sum_n,c (p_nc - [c = y_n]) d^2 z_nc / d
theta^2 / N. It is positive semi-definite, reads no label, and equals the Fisher information E_y~p[g g^T] (Schraudolph
2002; Martens, arXiv 1412.1193). Both have a row per weight; a product costs a few forward passes and vectors that long:

    H v: grad <grad L, v>                            a second backward pass through the first (Pearlmutter 1994)
    J v: the gradient of <J^T u, v> with respect to u, which is linear in u, so any u will do; then J^T (l'' J v) by one
         more backward pass

Every record counts in every product, some hundred tokens at a time, so memory depends on `batch_tokens` and not on the
number of records. Logits exist for some positions at a time only and are computed again where they are needed twice.
Nothing is differentiated below the lowest parameter asked for.

Measured on Llamas of 26 and 135 million weights on a CPU, in forward passes over the same tokens: over the whole model
one product costs about 11 (Hessian) or 7.5 (GGN), over one block in the middle about 4 or 3.3. Vectors multiplied
together (`matmat`) share the forward and the first backward pass: four of them cost about 2.5 or 2.2 each over a block.

Shape letters: B records in a piece, T padded tokens, N losses of a piece, C of them at once, d width, V classes or
vocabulary, n weights, k vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from probes.classify import class_logits
from probes.errors import ResourceError, UnsupportedError, UsageError
from probes.likelihood import CHUNK_ELEMENTS, check_records, out_of_memory
from probes.modelmap import ModelMap
from probes.passes import gradients
from probes.records import ImageRecord, TokenRecord, length_batches, pad, predicting

Kind = Literal["hessian", "ggn"]
Floats = NDArray[Any]

_TOLERANCE = 1e-3  # relative, between numbers that should be equal; rounding is far below, and defects above
_NO_SECOND_DERIVATIVE = ("derivative for", "differentiate twice")  # how torch says so


def block_parameters(model_map: ModelMap) -> dict[int, tuple[str, ...]]:
    """Names of the parameters of each block, for one operator per block; those outside the blocks are left out."""
    model_map.expect_single()
    found: dict[int, list[str]] = {block.index: [] for block in model_map.blocks}
    for name, _ in model_map.model.named_parameters():
        if (index := model_map.block_of(name)) is not None:
            found[index].append(name)
    return {index: tuple(names) for index, names in found.items()}


class CurvatureOperator(LinearOperator[Any]):
    """A symmetric [n, n] matrix of second derivatives of the mean loss over records; use one of its two subclasses.

    A vector is the concatenation of the flattened parameters in the order of `parameters`; `split` takes it apart.
    Everything in scipy that takes a `LinearOperator` takes this.

    Attributes:
        kind: "hessian" or "ggn".
        semidefinite: whether no eigenvalue can be negative.
        parameters: name -> shape of the parameters, in the model's order, a tied parameter once.
        loss: the mean loss in nats: over completion tokens, or over images.
        n_records: records given.
        n_losses: what the mean is over: completion tokens, or images.
        products: vectors multiplied so far.
    """

    kind: ClassVar[Kind]
    semidefinite: ClassVar[bool]

    def __new__(cls, *_: Any, **__: Any) -> Self:
        # For type checkers alone, which otherwise see the arguments of LinearOperator's own constructor.
        return cast(Self, super().__new__(cls))  # type: ignore[call-overload]

    def __init__(
        self,
        model: nn.Module,
        records: Sequence[TokenRecord] | Sequence[ImageRecord],
        *,
        parameters: Sequence[str] | None = None,
        batch_tokens: int | None = None,
        model_map: ModelMap | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Prepare products, and find out at once whether they can be had: costs one forward pass and a little more.

        Args:
            model: a causal language model (for `TokenRecord`s) or an image classifier (for `ImageRecord`s), in float32
                or float64. It runs in evaluation mode; weights, modes, `requires_grad` and `.grad` are as before after
                every product. Later changes of the weights are seen.
            records: at least one. Every record is used in every product.
            parameters: names as in `named_parameters()`, tied names included; all by default.
            batch_tokens: padded tokens, or images, per piece: bounds memory and changes results by rounding only. By
                default 512 (2048 on an accelerator), or as many images as hold a million numbers.
            model_map: the model's map, built when absent; an image classifier needs none.
            progress: called after every product with the number of vectors multiplied so far.

        Raises:
            UsageError: no records, an unknown parameter, or no parameter at all.
            UnsupportedError: half precision, ids or labels the model does not have, a loss that is not finite, a model
                that gives two results for one input, or an operation that has no second derivative.
            ResourceError: a piece does not fit in memory.
        """
        if not records:
            raise UsageError("expected at least one record to compute curvature from, found none; add records")
        if batch_tokens is not None and batch_tokens < 1:
            raise UsageError(f"expected batch_tokens of at least 1, found {batch_tokens}")
        self._model = model
        self._wanted = _wanted(model, parameters)
        self._source: _Texts | _Images
        if isinstance(records[0], TokenRecord):
            if model_map is None or model_map.model is not model:
                model_map = ModelMap.of(model)
            self._source = _Texts(model_map, cast("Sequence[TokenRecord]", records))
        else:
            self._source = _Images(model, cast("Sequence[ImageRecord]", records))
        first = next(iter(self._wanted.values()))
        self._device, self._type = first.device, first.dtype
        self._pieces = self._source.pieces(batch_tokens or self._source.default())
        self._progress = progress
        self.parameters = {name: tuple(p.shape) for name, p in self._wanted.items()}
        self.n_records, self.n_losses = len(records), self._source.n
        self.products = 0
        n = sum(p.numel() for p in self._wanted.values())
        super().__init__(np.dtype(str(self._type).removeprefix("torch.")), (n, n))  # type: ignore[call-arg]
        self.loss = self._check()

    def split(self, vector: ArrayLike) -> dict[str, Floats]:
        """The parts of a vector [n] by parameter name, each in the parameter's shape."""
        flat = np.asarray(vector).reshape(-1)
        if len(flat) != self.shape[0]:
            raise UsageError(f"expected a vector of {self.shape[0]} weights, found {len(flat)}")
        ends = np.cumsum([p.numel() for p in self._wanted.values()])
        parts = np.split(flat, ends[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.parameters.items(), parts, strict=True)}

    def join(self, tensors: Mapping[str, ArrayLike]) -> Floats:
        """The inverse of `split`: one vector [n] from a tensor per parameter."""
        return np.concatenate([np.asarray(tensors[name]).reshape(-1) for name in self.parameters])

    def _matvec(self, x: Floats) -> Floats:
        return self._matmat(x.reshape(-1, 1))[:, 0]

    def _matmat(self, X: Floats) -> Floats:  # scipy's name
        vectors = torch.from_numpy(np.array(X.T, dtype=self.dtype, order="C")).to(self._device)  # [k, n]
        totals = self._multiply(vectors, self._pieces)
        self.products += len(vectors)
        if self._progress:
            self._progress(self.products)
        return totals.cpu().numpy().T

    def _rmatvec(self, x: Floats) -> Floats:
        return self._matvec(x)

    def _rmatmat(self, X: Floats) -> Floats:  # scipy's name
        return self._matmat(X)

    def _adjoint(self) -> Self:
        return self

    _transpose = _adjoint

    # ------------------------------------------------------------------------------------------------------ products

    def _multiply(self, vectors: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
        """The operator, restricted to the records of `pieces`, times vectors [k, n]: [k, n]."""
        totals = torch.zeros_like(vectors)
        into, tangents = [self._parts(row) for row in totals], [self._parts(row) for row in vectors]
        with self._ready():
            for piece in pieces:
                states, leaves = self._source.states(piece), list(self._wanted.values())  # [N, d]
                self._add(states, self._source.labels(piece), leaves, tangents, into)
        if not bool(torch.isfinite(totals).all()):
            raise UnsupportedError(
                "expected finite curvature, found infinite or undefined numbers; the second derivatives of this model "
                "overflow at these weights: use float64, or leave out the parameters concerned"
            )
        return totals

    def _add(
        self,
        states: Tensor,
        labels: Tensor,
        leaves: Sequence[Tensor],
        tangents: list[list[Tensor]],
        totals: list[list[Tensor]],
    ) -> None:
        """Add the products of one piece's matrix with k vectors to `totals`.

        Args:
            states: [N, d] what the output head maps to logits, with its graph; of an image classifier the logits.
            labels: [N] classes.
            leaves: the parameters.
            tangents: k times one tensor per parameter.
            totals: the same for the results.
        """
        raise NotImplementedError("use HessianOperator or GaussNewtonOperator")

    def _head(self) -> list[int]:
        """Indices, among the parameters, of those the output head uses."""
        names = self._source.head
        return [i for i, name in enumerate(self._wanted) if name in names]

    def _slices(self, states: Tensor) -> list[slice]:
        """Positions whose logits are alive together."""
        size = max(1, CHUNK_ELEMENTS // self._source.width(states))
        return [slice(start, start + size) for start in range(0, len(states), size)]

    def _parts(self, row: Tensor) -> list[Tensor]:
        """Views of a vector [n] in the parameters' shapes."""
        parts = row.split([p.numel() for p in self._wanted.values()])  # type: ignore[no-untyped-call]
        return [part.view(p.shape) for part, p in zip(parts, self._wanted.values(), strict=True)]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The model frozen but for the parameters wanted, in forms that can be differentiated twice."""
        try:
            with ExitStack() as stack:
                for config in {id(c): c for m in self._model.modules() if (c := getattr(m, "config", None))}.values():
                    name = "_experts_implementation_internal"
                    if hasattr(config, name):  # some kernels for stacked experts know no float64, others no derivative
                        stack.callback(setattr, config, name, getattr(config, name))
                        setattr(config, name, "eager")
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivative
                stack.enter_context(gradients(self._model, {}, lambda name, gradient: None))
                for parameter in self._wanted.values():
                    parameter.requires_grad_(True)
                yield
        except Exception as error:
            if out_of_memory(error):
                raise ResourceError(
                    "expected memory for second derivatives of one piece, found too little; lower batch_tokens, use "
                    "shorter records, or fewer parameters at once (single blocks)"
                ) from None
            if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
                line = str(error).partition("\n")[0][:120]
                raise UnsupportedError(
                    f"expected operations that can be differentiated twice, found one that cannot ({line}); load the "
                    "model with attn_implementation eager or sdpa and without custom kernels"
                ) from None
            raise

    def _check(self) -> float:
        """The mean loss; refuse what would make hours of products worthless."""
        total, bad = 0.0, 0
        with self._ready(), torch.no_grad():
            for piece in self._pieces:
                states, labels = self._source.states(piece), self._source.labels(piece)
                for part in self._slices(states):
                    losses = functional.cross_entropy(self._source.logits(states[part]), labels[part], reduction="none")
                    bad += int((~losses.isfinite()).sum())
                    total += float(losses.double().sum())
        if bad:
            raise UnsupportedError(
                f"expected finite losses, found {bad} of {self.n_losses} that are not; check the weights for infinite "
                "or undefined numbers"
            )
        self._check_derivatives([self._pieces[0][:1]])
        return total / self.n_losses

    def _check_derivatives(self, pieces: Sequence[Sequence[int]]) -> None:
        """Products with one record: random operations, and those whose second derivative is missing or wrong."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (1, self.shape[0]), generator=generator).mul_(2).sub_(1).to(self._device, self._type)
        with self._ready():
            # A product visits only what leads to the parameters, and so never the node by which a function that can be
            # differentiated once protests. Visit everything.
            states, leaves = self._source.states(pieces[0]), list(self._wanted.values())
            _Jacobian(states, leaves, torch.ones_like(states)).visit()
        a, b = (self._multiply(signs, pieces)[0] for _ in range(2))  # [n]
        squared = _dot(a, a)
        if _dot(a - b, a - b) > _TOLERANCE**2 * squared:
            raise UnsupportedError(
                "expected the same product from the same vector, found two; turn off what is random in the model"
            )
        again = _dot(signs[0], self._multiply(a[None], pieces)[0])  # v^T A (A v) for |A v|^2
        if abs(squared - again) > _TOLERANCE * squared:
            raise UnsupportedError(
                f"expected a symmetric matrix of second derivatives, found {again:.3g} where {squared:.3g} belongs; "
                "load the model with attn_implementation eager or sdpa and without custom kernels"
            )


class HessianOperator(CurvatureOperator):
    """The Hessian of the mean cross entropy; arguments, errors and costs as for `CurvatureOperator`.

    Where a model has kinks (ReLU) its second derivative there is taken as zero, as autograd does.
    """

    kind = "hessian"
    semidefinite = False

    def _add(
        self,
        states: Tensor,
        labels: Tensor,
        leaves: Sequence[Tensor],
        tangents: list[list[Tensor]],
        totals: list[list[Tensor]],
    ) -> None:
        slices, head = self._slices(states), self._head()
        at = (self._source.logits, labels, slices, self.n_losses)
        by_state, *by_head = _LossGradient.apply(*at, states, *[leaves[i] for i in head])  # type: ignore[no-untyped-call]
        found = list(zip(head, by_head, strict=True))
        if states.requires_grad:
            body = torch.autograd.grad(states, leaves, by_state, create_graph=True, allow_unused=True)
            found += [(i, g) for i, g in enumerate(body) if g is not None]
        found = [(i, g) for i, g in found if g.requires_grad]  # the gradient, in terms that may share a parameter
        for tangent, total in zip(tangents, totals, strict=True):
            along = [tangent[i] for i, _ in found]
            more = tangent is not tangents[-1]
            products = torch.autograd.grad([g for _, g in found], leaves, along, retain_graph=more, allow_unused=True)
            _accumulate(total, products)


class GaussNewtonOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix of the mean cross entropy; arguments, errors and costs as for its base.

    Equal to the Hessian where the logits are linear in the parameters. At most n_losses x (V - 1) eigenvalues are not
    zero.
    """

    kind = "ggn"
    semidefinite = True

    def _add(
        self,
        states: Tensor,
        labels: Tensor,
        leaves: Sequence[Tensor],
        tangents: list[list[Tensor]],
        totals: list[list[Tensor]],
    ) -> None:
        slices, head = self._slices(states), self._head()
        body = _Jacobian(states, leaves)
        for tangent, total in zip(tangents, totals, strict=True):
            moved = body.push(tangent)  # [N, d]
            pulled = torch.empty_like(states)  # [N, d]
            for part in slices:
                rows = states[part].detach().requires_grad_()  # [C, d]
                output = _Jacobian(self._source.logits(rows), [rows, *[leaves[i] for i in head]])
                change = output.push([moved[part], *[tangent[i] for i in head]])  # [C, V]
                by_rows, *by_head = output.pull(_curved(output.value, change) / self.n_losses)
                pulled[part] = cast(Tensor, by_rows)
                _accumulate([total[i] for i in head], by_head)
            _accumulate(total, body.pull(pulled))


class _Jacobian:
    """Products of J = d value / d inputs with vectors on either side, from one recorded pass.

    They come from J^T u for some u: its derivative along u, which does not depend on u, and along the inputs, which
    does and is sum_c u_c d^2 value_c.
    """

    def __init__(self, value: Tensor, inputs: Sequence[Tensor], u: Tensor | None = None) -> None:
        self.value, self._inputs = value, inputs
        self._u = (torch.zeros_like(value) if u is None else u).detach().requires_grad_()
        self._pulled: list[tuple[int, Tensor]] = []
        if value.requires_grad:
            found = torch.autograd.grad(value, inputs, self._u, create_graph=True, allow_unused=True)
            self._pulled = [(i, g) for i, g in enumerate(found) if g is not None and g.requires_grad]

    def push(self, tangents: Sequence[Tensor]) -> Tensor:
        """J v, in the shape of the value, for one tangent per input."""
        if not self._pulled:
            return torch.zeros_like(self.value)
        return cast(Tensor, self._derivative(tangents, [self._u])[0])

    def pull(self, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """J^T w, one tensor per input; None for one without influence."""
        if not self.value.requires_grad:
            return (None,) * len(self._inputs)
        return torch.autograd.grad(self.value, self._inputs, cotangent, retain_graph=True, allow_unused=True)

    def bend(self, tangents: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """sum_c u_c d^2 value_c v, one tensor per input."""
        return self._derivative(tangents, self._inputs)

    def visit(self) -> None:
        """Differentiate J^T u with respect to everything it depends on."""
        if self._pulled:
            outputs = [g for _, g in self._pulled]
            torch.autograd.backward(outputs, [torch.ones_like(g) for g in outputs])

    def _derivative(self, tangents: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        along = [tangents[i] for i, _ in self._pulled]
        outputs = [g for _, g in self._pulled]
        return torch.autograd.grad(outputs, inputs, along, retain_graph=True, allow_unused=True)


class _LossGradient(torch.autograd.Function):
    """Gradients of the mean loss with respect to states [N, d] and the parameters of the head, differentiable once.

    Both passes visit a slice of the positions at a time and compute its logits anew, so that few exist at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Callable[[Tensor], Tensor],
        labels: Tensor,
        slices: list[slice],
        n_losses: int,
        states: Tensor,
        *head: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.states, ctx.head, ctx.at = states.detach(), head, (logits, labels, slices, n_losses)
        found = [torch.zeros_like(states), *[torch.zeros_like(p) for p in head]]
        for part in slices:
            with torch.enable_grad():
                rows = ctx.states[part].detach().requires_grad_()  # [C, d]
                z = logits(rows)  # [C, V]
            first = torch.autograd.grad(z, [rows, *head], _residual(z, labels[part]) / n_losses)
            found[0][part] = first[0]
            _accumulate(found[1:], first[1:])
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_states: Tensor, *by_head: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, slices, n_losses = ctx.at
        found = [torch.zeros_like(ctx.states), *[torch.zeros_like(p) for p in ctx.head]]
        for part in slices:
            tangents = [by_states[part], *by_head]
            with torch.enable_grad():
                rows = ctx.states[part].detach().requires_grad_()  # [C, d]
                z = logits(rows)  # [C, V]
                output = _Jacobian(z, [rows, *ctx.head], _residual(z, labels[part]) / n_losses)
            change = output.push(tangents)  # [C, V]
            for second in (output.pull(_curved(z, change) / n_losses), output.bend(tangents)):
                if second[0] is not None:
                    found[0][part] += second[0]
                _accumulate(found[1:], second[1:])
        return None, None, None, None, *found


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two vectors [n], added up in float64: in fp32 a sum of many millions has few digits left."""
    total = 0.0
    for start in range(0, len(a), 1 << 20):
        x, y = (v[start : start + (1 << 20)].double() for v in (a, b))
        total += float(x @ y)
    return total


def _residual(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross entropy by logits [C, V], p - [c = y]; exact to rounding where p(y) is nearly 1.

    For a memorised token p(y) may be 1 - 1e-6; then 1 - p(y) has one digit left in fp32, and the sum of the others all.
    """
    others = logits.detach().softmax(-1).scatter(-1, labels[:, None], 0)  # [C, V]
    return others.scatter(-1, labels[:, None], -others.sum(-1, keepdim=True))


def _curved(logits: Tensor, change: Tensor) -> Tensor:
    """(diag(p) - p p^T) change for logits and change [C, V], exact to rounding where one p is nearly 1."""
    p = logits.detach().softmax(-1)  # [C, V]
    change = change - change.gather(-1, p.argmax(-1, keepdim=True))  # a shift of all logits changes no p
    return p * (change - (p * change).sum(-1, keepdim=True))


def _accumulate(totals: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for total, part in zip(totals, parts, strict=True):
        if part is not None:
            total.add_(part)


# --------------------------------------------------------------------------------------------------- models and records


class _Texts:
    """Hidden states of completion positions, and the head that makes logits of them."""

    def __init__(self, model_map: ModelMap, records: Sequence[TokenRecord]) -> None:
        check_records(records, model_map.vocab_size)
        self._map, self._records = model_map, records
        self._device = next(model_map.model.parameters()).device
        self.n = sum(record.n_tokens for record in records)
        names = [
            f"{model_map.head}.{name}" for name, _ in model_map.model.get_submodule(model_map.head).named_parameters()
        ]
        self.head = {model_map.tied.get(name, name) for name in names}

    def default(self) -> int:
        return 512 if self._device.type == "cpu" else 2048

    def pieces(self, size: int) -> list[list[int]]:
        return length_batches(self._records, size)

    def states(self, piece: Sequence[int]) -> Tensor:
        """[N, d] final hidden states of the positions that predict a completion token."""
        chosen = [self._records[i] for i in piece]
        ids, _ = pad(chosen, self._device)  # [B, T]; no mask, see `probes.likelihood`
        hidden = self._map.backbone()(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, d]
        return cast(Tensor, hidden[predicting(chosen, ids)])

    def labels(self, piece: Sequence[int]) -> Tensor:
        return torch.tensor([t for i in piece for t in self._records[i].completion], device=self._device)  # [N]

    def width(self, states: Tensor) -> int:
        return self._map.vocab_size

    def logits(self, rows: Tensor) -> Tensor:
        """[C, V] logits of hidden states [C, d]."""
        return self._map.logits(rows)


class _Images:
    """Logits of images; the head is part of the model, so what is left of it is the identity."""

    head: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, records: Sequence[ImageRecord]) -> None:
        self._model, self._records = model, records
        self._device = next(model.parameters()).device
        self.n = len(records)

    def default(self) -> int:
        return max(1, 1_000_000 // self._records[0].pixels.numel())

    def pieces(self, size: int) -> list[list[int]]:
        order = range(self.n)
        return [list(order[start : start + size]) for start in range(0, self.n, size)]

    def states(self, piece: Sequence[int]) -> Tensor:
        """[B, V] logits."""
        logits = class_logits(self._model, torch.stack([self._records[i].pixels for i in piece]).to(self._device))
        classes = logits.shape[-1]
        if not all(0 <= self._records[i].label < classes for i in piece):
            raise UnsupportedError(f"expected labels below {classes} classes, found others; check the records")
        return logits

    def labels(self, piece: Sequence[int]) -> Tensor:
        return torch.tensor([self._records[i].label for i in piece], device=self._device)  # [B]

    def width(self, states: Tensor) -> int:
        return states.shape[-1]

    def logits(self, rows: Tensor) -> Tensor:
        return rows


def _wanted(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by the name under which `named_parameters()` lists them, in its order, a tied one once."""
    listed = {id(p): name for name, p in model.named_parameters()}
    known = {name: listed[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    for name in names or ():
        if name not in known:
            close = get_close_matches(name, known, n=3)
            raise UsageError(
                f"expected parameters of {type(model).__name__}, found {name}"
                + (f"; close names: {', '.join(close)}" if close else "; list them with named_parameters()")
            )
    chosen = set(listed.values()) if names is None else {known[name] for name in names}
    if not chosen:
        raise UsageError("expected at least one parameter to differentiate by, found none; name some")
    types = {p.dtype for p in model.parameters()}
    if len(types) > 1 or not types <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        raise UnsupportedError(f"expected weights all in float32 or all in float64, found {found}; convert the model")
    return {name: p for name, p in model.named_parameters() if name in chosen}
