"""Which form each norm of a model is fastest in, measured on this machine.

    chosen(norm) = argmin over the forms f that are faster than the table's, beyond the A/A band,
                   of latency(f) / latency(table's form);  the table's form where there is none

The forms are `lowering.candidates` and the nodes that the norm has. Each is timed in a model of the
norm alone, with the values that reach it when the whole model runs. Norms that differ in their
names alone are measured once. What is chosen is a function of the file of choices from then on:
given back, it makes the same model on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from onnxnorm.errors import OnnxNormError, UsageError
from onnxnorm.facts import Facts
from onnxnorm.lowering import KEEP, Choices, candidates, choose, version
from onnxnorm.module import Module
from onnxnorm.norms import Norm, find_norms
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.rewrite import Pass, place_of
from onnxnorm.staging import Staged
from onnxnorm.storage import Stored, from_proto
from onnxnorm.workbench import Workbench

_LOWERING: Final = "lower-norms"
_LEAST_SECONDS: Final = 3.0  # of one measurement of one form
_PAIRS: Final = 8


@dataclass(frozen=True)
class Tuned:
    """What was chosen, and what was measured for it.

    Attributes:
        choices: Place and form of each norm that was measured.
        notes: A sentence for each form that won over the table's, and one on the rest.
    """

    choices: Choices
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Alone:
    """A model of one norm alone: what it computes and from which values."""

    norm: Norm
    proto: onnx.ModelProto
    values: dict[str, Any]
    usual: str
    others: tuple[str, ...]

    @property
    def signature(self) -> bytes:
        """The same for norms that differ in names and in the numbers that they read alone.

        Integers are axes and sizes, and count.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        names = {"": ""}
        for node in proto.graph.node:
            node.name = ""
            for side in (node.input, node.output):
                for index, name in enumerate(side):
                    side[index] = names.setdefault(name, str(len(names)))
        weights = [
            (names[t.name], t.data_type, tuple(t.dims), _integers(t))
            for t in proto.graph.initializer
            if t.name in names
        ]
        shapes = [(names[k], v.shape, str(v.dtype)) for k, v in self.values.items()]
        nodes = [node.SerializeToString(deterministic=True) for node in proto.graph.node]
        return repr((nodes, sorted(weights), shapes, self.usual, self.others)).encode()


def _integers(tensor: onnx.TensorProto) -> list[int]:
    whole = tensor.data_type in (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    return onnx.numpy_helper.to_array(tensor).ravel().tolist() if whole else []


def with_choices(passes: Sequence[Pass], choices: Choices) -> list[Pass]:
    """The same passes, of which the one that lowers norms follows the choices.

    Raises:
        UsageError: It is not among them.
    """
    if all(each.name != _LOWERING for each in passes):
        raise UsageError(
            f"forms of norms are to be chosen without the pass {_LOWERING}",
            f"Add {_LOWERING} to --passes, or leave --tune and --choices out.",
        )
    given: dict[str, Any] = {"choices": choices}
    return [replace(p, **given) if p.name == _LOWERING else p for p in passes]  # type: ignore[type-var]


def read_choices(path: str | Path) -> Choices:
    """The choices in a file: a report of a run that had some, or an object of place to form.

    Raises:
        UsageError: It cannot be read, or has none.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as choices: {error}", "Give a report that --tune wrote."
        ) from error
    if isinstance(data, Mapping) and "schema" in data:
        options = data.get("options")
        data = options.get("choices") if isinstance(options, Mapping) else None
    if not isinstance(data, Mapping) or not all(isinstance(form, str) for form in data.values()):
        raise UsageError(
            f"{path} holds no choices",
            'Give a report that --tune wrote, or {"place of a norm": "its form"}.',
        )
    return tuple((str(place), form) for place, form in data.items())


def unmet(choices: Choices, run: Run) -> list[str]:
    """The places of choices that the pass which lowers norms has not come across."""
    met = {r.site.partition(":")[2] for r in run.remarks if r.rule == _LOWERING}
    return [place for place, _ in choices if place not in met]


def tune(
    bench: Workbench, passes: Sequence[Pass], source: Stored, target: str, runtime: str
) -> Tuned:
    """Measure the forms of each norm that `lower-norms` would meet, in the main graph.

    Args:
        bench: The original, its inputs, and how it is run.
        passes: All passes; those in front of `lower-norms` run first.
        source: What they start from.
        target: One of `lowering.TARGETS`.
        runtime: The onnxruntime that the model is for.

    Raises:
        ModelError: The model is larger than 2 GB.
        ParityError: onnxruntime cannot run the original.
        RuntimeRejection: onnxruntime cannot run what the other passes made of it.
    """
    position = next(i for i, each in enumerate(passes) if each.name == _LOWERING)
    lowering, before = passes[position], Pipeline(list(passes[:position])).run(source).stored
    places = _places(bench, before, target, runtime)
    chosen: list[tuple[str, str]] = []
    notes: list[str] = []
    known: dict[bytes, tuple[str, str] | None] = {}
    count = max(1, len({p.signature for p in places}))
    for index, place in enumerate(places):
        name, signature = place_of(place.norm.output), place.signature
        if bench.progress is not None:
            bench.progress(f"forms of {name}", index / len(places))
        if signature not in known:
            seconds = max(bench.budget / 2 / count / len(place.others), _LEAST_SECONDS)
            known[signature] = _fastest(bench, place, lowering, seconds)
        fastest = known[signature]
        if fastest is None:
            continue
        form, figure = fastest
        chosen.append((name, form))
        if form != place.usual:
            notes.append(f"{name} is written as {form}: {figure} of the time of {place.usual}.")
    rest = len(chosen) - len(notes)
    notes.append(f"Norms measured by --tune: {len(chosen)}; with the form of the table: {rest}.")
    return Tuned(tuple(chosen), tuple(notes))


def _places(bench: Workbench, stored: Stored, target: str, runtime: str) -> list[_Alone]:
    """The norms that there is a choice for, each alone, with the values that reach it."""
    facts = Facts(Module(stored))
    wanted: list[tuple[Norm, str, tuple[str, ...]]] = []
    for norm in find_norms(facts):
        scope = norm.node.scope
        if scope.parent is not None or not isinstance(scope.proto, onnx.GraphProto):
            continue  # it runs as often as its body does, on values that no output shows
        names = [s.name for s, _ in candidates(norm, facts, target, version(runtime))]
        first = choose(norm, facts, target, version(runtime))
        usual = KEEP if isinstance(first, str) else first[0].name
        others = tuple(name for name in (*names, KEEP) if name != usual)
        if names and others:
            wanted.append((norm, usual, others))
    if not wanted:
        return []
    proto = stored.complete()
    values = _values(bench, proto, {norm.input.name for norm, *_ in wanted})
    places = []
    for norm, usual, others in wanted:
        alone = _extracted(proto, norm, values[norm.input.name])
        if alone is not None:
            places.append(
                _Alone(norm, alone, {norm.input.name: values[norm.input.name]}, usual, others)
            )
    return places


def _values(bench: Workbench, proto: onnx.ModelProto, names: set[str]) -> dict[str, Any]:
    """What values of the main graph hold when the model runs."""
    from onnxnorm.session import open_session

    feed = dict(bench.feed())
    found = {name: feed[name] for name in names & set(feed)}
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    outputs = {output.name for output in shown.graph.output}
    shown.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in sorted(names - set(found) - outputs)
    )
    with (
        Staged(from_proto(shown), None) as staged,
        open_session(staged.model, provider=bench.provider or "cpu", optimize=False) as session,
    ):
        run = session.run(feed)
    return found | {name: np.asarray(run[name]) for name in names - set(found)}


def _extracted(proto: onnx.ModelProto, norm: Norm, value: Any) -> onnx.ModelProto | None:
    """The model of a norm alone; None where it reads more than its input and constants."""
    producers = {name: node for node in proto.graph.node for name in node.output if name}
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    needed: set[str] = set()
    pending, used = [norm.output.name], {}
    while pending:
        name = pending.pop()
        if not name or name in needed or name == norm.input.name:
            continue
        needed.add(name)
        if name in weights:
            used[name] = weights[name]
        elif name in producers and not any(a.type in _BODIES for a in producers[name].attribute):
            pending += producers[name].input
        else:
            return None
    nodes = [node for node in proto.graph.node if needed & set(node.output)]
    element = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    given = onnx.helper.make_tensor_value_info(norm.input.name, element, value.shape)
    graph = onnx.helper.make_graph(
        nodes, "norm", [given], [onnx.ValueInfoProto(name=norm.output.name)], [*used.values()]
    )
    alone = onnx.helper.make_model(
        graph,
        opset_imports=proto.opset_import,
        functions=proto.functions,
        ir_version=proto.ir_version,
    )
    inferred = onnx.shape_inference.infer_shapes(alone)
    if not inferred.graph.output[0].type.HasField("tensor_type"):
        return None
    alone.graph.output[0].CopyFrom(inferred.graph.output[0])
    return alone


_BODIES: Final = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _fastest(
    bench: Workbench, place: _Alone, lowering: Pass, seconds: float
) -> tuple[str, str] | None:
    """The form that is faster than the usual one beyond the band, and its ratio; or the usual.

    None where the usual one cannot be written in the norm's own model.
    """
    best: tuple[float, str, str] = (1.0, place.usual, "")
    usual = _written(place, lowering, place.usual)
    if usual is None:
        return None
    with Staged(usual, None) as first:
        for form in place.others:
            other = _written(place, lowering, form)
            if other is None:
                continue
            try:
                with Staged(other, None) as second:
                    found = bench.time(
                        first.model,
                        second.model,
                        seconds=seconds,
                        values=place.values,
                        pairs=_PAIRS,
                    )
            except OnnxNormError:
                continue  # a form that does not run here is none
            if found["verdict"] == "faster" and found["ratio"] < best[0]:
                low, high = found["interval"]
                best = (found["ratio"], form, f"{found['ratio']:.3f} [{low:.3f}, {high:.3f}]")
    return best[1], best[2]


def _written(place: _Alone, lowering: Pass, form: str) -> Stored | None:
    """The norm alone in a form; None where it cannot be written so."""
    stored = from_proto(place.proto)
    if form == KEEP:
        return stored
    (only,) = with_choices([lowering], ((place.norm.output.name, form),))
    run = Pipeline([only]).run(stored)
    return run.stored if any(r.into == form for r in run.applied) else None
