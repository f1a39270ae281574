"""What onnxruntime itself makes of each norm of a model when it loads it.

    runtime = { operators between the norm's input and its output in the graph that it really runs }

onnxruntime writes the graph that it runs; a fused operator keeps the name of the value that it
computes, so a norm is found again by its output. What it does to the original anyway is not counted
as ours: a row says so where the operators are the same with and without the passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import onnx

from onnxnorm.report_text import CHANGING

_MOST: Final = 24  # nodes; a norm has fewer, and what is behind it is another's


class RuntimeGraph:
    """The graph that onnxruntime runs, by the values that it computes.

    Args:
        model: What `onnxnorm.session.optimized_graph` returned.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        nodes = list(_nodes(model.graph))
        self._made = {name: place for place, n in enumerate(nodes) for name in n.output if name}
        self._nodes = nodes

    def operators(self, source: str, result: str) -> list[str] | None:
        """The operators that compute `result` from `source`, in order; None where they are gone.

        Where `source` is no value of this graph any more, it is the operator that computes
        `result` alone.
        """
        last = self._made.get(result)
        if last is None:
            return None
        found: set[int] = set()
        frontier, reached = [last], False
        while frontier and len(found) <= _MOST:
            place = frontier.pop()
            if place in found:
                continue
            found.add(place)
            for name in self._nodes[place].input:
                reached |= name == source
                if name != source and name in self._made:
                    frontier.append(self._made[name])
        places = sorted(found) if reached and len(found) <= _MOST else [last]
        return [_named(self._nodes[place]) for place in places]


def runtime_rows(
    rows: Sequence[Mapping[str, Any]], before: RuntimeGraph, after: RuntimeGraph
) -> list[dict[str, Any]]:
    """The rows of norms, each with `runtime`: what onnxruntime runs without and with the passes."""
    told = []
    for row in rows:
        source, result = row["input"], row["output"]
        original = before.operators(source, result)
        optimized = after.operators(source, result)
        runtime = {"original": original, "optimized": optimized, "same": original == optimized}
        told.append({**row, "runtime": runtime})
    return told


def runtime_note(rows: Sequence[Mapping[str, Any]], version: str) -> str:
    """What of the changes onnxruntime would have made by itself, in a sentence."""
    changed = [r for r in rows if r["action"] in CHANGING]
    same = sum(r["runtime"]["same"] for r in changed)
    if not changed:
        return f"onnxruntime {version} was shown the model as given: nothing would be changed."
    norms = "norm" if len(changed) == 1 else "norms"
    if not same:
        return (
            f"Of {len(changed)} {norms} that would be changed, onnxruntime {version} makes none by"
            " itself what it would become."
        )
    return (
        f"For {same} of {len(changed)} {norms} that would be changed, onnxruntime {version} runs"
        " the same operators without the change: it does the same by itself."
    )


def _named(node: onnx.NodeProto) -> str:
    known = node.domain in ("", "ai.onnx", "com.microsoft", "com.microsoft.nchwc")
    return node.op_type if known else f"{node.domain}.{node.op_type}"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _nodes(body)
