"""How each form of a norm is written: one function for each, which stages the nodes.

    LayerNormalization(x, scale, bias)        SimplifiedLayerNormalization(x, scale)
    Transpose, the operator over the last axis, Transpose
    ReduceMean Sub Pow ReduceMean Add Sqrt Div Mul Add: the chain that onnxruntime fuses
    Reshape, InstanceNormalization, Reshape, Mul, Add

Which form is right for which norm is the table of `onnxnorm.lowering`; a function here is called
only where its row holds. Constants are formed in float64 and rounded once. Source: the operator
specification of ONNX; onnxruntime's LayerNormFusion and SimplifiedLayerNormFusion for the chains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue
from onnxnorm.forms import NARROW, mean_of
from onnxnorm.port import rounded
from onnxnorm.rewrite import Rewriter
from onnxnorm.site import Site

Emit: TypeAlias = "Callable[[Site, Rewriter], None]"

_FLOAT: Final = onnx.TensorProto.FLOAT


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


def emit_layer_norm(site: Site, rw: Rewriter) -> None:
    """The operator LayerNormalization over the last axes."""
    features = site.features or ()
    inputs = [_widened(site, rw), _parameter(site, rw, "scale", 1.0, features, site.wide)]
    if site.norm.beta is not None:
        inputs.append(_parameter(site, rw, "bias", 0.0, features, site.wide))
    attrs = {"axis": -len(features), "epsilon": _epsilon(site)}
    _Last(site, rw)("LayerNormalization", inputs, attrs)


def emit_rms(op: str) -> Emit:
    """An operator of an RMS norm over the last axes, and an Add where there is a shift."""

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


def emit_transposed(op: str) -> Emit:
    """Transpose, the operator over the last axis, Transpose."""

    def emit(site: Site, rw: Rewriter) -> None:
        rank, (axis,) = site.rank or 1, site.norm.axes or (0,)
        axis %= rank
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


def emit_chain(site: Site, rw: Rewriter) -> None:
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


def emit_instance_norm(site: Site, rw: Rewriter) -> None:
    """The operator InstanceNormalization."""
    channels = (site.channels or 0,)
    inputs = [
        site.norm.input,
        _parameter(site, rw, "scale", 1.0, channels, _FLOAT),
        _parameter(site, rw, "bias", 0.0, channels, _FLOAT),
    ]
    rw.replace("InstanceNormalization", inputs, attrs={"epsilon": _epsilon(site)})


def emit_group_norm(site: Site, rw: Rewriter) -> None:
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


def emit_softmax(op: str) -> Emit:
    """Softmax or LogSoftmax over one axis."""

    def emit(site: Site, rw: Rewriter) -> None:
        _Last(site, rw)(op, [_widened(site, rw)], {"axis": (site.norm.axes or (-1,))[0]})

    return emit
