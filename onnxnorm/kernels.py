"""Whether a norm can become a call of an operator of our own, and what is in the way.

The passes `lower-softmax`, `lower-channel-norm` and `lower-group-norm` ask here. They are opt-in: a
model for plain `onnx` never gets a call. The operators are those of `onnxnorm.ops.bodies`, and
`onnxnorm.ops.costs` says where they pay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Module, Node
from onnxnorm.norms import Norm, find_norms
from onnxnorm.ops import bodies
from onnxnorm.reference import confirm
from onnxnorm.rewrite import Pass, Plan, Refusal
from onnxnorm.site import Site


@dataclass(frozen=True)
class KernelPass(Pass):
    """A pass that writes calls of our operators.

    Attributes:
        target: `onnx`, `ort-cpu` or `ort-cuda`; given by --target.
        ops: Whether calls are wanted; given by --ops.
        cuda_kernels: Whether they are wanted for `ort-cuda` too; given by --cuda-kernels.
    """

    target: str = "onnx"
    ops: bool = False
    cuda_kernels: bool = False

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every norm of the pass's kinds, where calls are wanted."""
        cuda = self.target == "ort-cuda" and self.cuda_kernels
        if not self.ops or not (cuda or self.target == "ort-cpu"):
            return
        for norm in find_norms(facts):
            if norm.recognised and not norm.obstacle and norm.node.domain != bodies.DOMAIN:
                decided = self.decide(norm, Site.of(norm, facts, self.target), facts)
                if isinstance(decided, str):
                    yield Refusal(decided, norm.node.label, node=norm.node, kept=True)
                elif isinstance(decided, Plan):
                    yield _confirmed(decided, norm, facts, cuda=cuda)

    @abstractmethod
    def decide(self, norm: Norm, site: Site, facts: Facts) -> Plan | str | None:
        """A plan for a norm, why there is none, or None where the norm is none of this pass's."""


def _confirmed(plan: Plan, norm: Norm, facts: Facts, *, cuda: bool) -> Plan | Refusal:
    """The plan, if the norm's nodes compute it on random inputs and the model can have the call."""
    reason = lack(plan.into, norm.node, facts.module, cuda=cuda)
    untried = None if reason is not None or norm.operator else confirm(norm, facts)
    if untried is not None:
        reason = f"it could not be confirmed on random inputs: {untried}"
    if reason is None:
        return plan
    return Refusal(reason, norm.node.label, node=norm.node)


def lack(name: str, node: Node, module: Module, *, cuda: bool = False) -> str | None:
    """Why the operator `name` cannot be called in a node's place; None where it can.

    With `cuda` the kernels in question are those for GPUs.
    """
    from onnxnorm.ops import library  # most runs want no calls, and need not know of compilers

    there = library.describe_cuda() if cuda else library.describe()
    if there.path is None or name not in there.operators:
        missing = "; ".join(there.missing) or f"it has no kernel for {name}"
        return f"the operator library is not there: {missing}"
    scope = node.scope.outermost
    if scope.is_function:
        return "it stands in a model-local function, which may not call another one of ours"
    version, opset = module.proto.ir_version, scope.opsets[""]
    if version < bodies.IR_VERSION:
        return f"functions came with IR version {bodies.IR_VERSION}, and the model has {version}"
    if opset < bodies.OPERATORS[name].opset:
        return f"its body needs opset {bodies.OPERATORS[name].opset}, and the model has {opset}"
    if scope.opsets.get(bodies.DOMAIN, bodies.VERSION) != bodies.VERSION:
        return f"the model imports version {scope.opsets[bodies.DOMAIN]} of our domain"
    known = module.carried(name)
    if known is not None and not _is_same(known, bodies.function(name, opset)):
        return f"the model has another function {bodies.DOMAIN}.{name}"
    return None


def _is_same(one: onnx.FunctionProto, other: onnx.FunctionProto) -> bool:
    """Whether two functions are the same but for what is said about them."""

    def core(function: onnx.FunctionProto) -> tuple[Any, ...]:
        nodes = [node.SerializeToString(deterministic=True) for node in function.node]
        imports = sorted((o.domain, o.version) for o in function.opset_import)
        names = (list(function.input), list(function.output), sorted(function.attribute))
        return (names, nodes, imports)

    return core(one) == core(other)


def not_float32(site: Site) -> str | None:
    """Why the types rule a kernel out; None where they do not."""
    if site.given == site.wanted == onnx.TensorProto.FLOAT:
        return None
    return "our kernels were measured in float32 only"


def only_read_by(value: AnyValue, nodes: Sequence[Node], facts: Facts) -> bool:
    """Whether nobody but these nodes needs a value."""
    if facts.pinned(value) is not None:
        return False
    return all(use.node in nodes for use in facts.uses(value))


def factor(value: NDArray[np.float64] | AnyValue | None, facts: Facts) -> Any:
    """A factor of a norm as an array in float64; None for none, NotImplemented at run time."""
    if value is None or isinstance(value, np.ndarray):
        return value
    known = facts.constant(value)
    return NotImplemented if known is None else known.float64()
