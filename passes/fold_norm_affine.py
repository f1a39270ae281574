"""Fold gamma and beta of a norm into the linear operators that read it.

    (gamma * n(x) + beta) W + b  =  n(x) (diag(gamma) W) + (b + beta W)

Exact over the reals. In floating point the weight and the bias are formed in float64 and rounded
once. What is left is a norm with a scale of ones and no bias, which rotations and compressions of
a stream need; by itself it saves nothing on runtimes whose norm kernels take a scale, so it has to
be asked for. Sources: S. Ashkboos et al., "SliceGPT" (2024), section 3.2; the algebra is that of
LayerNormalization and MatMul in the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxnorm.consumers import Consumers, consumers
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.given import GivenNorm, given_norms, per_feature
from onnxnorm.layout import Layout
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.shift import Sinks, sinks
from onnxnorm.stream import Streams, find_streams
from onnxnorm.stream_edit import Edits


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Leave layer norms and RMS norms without an affine where all their readers are linear.

    Attributes:
        max_copy_mb: A weight that others read too is copied up to this size.
    """

    max_copy_mb: int = 32

    name: ClassVar = "fold-norm-affine"
    summary: ClassVar = "gamma and beta of a norm into the linear operators that read it"
    equation: ClassVar = "(gamma n + beta) W + b -> n (diag(gamma) W) + (b + beta W)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every norm with an affine."""
        norms = [n for n in given_norms(facts) if _has_affine(n)]
        if not norms:
            return
        streams = find_streams(facts)
        for norm in norms:
            found = self._found(norm, streams)
            if isinstance(found, Refusal):
                yield found
                continue
            readers, places = found.readers, found.sinks
            nodes = dict.fromkeys(norm.nodes)
            nodes.update((c.inlet.node, None) for c in readers.places)
            nodes.update((s.node, None) for s in places.places)
            results = [s.node.outputs[0] for s in places.places] + list(places.unseen)
            covered = {c.inlet.node for c in readers.places if places.places}
            results += [
                c.inlet.node.outputs[0] for c in readers.places if c.inlet.node not in covered
            ]
            yield Plan(
                norm.node,
                tuple(nodes),
                found,
                inside=(*readers.between, *places.between),
                outputs=tuple(dict.fromkeys(results)),
                local=not places.unseen,
            )

    def _found(self, norm: GivenNorm, streams: Streams) -> Found | Refusal:
        at, facts = norm.node.label, streams.facts
        if not norm.recognised:
            return Refusal(norm.reason, at, node=norm.node)
        layout = streams.layout_of(norm)
        if layout is None:
            return Refusal("the size of the normalized axes is not known", at, node=norm.node)
        readers = consumers(norm.output, layout, streams.transfer)
        if isinstance(readers, str):
            return Refusal(readers, at, node=norm.node)
        if not readers.places:
            return Refusal("nothing reads it", at, node=norm.node)
        places = Sinks()
        if norm.beta is not None and norm.beta.any():
            told = sinks(norm.output, layout, streams.transfer)
            if isinstance(told, str):
                return Refusal(f"beta has no place: {told}", at, node=norm.node)
            places = told
        own: dict[AnyValue, int] = {}
        for reader in readers.places:
            source = reader.inlet.weight.source
            own[source] = own.get(source, 0) + 1
        for reader in readers.places:
            weight = reader.inlet.weight
            size = weight.nbytes / 1e6
            if facts.readers(weight) > own[weight.source] and size > self.max_copy_mb:
                reason = f"weight '{weight.name}' has other readers and a copy takes {size:.0f} MB"
                return Refusal(reason, at, "Raise fold-norm-affine{max_copy_mb=...}.", norm.node)
            scaled = reader.inlet.scaled(reader.factors(per_feature(norm.gamma, layout.features)))
            if not np.isfinite(scaled.astype(np.float64)).all():
                reason = f"'{weight.name}' times gamma is not finite in {weight.dtype}"
                return Refusal(reason, at, node=norm.node)
        return Found(norm, layout, readers, places)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Scale the weights, move beta into the biases, leave the norm with ones."""
        found: Found = plan.detail
        norm, features = found.norm, found.layout.features
        gamma = per_feature(norm.gamma, features)
        dtype = found.readers.places[0].inlet.weight.dtype
        edits = Edits()
        if norm.beta is not None:
            beta = per_feature(norm.beta, features)
            for sink in found.sinks.places:
                edits.shift(sink.node, sink.index, sink.bias, sink.shift(beta), dtype)
        edits.stage(rw)
        made: dict[tuple[AnyValue, Layout], AnyValue] = {}
        for reader in found.readers.places:
            inlet = reader.inlet
            key = (inlet.weight.source, reader.layout)
            if key not in made or inlet.node.scope.is_function:
                name = f"{inlet.weight.name}_scaled"
                array = inlet.scaled(reader.factors(gamma))
                made[key] = rw.constant("scaled", array, at=inlet.node, name=name)
            rw.rewire(inlet.node, 1, made[key])
        ones = rw.constant("scale", np.ones(norm.gamma.shape, dtype))  # type: ignore[union-attr]
        root = norm.node
        if root.op == "Mul":
            index = next(i for i, v in enumerate(root.inputs) if rw.facts.constant(v) is not None)
            rw.rewire(root, index, ones)
        else:
            rw.replace(
                root.op, [root.inputs[0], ones], attrs=dict(root.attrs), domain=root.domain or ""
            )


@dataclass(frozen=True)
class Found:
    """What one site needs."""

    norm: GivenNorm
    layout: Layout
    readers: Consumers
    sinks: Sinks


def _has_affine(norm: GivenNorm) -> bool:
    if norm.kind not in ("layer_norm", "rms_norm"):
        return False
    scaled = norm.gamma is not None and bool((norm.gamma != 1.0).any())
    return (scaled or (norm.beta is not None and bool(norm.beta.any()))) and norm.gamma is not None
