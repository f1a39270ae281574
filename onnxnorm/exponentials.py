"""What softmax and log-softmax are made of when no operator says so.

    softmax      exp(x) / sum exp(x),    exp(x - max x) / sum exp(x - max x),   and Reciprocal, Mul
    log-softmax  log(softmax(x)),  x - logsumexp(x),  (x - max x) - log sum exp(x - max x)

Every node has one rule, as in `moments.py`; the axes and the tensor that the exponentials are of
are part of what is known, so a sum over another axis or of another tensor does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from onnxnorm.facts import AnyValue
from onnxnorm.layout import Dims
from onnxnorm.module import Node
from onnxnorm.moment_rules import Moments
from onnxnorm.norm_operators import Axes, norm_operator

_SOFT: Final = ("softmax", "log_softmax")
# What these make of a sum of exponentials, or of exponentials, is neither.
_CHANGES: Final = frozenset({"Add", "Clip", "Max", "Min", "Mul", "Pow", "Sqrt", "Sub", "Where"})
_LOWEST: Final = -1e30  # what is below stands for -inf


@dataclass(frozen=True)
class Part:
    """What a value is on the way to a softmax.

    Attributes:
        what: `maximum` of x; `shifted`, x minus it; `exponential`; `total` of exponentials, and
            its `inverse`; `logarithm` of the total; `logsumexp`; `softmax`; `log_softmax`.
        base: The tensor x.
        axes: What it was reduced over; for shifted values and exponentials of them what the
            maximum was over, and None where there is none.
        stable: Whether a maximum was subtracted before exp.
        dropped: The reduced dims are gone.
        of: For an exponential, its argument, which can be read as x itself.
        flaw: Why what is made of it is no softmax, and the node where that is.
    """

    what: str
    base: AnyValue
    axes: tuple[int, ...] | None
    stable: bool = False
    dropped: bool = False
    of: AnyValue | None = None
    flaw: tuple[str, Node] | None = None


@dataclass
class Exponentials:
    """The parts of softmaxes in one scope. `visit` every node, in order, after `moments` has.

    Attributes:
        moments: Knows copies, axes and ranks.
        misses: Values where exponentials meet sums that are not theirs: kind, base, axes,
            reason, and the node where it is.
    """

    moments: Moments
    misses: dict[AnyValue, tuple[str, AnyValue, Axes, str, Node]] = field(default_factory=dict)
    _parts: dict[AnyValue, Part] = field(default_factory=dict)

    def part(self, value: AnyValue) -> Part | None:
        """What a value is, through copies of it."""
        return self._parts.get(self.moments.source(value))

    def normal(self, value: AnyValue) -> Part | None:
        """The softmax or log-softmax that a value is; None where it is none."""
        part = self._parts.get(value)
        return part if part is not None and part.what in _SOFT else None

    def visit(self, node: Node) -> None:
        """Find out what `node` computes."""
        rule = _RULES.get(node.op)
        if node.domain or not node.inputs or not node.outputs or not node.outputs[0].name:
            return
        made = rule(self, node) if rule is not None else None
        if made is None and node.op in _CHANGES and node.outputs[0] not in self.misses:
            made = self._changed(node)
        if made is not None:
            self._parts[node.outputs[0]] = made

    def _changed(self, node: Node) -> Part | None:
        """A sum, or exponentials, of which a node makes what no softmax has."""
        for index, value in enumerate(node.inputs):
            part = self.part(value)
            if part is None or part.what not in ("exponential", "total", "inverse"):
                continue
            whole = part.what == "exponential"
            if whole and (
                node.op != "Mul" or any(self._parts.get(v) for v in node.inputs if v is not value)
            ):
                continue
            noun = "the exponentials" if whole else "the sum of exponentials"
            if node.op in ("Add", "Sub"):
                reason = f"something is added to {noun}"
            elif whole:
                reason = f"{noun} are weighted by '{node.inputs[1 - index].name}'"
            else:
                reason = f"{node.op} changes {noun}"
            return replace(part, flaw=part.flaw or (reason, node))
        return None

    # ** rules **

    def _maximum(self, node: Node) -> Part | None:
        return self._over(node, "maximum", self.moments.source(node.inputs[0]))

    def _logsumexp(self, node: Node) -> Part | None:
        return self._over(node, "logsumexp", self.moments.source(node.inputs[0]), stable=True)

    def _over(self, node: Node, what: str, base: AnyValue, *, stable: bool = False) -> Part | None:
        axes = (
            self.moments.reduced_axes(node) if len(node.inputs) < 2 or node.op != "Einsum" else None
        )
        axes = None if axes is None else self.moments.axes(base, axes) or axes
        dropped = not self.moments.keeps_dims(node)
        return None if axes is None else Part(what, base, axes, stable, dropped)

    def _exp(self, node: Node) -> Part:
        given = self.moments.source(node.inputs[0])
        part = self._parts.get(given)
        if part is not None and part.what == "shifted":
            return Part("exponential", part.base, part.axes, stable=True, of=given)
        if part is not None and part.what == "log_softmax":
            return replace(part, what="softmax")
        return Part("exponential", given, None, of=given)

    def _total(self, node: Node) -> Part | None:
        part = self.part(node.inputs[0])
        if part is None or part.what != "exponential" or part.of is None:
            return None
        made = self._over(node, "total", part.base, stable=part.stable)
        if made is None:
            return None
        flaw = part.flaw
        if node.op == "ReduceMean":
            flaw = flaw or ("the exponentials are averaged, where a softmax sums them", node)
        if flaw or part.axes in (None, made.axes):
            return replace(made, flaw=flaw)
        # The maximum was over other axes: what was shifted is itself the tensor.
        return replace(made, base=part.of, stable=False)

    def _log_total(self, node: Node) -> Part | None:
        made = self._total(node)
        return None if made is None else replace(made, what="logarithm")

    def _log(self, node: Node) -> Part | None:
        part = self.part(node.inputs[0])
        if part is not None and part.what == "total":
            return replace(part, what="logarithm")
        if part is not None and part.what == "softmax":
            return replace(part, what="log_softmax")
        return None

    def _operator(self, node: Node) -> Part | None:
        """An operator, for the Log behind Softmax or the Exp behind LogSoftmax."""
        known = norm_operator(node, self.moments.rank(node.inputs[0]))
        if known is None or known.axes is None:
            return None
        return Part(known.kind, self.moments.source(node.inputs[0]), known.axes, stable=True)

    def _reciprocal(self, node: Node) -> Part | None:
        part = self.part(node.inputs[0])
        if node.op == "Pow" and self.moments.statics.scalar(node.inputs[1]) != -1:
            return None
        if part is not None and part.what == "total":
            return replace(part, what="inverse")
        return None

    def _divide(self, node: Node) -> Part | None:
        one, other = (self.part(v) for v in node.inputs)
        if other is not None and other.what == "total":
            if self.moments.statics.scalar(node.inputs[0]) == 1:
                return replace(other, what="inverse")
            return self._quotient(node, one, other)
        return None

    def _multiply(self, node: Node) -> Part | None:
        parts = [self.part(v) for v in node.inputs]
        for one, other in (parts, parts[::-1]):
            if other is not None and other.what == "inverse":
                return self._quotient(node, one, other)
        return None

    def _quotient(self, node: Node, one: Part | None, total: Part) -> Part | None:
        if one is None or one.what != "exponential":
            return None
        flaw = total.flaw or one.flaw
        if total.dropped and not flaw:
            flaw = ("the sum has lost its axis and broadcasts along another one", node)
        if flaw:
            self.misses[node.outputs[0]] = ("softmax", one.base, total.axes, *flaw)
            return None
        same = one.base is total.base and one.axes in (None, total.axes)
        if same and one.stable == total.stable:
            return Part("softmax", total.base, total.axes, total.stable)
        if one.of is total.base and not total.stable:  # over other axes than the maximum
            return Part("softmax", total.base, total.axes)
        if one.of is not None and self._kin(one, total):
            reason = f"the sum is of exponentials of '{total.base.name}', another value"
            self.misses[node.outputs[0]] = ("softmax", one.base, total.axes, reason, node)
        return None

    def _kin(self, one: Part, total: Part) -> bool:
        """Whether two values have one shape, as those of a softmax that was meant have."""
        first = self.moments.facts.type(one.base)
        second = self.moments.facts.type(total.base)
        if first is None or second is None or first.shape is None or second.shape is None:
            return True
        return len(first.shape) == len(second.shape)

    def _subtract(self, node: Node) -> Part | None:
        left, right = (self.moments.source(v) for v in node.inputs)
        one, other = self._parts.get(left), self._parts.get(right)
        if other is None or other.dropped:
            return None
        if other.what == "maximum" and other.base is left:
            return Part("shifted", left, other.axes)
        if other.what == "logsumexp" and other.base is left:
            return Part("log_softmax", left, other.axes, other.stable)
        if other.flaw is not None:
            kin = one is not None and one.what == "shifted" and one.base is other.base
            if other.what in ("logarithm", "logsumexp") and (kin or other.base is left):
                self.misses[node.outputs[0]] = ("log_softmax", other.base, other.axes, *other.flaw)
            return None
        if other.what == "logarithm":
            if one is not None and one.what == "shifted" and other.stable:
                if one.base is other.base and one.axes == other.axes:
                    return Part("log_softmax", one.base, one.axes, stable=True)
            elif other.base is left and not other.stable:
                return Part("log_softmax", left, other.axes)
            base = one.base if one is not None else left
            reason = "the logarithm is not of the sum of exponentials of what it is taken from"
            if self._kin(Part("shifted", base, None), other):
                self.misses[node.outputs[0]] = ("log_softmax", base, other.axes, reason, node)
        return None

    def _add(self, node: Node) -> Part | None:
        """Log sum exp(x - max x) + max x."""
        parts = [self.part(v) for v in node.inputs]
        for one, other in (parts, parts[::-1]):
            if one is None or other is None:
                continue
            same = (one.base, one.axes, one.dropped) == (other.base, other.axes, other.dropped)
            if one.what == "logarithm" and one.stable and other.what == "maximum" and same:
                return replace(one, what="logsumexp")
        return None

    def _clamped(self, node: Node) -> Part | None:
        """max(x, -inf), which JAX writes so that an empty row has a maximum; max of one value."""
        if len(node.inputs) != 2:
            part = self.part(node.inputs[0]) if len(node.inputs) == 1 else None
            return part if part is not None and part.what == "maximum" else None
        for value, other in (node.inputs, node.inputs[::-1]):
            part = self.part(value)
            bound = self.moments.statics.scalar(other)
            if part is not None and part.what == "maximum" and bound is not None:
                return part if bound < _LOWEST else None
        return None

    def _moved(self, node: Node) -> Part | None:
        """Reshape to the input's shape with the reduced dims at 1; Expand of that."""
        part = self.part(node.inputs[0])
        shape = self.moments.statics.shape_of(part.base) if part is not None else None
        after = self.moments.statics.shape_of(node.outputs[0])
        if part is None or part.axes is None:
            return None
        if shape is not None:
            reduced = tuple(1 if axis in part.axes else dim for axis, dim in enumerate(shape))
            fitting = (reduced,) if node.op == "Reshape" else (reduced, shape)
            if after in fitting and not (part.dropped and node.op != "Reshape"):
                return replace(part, dropped=False)
        known = "a shape that is not known" if after is None else f"the shape {_listed(after)}"
        return self._spoilt(
            node, part, f"the sum is given {known}, which need not be that of its input"
        )

    def _unsqueeze(self, node: Node) -> Part | None:
        part = self.part(node.inputs[0])
        if part is None or part.axes is None or part.dropped != (node.op == "Unsqueeze"):
            return None
        given = node.attrs.get("axes")
        if len(node.inputs) > 1:
            given = self.moments.statics.integers(node.inputs[1])
        rank = self.moments.rank(part.base)
        if given is not None:
            axes = tuple(sorted(a % rank for a in given)) if rank else tuple(given)
            if axes == part.axes:
                return replace(part, dropped=not part.dropped)
        return self._spoilt(node, part, "the axis of the sum comes back in another place")

    def _spoilt(self, node: Node, part: Part, reason: str) -> Part | None:
        """A sum that does not lie as its exponentials do: what it divides is no softmax."""
        if part.what in ("total", "inverse"):
            return replace(part, dropped=False, flaw=part.flaw or (reason, node))
        return None


def _listed(dims: Dims) -> str:
    return f"[{', '.join('?' if str(d).startswith('?') else str(d) for d in dims)}]"


_RULES: Final[Mapping[str, Callable[[Exponentials, Node], Any]]] = {
    "Add": Exponentials._add,
    "Div": Exponentials._divide,
    "Einsum": Exponentials._total,
    "Exp": Exponentials._exp,
    "Expand": Exponentials._moved,
    "Log": Exponentials._log,
    "LogSoftmax": Exponentials._operator,
    "Max": Exponentials._clamped,
    "Mul": Exponentials._multiply,
    "Pow": Exponentials._reciprocal,
    "Reciprocal": Exponentials._reciprocal,
    "ReduceLogSum": Exponentials._log_total,
    "ReduceLogSumExp": Exponentials._logsumexp,
    "ReduceMax": Exponentials._maximum,
    "ReduceMean": Exponentials._total,
    "ReduceSum": Exponentials._total,
    "Reshape": Exponentials._moved,
    "Softmax": Exponentials._operator,
    "Squeeze": Exponentials._unsqueeze,
    "Sub": Exponentials._subtract,
    "Tile": Exponentials._moved,
    "Unsqueeze": Exponentials._unsqueeze,
}
