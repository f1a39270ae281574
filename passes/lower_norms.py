"""Write every recognised norm in the cheapest form that its target has for it.

    ReduceMean Sub Pow ReduceMean Add Sqrt Div Mul Add  ->  LayerNormalization        and so on

The forms and their conditions are the table of `onnxnorm.lowering`. Exact over the reals: the
nodes of a norm are replaced by others that compute the same canonical norm, and before that is
planned they are run against it on random inputs in float64 (`onnxnorm.reference`). A norm for
which the table has nothing cheaper keeps the nodes it has.

A near miss that onnxruntime would fuse as if it were a norm is written so that it is left alone:

    Div(d, Sqrt(v))  ->  Mul(d, Reciprocal(Sqrt(v)))

Source: the operator specification of ONNX; onnxruntime's LayerNormFusion and
SimplifiedLayerNormFusion, which know the Div form only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from onnxnorm.facts import Facts
from onnxnorm.given import centred_here
from onnxnorm.lowering import OLDEST_RUNTIME, Choices, choose, version
from onnxnorm.module import Node
from onnxnorm.norms import Norm, find_norms
from onnxnorm.reference import confirm
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter, place_of
from onnxnorm.runtime_fusions import misfused


@dataclass(frozen=True)
class LowerNorms(Pass):
    """Write norms as operators of the target, and near misses so that the runtime leaves them.

    Attributes:
        target: `onnx`, `ort-cpu` or `ort-cuda`; given by --target.
        runtime: The onnxruntime that the model is for; given by --runtime-version.
        choices: Place of a norm and the form it is to have, for those that --tune measured.
    """

    target: str = "onnx"
    runtime: str = OLDEST_RUNTIME
    choices: Choices = ()

    name: ClassVar = "lower-norms"
    summary: ClassVar = "norms written out in primitives become the operators of the target"
    equation: ClassVar = "(x - E[x]) / sqrt(Var[x] + eps) * g + b -> LayerNormalization(x, g, b)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        for norm in find_norms(facts):
            guard = misfused(norm.nodes, facts) if norm.warning else None
            if norm.recognised and not norm.operator:
                decided = self._lowered(norm, facts)
                if decided is not None and (isinstance(decided, Plan) or guard is None):
                    yield decided
                    continue
            if guard is not None:
                into = "Mul and Reciprocal"
                yield Plan(guard.node, (guard.node,), guard.node, action="lowered", into=into)

    def _lowered(self, norm: Norm, facts: Facts) -> Plan | Refusal | None:
        if norm.kind in ("channel_affine", "batch_norm", "weight_standardization", "evo_norm"):
            return None  # other passes are for them
        if centred_here(norm) is not None:
            reason = "streams have put a centering in front of it, and what follows is an RMS norm"
            return Refusal(reason, norm.node.label, node=norm.node, kept=True)
        if norm.obstacle:
            at = norm.obstacle_at.label if norm.obstacle_at is not None else ""
            advice = "Leave that value out of what reads it, and the norm becomes one operator."
            return Refusal(norm.obstacle, at, advice, norm.node)
        wanted = dict(self.choices).get(place_of(norm.output))
        chosen = choose(norm, facts, self.target, version(self.runtime), wanted)
        if isinstance(chosen, str):
            return Refusal(chosen, norm.node.label, node=norm.node, kept=True)
        untried = confirm(norm, facts)
        if untried is not None:
            reason = f"it could not be confirmed on random inputs: {untried}"
            return Refusal(reason, norm.node.label, node=norm.node)
        return Plan(norm.node, norm.nodes, chosen, action="lowered", into=chosen[0].name)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        if isinstance(plan.detail, Node):
            divided, root = plan.detail.inputs
            inverse = rw.add("Reciprocal", [root], "inverse")
            rw.replace("Mul", [divided, inverse])
            return
        spelling, site = plan.detail
        spelling.emit(site, rw)
