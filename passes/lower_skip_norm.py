"""Take the residual Add in front of a norm into onnxruntime's operator for both.

    s = a + b, y = LayerNormalization(s, g, c)
        ->  y, s = SkipLayerNormalization(a, b, g, c)
    s = a + b, y = SimplifiedLayerNormalization(s, g)
        ->  y, s = SkipSimplifiedLayerNormalization(a, b, g)

The operator gives the sum as its fourth output, so s may have any number of readers; onnxruntime
itself does this only where s has one, and never for an RMS norm. The same function over the reals
and the same additions. For the target `ort-cuda` alone: on the CPU the fused kernels lose, and on
CUDA nothing was measured yet (`onnxnorm.lowering.RESIDUAL`).

The operator takes two or three dims. Where the Add has more, or a Reshape stands between it and the
norm, the Reshape is moved only if no more of them are left than before:

    Reshape(a + b, t) -> norm, others    with a = Reshape(a')    ->  Skip(a', Reshape(b, t))
    norm(Reshape(a + b, t))                                      ->  Reshape(Skip(a, b), t)

Sizes have to be known to be equal, or one operand to be repeated over the batch of the other. The
bias of a linear operator in front goes along where a LayerNormalization follows; never into
SkipSimplifiedLayerNormalization, whose CPU kernel forgot it in onnxruntime 1.16 to 1.19.

Source: the contributed operators of onnxruntime; its SkipLayerNormFusion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import onnx

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.lowering import OLDEST_RUNTIME, residual, version
from onnxnorm.module import Node, Value
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import Sizes, find_sizes

DOMAIN: Final = "com.microsoft"
_NORMS: Final = {
    "LayerNormalization": ("layer_norm", 1e-5),
    "RMSNormalization": ("rms_norm", 1e-5),
    "SimplifiedLayerNormalization": ("rms_norm", 1e-5),
}
_TYPES: Final = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
_RANKS: Final = (2, 3)
_BATCHES: Final = "Export it with one name for the batch, or with fixed sizes."


@dataclass(frozen=True)
class _Fusion:
    """One Add and one norm.

    Attributes:
        op: The operator that does both.
        norm: The norm.
        add: The Add.
        reshape: What stands between them, if anything.
        inputs: The operands of the Add, the larger one first.
        flat: For each operand, whether it goes through a Reshape of its own to the norm's shape.
        bias: A vector that is added to the first operand by a node of its own, with that node.
        early: Whether the operator computes in the shape behind the Reshape.
    """

    op: str
    norm: Node
    add: Node
    reshape: Node | None
    inputs: tuple[AnyValue, AnyValue]
    flat: tuple[bool, bool] = (False, False)
    bias: tuple[AnyValue, Node] | None = None
    early: bool = False

    @property
    def total(self) -> Value:
        """The sum as the operator gives it."""
        last = self.reshape if self.early and self.reshape is not None else self.add
        value: Value = last.outputs[0]
        return value

    def is_read(self, facts: Facts) -> bool:
        """Whether anybody but the norm, or the Reshape that goes with it, needs the sum."""
        if facts.pinned(self.total) is not None:
            return True
        own = (self.norm, self.reshape)
        return any(use.node not in own for use in facts.uses(self.total))

    def plan(self, facts: Facts) -> Plan:
        """The site."""
        nodes = [self.add, self.norm]
        nodes += [self.bias[1]] if self.bias is not None else []
        nodes += [self.reshape] if self.reshape is not None else []
        bypassed = [] if not self.early else [facts.producer(v) for v in self.add.inputs]
        return Plan(
            self.norm,
            tuple(nodes),
            self,
            inside=tuple(n for n in bypassed if n is not None and n.op == "Reshape"),
            outputs=(self.norm.outputs[0], *([self.total] if self.is_read(facts) else [])),
            action="lowered",
            into=self.op,
        )


@dataclass(frozen=True)
class LowerSkipNorm(Pass):
    """Write a residual Add and its norm as one operator of onnxruntime.

    Attributes:
        target: `onnx`, `ort-cpu` or `ort-cuda`; given by --target.
        runtime: The onnxruntime that the model is for; given by --runtime-version.
    """

    target: str = "onnx"
    runtime: str = OLDEST_RUNTIME

    name: ClassVar = "lower-skip-norm"
    summary: ClassVar = "a residual Add and its norm become one operator (--target ort-cuda)"
    equation: ClassVar = "LayerNormalization(a + b) -> SkipLayerNormalization(a, b)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every norm operator behind an Add."""
        if self.target != "ort-cuda":
            return
        for norm in facts.module.nodes():
            if norm.op in _NORMS and not norm.domain and norm.outputs and norm.outputs[0].name:
                found = self._found(norm, facts)
                if isinstance(found, str):
                    yield Refusal(found, norm.label, _advice(found), norm, kept=True)
                elif found is not None:
                    yield found.plan(facts)

    def _found(self, norm: Node, facts: Facts) -> _Fusion | str | None:
        """What is to be done about one norm; why nothing; None where no Add is in front."""
        source, reshape = facts.producer(norm.inputs[0]), None
        if source is not None and source.op == "Reshape" and not source.domain:
            source, reshape = facts.producer(source.inputs[0]), source
        if source is None or source.op != "Add" or source.domain:
            return None
        if source.scope is not norm.scope or (reshape and reshape.scope is not norm.scope):
            return None
        if norm.scope.outermost.is_function:
            return "onnxruntime 1.31.1 dies on its own operators in a model-local function"
        kind, _ = _NORMS[norm.op]
        form = residual(kind, self.target, version(self.runtime))
        if isinstance(form, str):
            return form
        reason = _misfit(norm, source, facts)
        if reason:
            return reason
        return _placed(form.name, norm, source, reshape, facts)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        found: _Fusion = plan.detail
        norm, add, reshape = found.norm, found.add, found.reshape
        operands: list[AnyValue] = []
        for operand, through, role in zip(found.inputs, found.flat, ("input", "skip"), strict=True):
            made = operand
            if through and reshape is not None:
                shape = _at(add, reshape.inputs[1], "shape", rw)
                made = rw.add("Reshape", [operand, shape], role, attrs=_zeros(reshape), at=add)
            operands.append(made)
        factors = [_at(add, v, r, rw) for v, r in zip(norm.inputs[1:], _FACTORS, strict=False)]
        inputs: list[AnyValue | None] = [*operands, *factors]
        if found.bias is not None:
            inputs += [None] * (4 - len(inputs)) + [found.bias[0]]
        attrs = {"epsilon": float(norm.attrs.get("epsilon", _NORMS[norm.op][1]))}
        total = found.total if found.is_read(rw.facts) else None
        result: Value = norm.outputs[0]
        merged, name = [norm], norm.name
        if reshape is not None and found.early:
            merged.append(reshape)
        elif reshape is not None:
            shape = reshape.inputs[1]
            result, merged, name = rw.fresh("normalized", at=add), [], add.name
            rw.replace("Reshape", [result, shape], attrs=_zeros(reshape), at=norm)
        outputs = [result, None, None, total]
        rw.merge(found.op, inputs, outputs, merged, at=add, name=name, domain=DOMAIN, attrs=attrs)


_FACTORS: Final = ("scale", "bias")


def _at(add: Node, value: AnyValue, role: str, rw: Rewriter) -> AnyValue:
    """A value that is there where the Add stands: a constant from behind it is stored anew."""
    if not value.name or _is_before(value, add, rw.facts):
        return value
    known = rw.facts.constant(value)
    assert known is not None, "it was looked at"
    return rw.constant(role, known.array(), at=add)


def _is_before(value: AnyValue, node: Node, facts: Facts) -> bool:
    """Whether a value is there before a node runs."""
    made = facts.producer(value)
    if made is None or made.scope is not node.scope:
        return True
    return facts.positions[made] < facts.positions[node]


def _misfit(norm: Node, add: Node, facts: Facts) -> str:
    """Why the norm is not one that the operator computes; "" where it is."""
    if any(v.name for v in norm.outputs[1:]):
        return "its mean or inverse deviation is read too"
    if norm.attrs.get("stash_type", 1) != 1 or norm.parameter("axis", "epsilon", "stash_type"):
        return "its statistics are not in float32"
    sizes = find_sizes(facts)
    dims = sizes.of(norm.inputs[0])
    if dims is None:
        return "the rank of its input is not known"
    axis = norm.attrs.get("axis", -1)
    if axis % len(dims) != len(dims) - 1:
        return "it is over more than the last axis"
    if not isinstance(dims[-1], int):
        return "the size of the last axis is not known"
    for value in norm.inputs[1:]:
        if value.name and not _is_before(value, add, facts) and facts.constant(value) is None:
            return "its factors are computed behind the Add"
        if value.name and sizes.of(value) != (dims[-1],):
            return "its factors are not vectors over the last axis"
    for value in (*add.inputs, *(v for v in norm.inputs if v.name)):
        known = facts.type(value)
        if known is None or known.element not in _TYPES:
            return "the operator is for float32 and float16, and the type is another or not known"
        if known.element != facts.type(norm.inputs[0]).element:  # type: ignore[union-attr]
            return "its factors have another type than its input"
    return ""


def _placed(op: str, norm: Node, add: Node, reshape: Node | None, facts: Facts) -> _Fusion | str:
    """In which shape the operator computes, and what is reshaped for it."""
    sizes = find_sizes(facts)
    total, normed = sizes.of(add.outputs[0]), sizes.of(norm.inputs[0])
    if total is None or normed is None:
        return "the rank of the sum is not known"
    if total[-1] != normed[-1]:
        return f"the Reshape between them ends in {normed[-1]} features, and the sum in {total[-1]}"
    if len(total) in _RANKS:
        ordered = _operands(add, total, sizes)
        if isinstance(ordered, str):
            return ordered
        if reshape is not None and not _is_alone(reshape, norm, facts):
            return "the Reshape in front of it has other readers, so another one would be needed"
        first, skip = ordered
        bias = _bias(op, first, add, total, facts)
        if bias is None and sizes.of(skip) == total:  # x + f(x) and f(x) + x are the same sum
            bias = _bias(op, skip, add, total, facts)
            first, skip = ordered if bias is None else (skip, first)
        first = first if bias is None else _other(bias, facts)
        return _Fusion(op, norm, add, reshape, (first, skip), bias=bias)
    if reshape is None or len(normed) not in _RANKS:
        return (
            f"the sum has {len(total)} dims and the operator takes 2 or 3: the Reshapes around it"
            " would not cancel"
        )
    if facts.pinned(add.outputs[0]) is not None or len(facts.uses(add.outputs[0])) > 1:
        return f"the sum of {len(total)} dims has other readers than the Reshape in front of it"
    if any(sizes.of(v) != total for v in add.inputs):
        return _UNEQUAL
    target = reshape.inputs[1]
    if not _is_before(target, add, facts) and facts.constant(target) is None:
        return "the shape in front of it is computed behind the Add"
    operands, flat = [], []
    for operand in add.inputs:
        made = facts.producer(operand)
        inner = made.inputs[0] if made is not None and made.op == "Reshape" else None
        same = made is not None and not made.domain and made.scope is norm.scope
        if inner is not None and same and sizes.of(inner) == normed:
            operands.append(inner)
            flat.append(False)
        else:
            operands.append(operand)
            flat.append(True)
    if sum(flat) > 1:
        return (
            f"the sum has {len(total)} dims and the operator takes 2 or 3: two Reshapes would be"
            " needed for the one that goes"
        )
    return _Fusion(
        op, norm, add, reshape, (operands[0], operands[1]), (flat[0], flat[1]), early=True
    )


_UNEQUAL: Final = "the operands of the Add are not known to have the same sizes"


def _operands(add: Node, total: tuple[Any, ...], sizes: Sizes) -> tuple[AnyValue, AnyValue] | str:
    """The operands, the one that has the shape of the sum first."""
    for first, skip in (tuple(add.inputs), tuple(reversed(add.inputs))):
        dims, other = sizes.of(first), sizes.of(skip)
        if dims is None or other is None or dims != total or dims[-1:] != other[-1:]:
            continue
        if other == dims:
            return first, skip
        # The operator repeats a skip over the batch: (1, sequence, d) or (sequence, d).
        if len(dims) == 3 and other in (dims[1:], (1, *dims[1:])):
            return first, skip
    return _UNEQUAL


def _bias(
    op: str, value: AnyValue, add: Node, total: tuple[Any, ...], facts: Facts
) -> tuple[AnyValue, Node] | None:
    """A vector that a node of its own adds to an operand of three dims, for no other reader."""
    made = facts.producer(value)
    if op != "SkipLayerNormalization" or len(total) != 3 or made is None or made.op != "Add":
        return None
    if made.domain or made.scope is not add.scope or facts.pinned(value) is not None:
        return None
    if len(facts.uses(value)) != 1:
        return None
    for vector, other in (tuple(made.inputs), tuple(reversed(made.inputs))):
        known, source = facts.constant(vector), facts.producer(other)
        if known is None or known.shape != (total[-1],) or source is None:
            continue
        if source.op == "MatMul" and find_sizes(facts).of(other) == total:
            return vector, made
    return None


def _other(bias: tuple[AnyValue, Node], facts: Facts) -> AnyValue:
    vector, node = bias
    others: list[AnyValue] = [v for v in node.inputs if v is not vector]
    return others[0]


def _is_alone(reshape: Node, norm: Node, facts: Facts) -> bool:
    """Whether a Reshape is there for the norm alone."""
    value = reshape.outputs[0]
    return facts.pinned(value) is None and all(u.node is norm for u in facts.uses(value))


def _zeros(reshape: Node) -> dict[str, Any]:
    return {"allowzero": 1} if reshape.attrs.get("allowzero") else {}


def _advice(reason: str) -> str:
    return _BATCHES if reason == _UNEQUAL else ""
