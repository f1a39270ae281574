"""Which operators a canonical norm is written with: the table, and one function for each spelling.

The rows of `_TABLE` are tried in order; the first one whose conditions hold for the target, the
opset, the axes, the shape and the type is taken. Where none holds, or the nodes of the file are
that spelling already, the norm keeps its own nodes, and the reason is said.

    target      what may be written
    onnx        standard operators of the file's opset; below opset 17 (layer norm) and 23 (RMS
                norm) the chain of primitives that onnxruntime fuses when it loads the model
    ort-cpu     also LayerNormalization and SimplifiedLayerNormalization at any opset: onnxruntime
    ort-cuda    keeps both in ONNX's own domain from version 1 on

Choices rest on measurements with onnxruntime 1.31 on a CPU with AVX2, one thread: a layer norm over
channels 1x64x128x128 takes 9 to 18 ms as primitives and 3 to 5 ms between two Transposes; a group
norm over 8 groups of the same takes 3.3 ms as GroupNormalization and 1.5 ms as
InstanceNormalization between Reshapes. Nothing was measured on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.forms import NARROW, mean_of
from onnxnorm.layout import Dims
from onnxnorm.module import Scope
from onnxnorm.norms import Norm
from onnxnorm.port import rounded
from onnxnorm.rewrite import Rewriter

TARGETS: Final = ("onnx", "ort-cpu", "ort-cuda")
_FLOAT: Final = onnx.TensorProto.FLOAT
_KERNELS: Final = (_FLOAT, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True)
class Site:
    """A norm, and what decides how it can be written.

    Attributes:
        norm: The norm.
        target: One of `TARGETS`; in a function always "onnx", for onnxruntime (1.31) dies on its
            own operators there when it inlines the function.
        opset: Of ONNX's own domain in its scope.
        shape: Dims of its input; None where the rank is unknown.
        given: Element type of the input; 0 where unknown.
        wanted: Element type of the output; 0 where unknown.
        centred: Whether its input is a difference with some mean, so that the chain of an RMS norm
            behind it would look like that of a layer norm to onnxruntime.
        scaled: Whether a constant vector that is no part of it multiplies its output, which
            onnxruntime would take into a chain all the same.
    """

    norm: Norm
    target: str
    opset: int
    shape: Dims | None
    given: int
    wanted: int
    centred: bool
    scaled: bool

    @classmethod
    def of(cls, norm: Norm, facts: Facts, target: str) -> Site:
        """A norm in its surroundings."""
        before, after = facts.type(norm.input), facts.type(norm.output)
        given = before.element if before is not None else 0
        return cls(
            norm,
            "onnx" if _is_in_function(norm.node.scope) else target,
            norm.node.scope.opsets[""],
            norm.dims,
            given,
            after.element if after is not None and after.element else given,
            _is_centred(norm.input, facts),
            norm.gamma is None and _is_scaled(norm.output, facts),
        )

    @property
    def rank(self) -> int | None:
        """How many dims the input has."""
        return None if self.shape is None else len(self.shape)

    @property
    def trailing(self) -> bool:
        """Whether the axes are the last ones."""
        axes, rank = self.norm.axes or (), self.rank
        if rank is None:
            return tuple(axes) == tuple(range(-len(axes), 0)) and bool(axes)
        return tuple(axes) == tuple(range(rank - len(axes), rank)) and bool(axes)

    @property
    def features(self) -> tuple[int, ...] | None:
        """The sizes of the normalized axes; None where one is not known."""
        # Not from the factors: those broadcast over an axis of size 1, where an operator fails.
        dims = [self.shape[a] for a in self.norm.axes or ()] if self.shape is not None else [None]
        known = [d for d in dims if isinstance(d, int)]
        return tuple(known) if len(known) == len(dims) else None

    @property
    def channels(self) -> int | None:
        """The size of axis 1."""
        dim = self.shape[1] if self.shape is not None and len(self.shape) > 1 else None
        return dim if isinstance(dim, int) else None

    @property
    def wide(self) -> int:
        """The element type to compute in: the wider one of input and output.

        Operators have their statistics in float32 whatever the type is.
        """
        return self.wanted if self.given in NARROW else self.given


Check: TypeAlias = "Callable[[Site], str | None]"
Emit: TypeAlias = "Callable[[Site, Rewriter], None]"


@dataclass(frozen=True)
class Spelling:
    """One way to write a kind of norm.

    Attributes:
        name: What it is written with.
        kinds: The kinds it can be.
        check: Why it cannot be used; None where it can.
        emit: Writes it in the norm's place.
        already: Whether a norm is written so already.
    """

    name: str
    kinds: tuple[str, ...]
    check: Check
    emit: Emit
    already: Callable[[Norm, Facts], bool]


def choose(norm: Norm, facts: Facts, target: str) -> tuple[Spelling, Site] | str:
    """How a norm is to be written for a target, or why it keeps the nodes it has."""
    site = Site.of(norm, facts, target)
    if norm.operator:
        return "it is one operator already"
    reasons: dict[str, list[str]] = {}
    for spelling in _TABLE:
        if norm.kind not in spelling.kinds:
            continue
        if spelling.already(norm, facts):
            return f"it is written as {spelling.name} already"
        reason = spelling.check(site)
        if reason is None:
            return spelling, site
        if reason:
            reasons.setdefault(reason, []).append(spelling.name)
    said = [f"{reason} (for {' and '.join(names)})" for reason, names in reasons.items()]
    return "; ".join(said) or f"no cheaper spelling of {_A.get(norm.kind, norm.kind)} is known"


def _is_in_function(scope: Scope) -> bool:
    while scope.parent is not None:
        scope = scope.parent
    return isinstance(scope.proto, onnx.FunctionProto)


def _is_centred(value: AnyValue, facts: Facts) -> bool:
    made = facts.producer(value)
    if made is None or made.op != "Sub":
        return False
    sides = [facts.producer(v) for v in made.inputs]
    return any(side is not None and side.op == "ReduceMean" for side in sides)


def _is_scaled(value: AnyValue, facts: Facts) -> bool:
    for use in facts.uses(value):
        if use.node.op == "Mul" and not use.node.domain:
            factor = facts.constant(use.node.inputs[1 - use.index])
            if factor is not None and len(factor.shape) == 1:
                return True
    return False


_A: Final = {
    "l2_norm": "an L2 norm",
    "filter_response_norm": "a filter response norm",
}


def _never(norm: Norm, facts: Facts) -> bool:
    """An operator is never what several nodes are."""
    return False


def _is_chain(norm: Norm, facts: Facts) -> bool:
    """Whether a norm's nodes are the chain that onnxruntime fuses, and fuses rightly."""
    ops = sorted(n.op for n in norm.nodes if n.op != "Cast")
    centred = ["Add", "Div", "Mul", "Pow", "ReduceMean", "Sqrt"]
    wanted = centred + (["Add", "ReduceMean", "Sub"] if norm.kind == "layer_norm" else [])
    if norm.kind == "rms_norm" and norm.beta is not None:
        wanted.append("Add")
    if ops != sorted(wanted) or norm.warning:
        return False
    for node in norm.nodes:
        constants = [facts.constant(v) for v in node.inputs]
        if node.op == "Mul" and not any(c is not None and len(c.shape) == 1 for c in constants):
            return False
        if node.op == "Pow" and constants[1] is None:
            return False
    return True


def _is_grouped(norm: Norm, facts: Facts) -> bool:
    """Whether a group norm is an InstanceNormalization on groups."""
    return any(n.op == "InstanceNormalization" for n in norm.nodes)


# ** conditions **


def _own_factors(site: Site) -> str | None:
    """Operators take factors over the normalized axes and no others."""
    axes, rank = site.norm.axes or (), site.rank
    for factor in (site.norm.gamma, site.norm.beta):
        if isinstance(factor, np.ndarray) and rank is not None:
            along = {rank - factor.ndim + a for a, n in enumerate(factor.shape) if n > 1}
            if not along <= {a % rank for a in axes}:
                return "its factors vary along other axes too"
    return None


def _common(site: Site) -> str | None:
    """What every spelling needs."""
    norm = site.norm
    if any(f is not None and not isinstance(f, np.ndarray) for f in (norm.gamma, norm.beta)):
        return "its factors are computed at run time"
    if not site.given or not site.wanted:
        return f"the type of '{norm.input.name}' is not known"
    for element in (site.given, site.wanted):
        if element == onnx.TensorProto.DOUBLE:
            if norm.epsilon is not None:
                return "operators have their epsilon in float32, which is not exact for double"
        elif element not in _KERNELS:
            name = onnx.TensorProto.DataType.Name(element).lower()
            return f"onnxruntime's CPU has no kernel in {name}"
    return None


def _standard(opset: int) -> Callable[[Site], str | None]:
    def check(site: Site) -> str | None:
        if site.opset >= opset or site.target != "onnx":
            return None
        return f"it needs opset {opset}, and the model has {site.opset}"

    return check


def _for(*targets: str) -> Callable[[Site], str | None]:
    """For some targets alone; no reason is worth saying for the others."""
    return lambda site: None if site.target in targets else ""


def _trailing(site: Site) -> str | None:
    if not site.trailing:
        return f"axes {list(site.norm.axes or ())} are not the last ones, or the rank is unknown"
    if site.features is None:
        return "the sizes of the normalized axes are not known"
    return _own_factors(site)


def _one_axis(site: Site) -> str | None:
    if site.rank is None or site.norm.axes is None or len(site.norm.axes) != 1:
        return "it is not over one axis of a tensor of known rank"
    if site.rank < 3:
        return "a matrix is not worth transposing"
    if site.features is None:
        return "the size of the normalized axis is not known"
    return _own_factors(site)


def _fused(site: Site) -> str | None:
    if site.norm.axes is None or len(site.norm.axes) != 1 or not site.trailing:
        return "onnxruntime fuses it over the last axis only"
    if site.scaled:
        return "onnxruntime would fuse it with the factor behind it, which is not its own"
    return None


def _plain(site: Site) -> str | None:
    if site.centred:
        return "with the difference in front of it onnxruntime would take it for a layer norm"
    return None


def _float_channels(site: Site) -> str | None:
    if site.given != _FLOAT or site.wanted != _FLOAT:
        return "onnxruntime's InstanceNormalization is for float32"
    if site.channels is None:
        return "the number of channels is not known"
    if site.rank is None or site.rank < 3:
        return "it has no spatial axes"
    last = site.norm.kind == "instance_norm" and site.norm.axes != tuple(range(2, site.rank))
    if last or site.norm.channel != 1:
        return "its channels are the last axis"
    if site.features is not None and math.prod(site.features) == 1:
        # x s - mean s, as onnxruntime computes it, is not 0 when s is 1 / sqrt(eps).
        return "it normalizes single values, and onnxruntime's InstanceNormalization loses their 0"
    return None


def _softmax_axis(site: Site) -> str | None:
    axes = site.norm.axes or ()
    if len(axes) != 1:
        return "it is over several axes"
    if site.opset < 13 and (site.rank is None or axes[0] % site.rank != site.rank - 1):
        return "below opset 13 the operator takes all axes from one on together"
    return None


def _all(*checks: Callable[[Site], str | None]) -> Callable[[Site], str | None]:
    def check(site: Site) -> str | None:
        return next((reason for c in (_common, *checks) if (reason := c(site)) is not None), None)

    return check


# ** what is written **


def _dtype(element: int) -> np.dtype[Any]:
    return onnx.helper.tensor_dtype_to_np_dtype(element)


def _parameter(
    site: Site, rw: Rewriter, role: str, default: float, shape: Sequence[int], element: int
) -> AnyValue:
    """Gamma or beta as a constant of this shape, rounded once."""
    factor = site.norm.gamma if role == "scale" else site.norm.beta
    values = np.full(tuple(shape), default) if factor is None else np.asarray(factor)
    values = _aligned(values, shape)
    return rw.constant(role, rounded(np.ascontiguousarray(values), _dtype(element)))


def _aligned(values: NDArray[np.float64], shape: Sequence[int]) -> NDArray[np.float64]:
    """Factors over the normalized axes in the shape that an operator wants them in."""
    if values.size == int(np.prod(tuple(shape))):
        return values.reshape(tuple(shape))
    kept = [n for n in values.shape if n > 1]
    if values.ndim > len(shape) and kept == list(values.shape[-len(kept) :] if kept else []):
        values = values.reshape(values.shape[-len(shape) :])
    return np.broadcast_to(values, tuple(shape))


def _widened(site: Site, rw: Rewriter) -> AnyValue:
    """The input in the type to compute in."""
    if site.given == site.wide:
        return site.norm.input
    return rw.add("Cast", [site.norm.input], "wide", attrs={"to": site.wide})


class _Last:
    """Names nodes so that the last one, a Cast back where one is needed, keeps the output."""

    def __init__(self, site: Site, rw: Rewriter) -> None:
        self._site = site
        self._rw = rw

    def __call__(
        self, op: str, inputs: Sequence[AnyValue | None], attrs: dict[str, Any] | None = None
    ) -> None:
        if self._site.wide == self._site.wanted:
            self._rw.replace(op, inputs, attrs=attrs)
        else:
            made = self._rw.add(op, inputs, "normalized", attrs=attrs)
            self._rw.replace("Cast", [made], attrs={"to": self._site.wanted})


def _epsilon(site: Site) -> float:
    return float(site.norm.epsilon or 0.0)


def _emit_layer_norm(site: Site, rw: Rewriter) -> None:
    features = site.features or ()
    inputs = [_widened(site, rw), _parameter(site, rw, "scale", 1.0, features, site.wide)]
    if site.norm.beta is not None:
        inputs.append(_parameter(site, rw, "bias", 0.0, features, site.wide))
    attrs = {"axis": -len(features), "epsilon": _epsilon(site)}
    _Last(site, rw)("LayerNormalization", inputs, attrs)


def _emit_rms(op: str) -> Emit:
    def emit(site: Site, rw: Rewriter) -> None:
        features = site.features or ()
        inputs = [_widened(site, rw), _parameter(site, rw, "scale", 1.0, features, site.wide)]
        attrs = {"axis": -len(features), "epsilon": _epsilon(site)}
        if site.norm.beta is None:
            _Last(site, rw)(op, inputs, attrs)
        else:
            made = rw.add(op, inputs, "scaled", attrs=attrs)
            bias = _parameter(site, rw, "bias", 0.0, features, site.wide)
            _Last(site, rw)("Add", [made, bias])

    return emit


def _emit_transposed(op: str) -> Emit:
    """Transpose, the operator over the last axis, Transpose."""

    def emit(site: Site, rw: Rewriter) -> None:
        rank, (axis,) = site.rank or 0, site.norm.axes or (0,)
        there = [*(a for a in range(rank) if a != axis), axis]
        back = [there.index(a) for a in range(rank)]
        features = site.features or ()
        moved = rw.add("Transpose", [_widened(site, rw)], "moved", attrs={"perm": there})
        inputs: list[AnyValue | None] = [
            moved,
            _parameter(site, rw, "scale", 1.0, features, site.wide),
        ]
        if site.norm.beta is not None and op == "LayerNormalization":
            inputs.append(_parameter(site, rw, "bias", 0.0, features, site.wide))
        attrs = {"axis": -1, "epsilon": _epsilon(site)}
        normed = rw.add(op, inputs, "normalized", attrs=attrs)
        if site.norm.beta is not None and op != "LayerNormalization":
            bias = _parameter(site, rw, "bias", 0.0, features, site.wide)
            normed = rw.add("Add", [normed, bias], "shifted")
        _Last(site, rw)("Transpose", [normed], {"perm": back})

    return emit


def _emit_chain(site: Site, rw: Rewriter) -> None:
    """The primitives that onnxruntime fuses: ReduceMean Sub Pow ReduceMean Add Sqrt Div Mul Add."""
    features = site.features or ()
    # Primitives round to the type they are in, so the statistics of a narrow one are in float32.
    narrow = site.wide in NARROW
    work = _FLOAT if narrow else site.wide
    x: AnyValue = site.norm.input
    if site.given != work:
        x = rw.add("Cast", [x], "wide", attrs={"to": work})
    if site.norm.kind == "layer_norm":
        x = rw.add("Sub", [x, mean_of(rw, x, [-1], "mean")], "centred")
    dtype = _dtype(work)
    square = rw.add("Pow", [x, rw.constant("two", np.asarray(2, dtype=dtype))], "square")
    mean = mean_of(rw, square, [-1], "variance")
    small = rw.constant("epsilon", np.asarray(_epsilon(site), dtype=dtype))
    root = rw.add("Sqrt", [rw.add("Add", [mean, small], "shifted")], "deviation")
    normed = rw.add("Div", [x, root], "normalized")
    if narrow:
        normed = rw.add("Cast", [normed], "narrow", attrs={"to": site.wide})
    scale = _parameter(site, rw, "scale", 1.0, features, site.wide)
    if site.norm.kind == "rms_norm" and site.norm.beta is None:
        _Last(site, rw)("Mul", [normed, scale])
        return
    scaled = rw.add("Mul", [normed, scale], "scaled")
    bias = _parameter(site, rw, "bias", 0.0, features, site.wide)
    _Last(site, rw)("Add", [scaled, bias])


def _emit_instance_norm(site: Site, rw: Rewriter) -> None:
    channels = (site.channels or 0,)
    inputs = [
        site.norm.input,
        _parameter(site, rw, "scale", 1.0, channels, _FLOAT),
        _parameter(site, rw, "bias", 0.0, channels, _FLOAT),
    ]
    rw.replace("InstanceNormalization", inputs, attrs={"epsilon": _epsilon(site)})


def _emit_group_norm(site: Site, rw: Rewriter) -> None:
    """Reshape to groups, InstanceNormalization, Reshape back, Mul, Add."""
    groups, x = site.norm.groups, site.norm.input
    shape = rw.constant("groups", np.asarray([0, groups, -1], dtype=np.int64))
    grouped = rw.add("Reshape", [x, shape], "grouped")
    ones = rw.constant("ones", np.ones(groups, dtype=np.float32))
    zeros = rw.constant("zeros", np.zeros(groups, dtype=np.float32))
    normed = rw.add(
        "InstanceNormalization",
        [grouped, ones, zeros],
        "normalized",
        attrs={"epsilon": _epsilon(site)},
    )
    back = [normed, rw.add("Shape", [x], "shape")]
    factors = [
        (op, role, factor)
        for op, role, factor in (("Mul", "scale", site.norm.gamma), ("Add", "bias", site.norm.beta))
        if factor is not None
    ]
    if not factors:
        rw.replace("Reshape", back)
        return
    made: AnyValue = rw.add("Reshape", back, "ungrouped")
    per_channel = (site.channels or 0, *(1,) * ((site.rank or 2) - 2))
    for place, (op, role, _) in enumerate(factors):
        factor = _parameter(site, rw, role, 0.0, per_channel, _FLOAT)
        if place == len(factors) - 1:
            rw.replace(op, [made, factor])
        else:
            made = rw.add(op, [made, factor], f"{role}d")


def _emit_softmax(op: str) -> Emit:
    def emit(site: Site, rw: Rewriter) -> None:
        _Last(site, rw)(op, [_widened(site, rw)], {"axis": (site.norm.axes or (-1,))[0]})

    return emit


# The first row whose conditions hold is taken.
_TABLE: Final[tuple[Spelling, ...]] = (
    Spelling(
        "LayerNormalization",
        ("layer_norm",),
        _all(_standard(17), _trailing),
        _emit_layer_norm,
        _never,
    ),
    Spelling(
        "LayerNormalization between Transposes",
        ("layer_norm",),
        _all(_standard(17), _one_axis),
        _emit_transposed("LayerNormalization"),
        _never,
    ),
    Spelling(
        "the chain that onnxruntime fuses to LayerNormalization",
        ("layer_norm",),
        _all(_trailing, _fused),
        _emit_chain,
        _is_chain,
    ),
    Spelling(
        "RMSNormalization",
        ("rms_norm",),
        _all(_for("onnx"), _standard(23), _trailing),
        _emit_rms("RMSNormalization"),
        _never,
    ),
    Spelling(
        "SimplifiedLayerNormalization",
        ("rms_norm",),
        _all(_for("ort-cpu", "ort-cuda"), _trailing),
        _emit_rms("SimplifiedLayerNormalization"),
        _never,
    ),
    Spelling(
        "RMSNormalization between Transposes",
        ("rms_norm",),
        _all(_for("onnx"), _standard(23), _one_axis),
        _emit_transposed("RMSNormalization"),
        _never,
    ),
    Spelling(
        "SimplifiedLayerNormalization between Transposes",
        ("rms_norm",),
        _all(_for("ort-cpu", "ort-cuda"), _one_axis),
        _emit_transposed("SimplifiedLayerNormalization"),
        _never,
    ),
    Spelling(
        "the chain that onnxruntime fuses to an RMS norm",
        ("rms_norm",),
        _all(_trailing, _fused, _plain),
        _emit_chain,
        _is_chain,
    ),
    Spelling(
        "InstanceNormalization",
        ("instance_norm",),
        _all(_float_channels),
        _emit_instance_norm,
        _never,
    ),
    Spelling(
        "InstanceNormalization between Reshapes",
        ("group_norm",),
        _all(_float_channels),
        _emit_group_norm,
        _is_grouped,
    ),
    Spelling("Softmax", ("softmax",), _all(_softmax_axis), _emit_softmax("Softmax"), _never),
    Spelling(
        "LogSoftmax",
        ("log_softmax",),
        _all(_softmax_axis),
        _emit_softmax("LogSoftmax"),
        _never,
    ),
)
