"""Which form each norm of a model is fastest in, measured on this machine.

    chosen(norm) = argmin over the forms f that are faster than the table's, beyond the A/A band,
                   of latency(f) / latency(table's form);  the table's form where there is none

The forms are `lowering.candidates` and the nodes that the norm has. Each is timed in a model of the
norm alone, with the values that reach it when the whole model runs. Norms that differ in their
names alone are measured once. A norm of a body or a function can meet several shapes in one run
and has one form: one that is slower at none of them, by the geometric mean of its ratios. What is
chosen is a function of the file of choices from then on: given back, it makes the same model on
any machine.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx

from onnxnorm.errors import OnnxNormError, UsageError
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.lowering import KEEP, Choices, candidates, choose, version
from onnxnorm.module import Module, Node
from onnxnorm.norms import Norm, find_norms
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.rewrite import Pass, place_of
from onnxnorm.staging import Staged
from onnxnorm.storage import Stored
from onnxnorm.variants import exposing
from onnxnorm.wellformed import versions
from onnxnorm.workbench import Workbench

# A value of each shape that came, and how often.
_Shapes: TypeAlias = "dict[tuple[int, ...], tuple[Any, int]]"

_LOWERING: Final = "lower-norms"
_LEAST_SECONDS: Final = 3.0  # of one measurement of one form
_PAIRS: Final = 8
_SHAPES: Final = 3  # those that come most often


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
    """A model of one norm alone, and values of one shape that reach the norm.

    Attributes:
        stored: The model.
        output: What the norm's output is called there.
        values: Its input.
        times: How often values of this shape came in the run that was looked at.
    """

    stored: Stored
    output: str
    values: dict[str, Any]
    times: int

    @property
    def signature(self) -> bytes:
        """The same for norms that differ in names and in the numbers that they read alone.

        Integers are axes and sizes, and count.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.stored.proto)
        names = {"": ""}
        for node in proto.graph.node:
            node.name = ""
            del node.metadata_props[:]
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
        return repr((nodes, sorted(weights), shapes, self.times)).encode()


@dataclass(frozen=True)
class _Place:
    """A norm that there is a choice for.

    Attributes:
        norm: The norm.
        usual: The form that the table has for it.
        others: The other forms that it can have.
        alone: The norm alone, for each shape that comes; empty where it cannot be measured.
        lack: Why it cannot be.
        drawn: Whether its values are random, as no run had any.
    """

    norm: Norm
    usual: str
    others: tuple[str, ...]
    alone: tuple[_Alone, ...] = ()
    lack: str = ""
    drawn: bool = False

    @property
    def signature(self) -> tuple[object, ...]:
        """The same for norms that are measured alike."""
        return (self.usual, self.others, *(each.signature for each in self.alone))


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
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UsageError(
            f"{path} cannot be read as choices: {reason}", "Give a report that --tune wrote."
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
    """Measure the forms of each norm that `lower-norms` would meet, also in bodies and functions.

    Args:
        bench: The original, its inputs, and how it is run.
        passes: All passes; those in front of `lower-norms` run first.
        source: What they start from.
        target: One of `lowering.TARGETS`.
        runtime: The onnxruntime that the model is for.

    Raises:
        ParityError: onnxruntime cannot run the original.
        RuntimeRejection: onnxruntime cannot run what the other passes made of it.
    """
    position = next(i for i, each in enumerate(passes) if each.name == _LOWERING)
    lowering, before = passes[position], Pipeline(list(passes[:position])).run(source).stored
    places = _places(bench, before, target, runtime)
    chosen: list[tuple[str, str]] = []
    notes: list[str] = []
    lacks: dict[str, list[str]] = {}
    known: dict[tuple[object, ...], tuple[str, str] | None] = {}
    signatures = max(1, len({p.signature for p in places if p.alone}))
    for index, place in enumerate(places):
        name = place_of(place.norm.output)
        if not place.alone:
            lacks.setdefault(place.lack, []).append(name)
            continue
        signature = place.signature
        if bench.progress is not None:
            bench.progress(f"forms of {name}", index / len(places))
        if signature not in known:
            runs = signatures * len(place.others) * len(place.alone)
            seconds = max(bench.budget / 2 / runs, _LEAST_SECONDS)
            known[signature] = _fastest(bench, place, lowering, seconds)
        fastest = known[signature]
        if fastest is None:
            lacks.setdefault("it cannot be written by itself", []).append(name)
            continue
        form, figure = fastest
        chosen.append((name, form))
        if form != place.usual:
            notes.append(f"{name} is written as {form}: {figure} of the time of {place.usual}.")
    rest = len(chosen) - len(notes)
    notes.append(f"Norms measured by --tune: {len(chosen)}; with the form of the table: {rest}.")
    if drawn := [place_of(p.norm.output) for p in places if p.drawn and p.alone]:
        told = f"Norms that nothing reaches with these inputs: {', '.join(drawn)}"
        notes.append(f"{told}; they were measured with random numbers.")
    for lack, names in lacks.items():
        notes.append(f"Norms that --tune did not measure: {', '.join(names)}; {lack}.")
    return Tuned(tuple(chosen), tuple(notes))


def _places(bench: Workbench, stored: Stored, target: str, runtime: str) -> list[_Place]:
    """The norms that there is a choice for, each alone, with the values that reach it."""
    facts = Facts(Module(stored))
    wanted: list[_Place] = []
    for norm in find_norms(facts):
        names = [s.name for s, _ in candidates(norm, facts, target, version(runtime))]
        first = choose(norm, facts, target, version(runtime))
        usual = KEEP if isinstance(first, str) else first[0].name
        others = tuple(name for name in (*names, KEEP) if name != usual)
        if names and others:
            wanted.append(_Place(norm, usual, others))
    main = facts.module.main
    plain = {p.norm.input.name for p in wanted if p.norm.node.scope is main}
    values = _values(bench, stored, plain) if plain else {}
    inner = [p.norm for p in wanted if p.norm.node.scope is not main]
    seen, lack = _seen(bench, stored, inner, facts) if inner else ({}, "")
    places = []
    for place in wanted:
        norm = place.norm
        given = seen.get(place_of(norm.input), {})
        if norm.node.scope is main:
            array = values[norm.input.name]
            given = {array.shape: (array, 1)}
        found = sorted(given.values(), key=lambda each: -each[1])[:_SHAPES]
        drawn = None if found or lack else _drawn(bench, norm, facts)
        if drawn is not None:
            found = [(drawn, 1)]
        if len(found) == 1:
            found = [(found[0][0], 1)]  # how often is asked of one shape beside another
        alone = [_extracted(facts, norm, array, times) for array, times in found]
        usable = tuple(each for each in alone if each is not None)
        if not found:
            why = lack or "with these inputs nothing reached it"
        else:
            why = "it reads more than one value and constants"
        places.append(replace(place, alone=usable, lack=why, drawn=drawn is not None))
    return places


def _values(bench: Workbench, stored: Stored, names: set[str]) -> dict[str, Any]:
    """What values of the main graph hold when the model runs."""
    from onnxnorm.session import open_session

    feed = dict(bench.feed())
    found = {name: feed[name] for name in names & set(feed)}
    with (
        Staged(exposing(stored, sorted(names - set(found))), None) as staged,
        open_session(staged.model, provider=bench.provider or "cpu", optimize=False) as session,
    ):
        run = session.run(feed)
    return found | {name: np.asarray(run[name]) for name in names - set(found)}


def _seen(
    bench: Workbench, stored: Stored, norms: Sequence[Norm], facts: Facts
) -> tuple[dict[str, _Shapes], str]:
    """What reaches norms of bodies and functions, and why that is not known; "" where it is.

    onnxruntime shows no values from in there, so the model is evaluated in float64, with one set of
    inputs after another until something has reached all of them.
    """
    from onnxnorm.parity import free_memory
    from onnxnorm.truth import Evaluator, OutOfTime

    found: dict[str, _Shapes] = {place_of(norm.input): {} for norm in norms}
    watch: dict[tuple[str, str], Callable[[Any], None]] = {}
    for norm in norms:
        value, known = norm.input, facts.type(norm.input)
        if known is not None and value.scope is not None:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(known.element)
            keep = partial(_keep, found[place_of(value)], dtype)
            watch[value.scope.path, value.name] = keep
    until = time.monotonic() + bench.budget
    with Evaluator(stored, free_memory() // 2, watch) as evaluator:
        try:
            for feed in bench.checker().feeds:
                evaluator.run(feed.values, deadline=until)
                if all(found.values()):
                    break
        except OutOfTime:
            return found, "the time budget ended before values reached it"
        except MemoryError as error:
            return found, f"its values do not fit into memory: {error}"
        except OnnxNormError as error:
            return found, f"its values are not known: {error}"
    return found, ""


def _drawn(bench: Workbench, norm: Norm, facts: Facts) -> Any:
    """Random values for a norm that no run has reached; None where a size is not known."""
    dims, known = norm.dims, facts.type(norm.input)
    if known is None or dims is None or not all(isinstance(d, int) and d > 0 for d in dims):
        return None
    shape = [d for d in dims if isinstance(d, int)]
    values = np.random.default_rng(bench.seed).standard_normal(shape)
    return values.astype(onnx.helper.tensor_dtype_to_np_dtype(known.element))


def _keep(shapes: _Shapes, dtype: np.dtype[Any], value: Any) -> None:
    """Keep the first value of each shape, and count the others."""
    if isinstance(value, np.ndarray) and value.size:
        first, times = shapes.get(value.shape, (None, 0))
        shapes[value.shape] = (value.astype(dtype) if first is None else first, times + 1)


def _extracted(facts: Facts, norm: Norm, value: Any, times: int) -> _Alone | None:
    """A norm alone; None where it reads more at run time than its input.

    Constants of any scope become initializers, as runtimes fold them.
    """
    names: dict[AnyValue, str] = {norm.input: norm.input.name}
    weights: list[onnx.TensorProto] = []
    needed: set[Node] = set()
    pending = [norm.output]
    while pending:
        at = pending.pop()
        if not at.name or at in names:
            continue
        names[at] = _fresh(at.name, names.values())
        constant, node = facts.constant(at), facts.producer(at)
        if constant is not None:
            weights.append(onnx.numpy_helper.from_array(constant.array(), names[at]))
        elif node is None or node.bodies or node.parametric:
            return None
        else:
            needed.add(node)
            pending += node.inputs
    scopes = [norm.node.scope]
    while scopes[0].parent is not None:
        scopes.insert(0, scopes[0].parent)
    nodes = [n for scope in scopes for n in facts.in_order(scope) if n in needed]
    messages = []
    for node in nodes:
        message = onnx.NodeProto()
        message.CopyFrom(node.proto_now())
        for side, values in ((message.input, node.inputs), (message.output, node.outputs)):
            side[:] = [
                names.setdefault(v, _fresh(v.name, names.values())) if v.name else ""
                for v in values
            ]
        messages.append(message)
    element = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    given = onnx.helper.make_tensor_value_info(norm.input.name, element, value.shape)
    output = names[norm.output]
    graph = onnx.helper.make_graph(
        messages, "norm", [given], [onnx.ValueInfoProto(name=output)], weights
    )
    model = facts.module.proto
    imports = versions(model.opset_import) | dict(norm.node.scope.opsets)
    alone = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(*each) for each in imports.items()],
        functions=model.functions,
        ir_version=model.ir_version,
    )
    inferred = onnx.shape_inference.infer_shapes(alone)
    if not inferred.graph.output[0].type.HasField("tensor_type"):
        return None
    alone.graph.output[0].CopyFrom(inferred.graph.output[0])
    stored = facts.module.stored.with_proto(alone)
    return _Alone(stored, output, {norm.input.name: value}, times)


def _fresh(wanted: str, taken: Collection[str]) -> str:
    """A name that is not taken: scopes beside each other may have the same."""
    return next(n for i in count() if (n := f"{wanted}_{i}" if i else wanted) not in taken)


def _fastest(
    bench: Workbench, place: _Place, lowering: Pass, seconds: float
) -> tuple[str, str] | None:
    """The form that is faster than the usual one beyond the band, and its ratio; or the usual.

    Where several shapes come, one that is slower at none of them, and the ratio over all.
    None where the usual one cannot be written in the norm's own model.
    """
    best: tuple[float, str, str] = (1.0, place.usual, "")
    with ExitStack() as stack:
        first: list[tuple[_Alone, Path]] = []
        for alone in place.alone:
            usual = _written(alone, lowering, place.usual)
            if usual is None:
                return None
            first.append((alone, stack.enter_context(Staged(usual, None)).model))
        for form in place.others:
            found = [_measured(bench, a, model, lowering, form, seconds) for a, model in first]
            known = [each for each in found if each is not None]
            verdicts = {each["verdict"] for each in known}
            if len(known) < len(found) or "faster" not in verdicts or "slower" in verdicts:
                continue
            total = sum(a.times for a, _ in first)
            logs = [a.times * math.log(k["ratio"]) for (a, _), k in zip(first, known, strict=True)]
            ratio = math.exp(sum(logs) / total)
            if ratio < best[0]:
                low, high = known[0]["interval"]
                alike = f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
                figure = alike if len(known) == 1 else f"{ratio:.3f} over {len(known)} shapes"
                best = (ratio, form, figure)
    return best[1], best[2]


def _measured(
    bench: Workbench, alone: _Alone, usual: Path, lowering: Pass, form: str, seconds: float
) -> dict[str, Any] | None:
    """The latency of a form beside the usual one; None where it cannot be written or run."""
    other = _written(alone, lowering, form)
    if other is None:
        return None
    try:
        with Staged(other, None) as second:
            return bench.time(
                usual, second.model, seconds=seconds, values=alone.values, pairs=_PAIRS
            )
    except OnnxNormError:
        return None  # a form that does not run here is none


def _written(alone: _Alone, lowering: Pass, form: str) -> Stored | None:
    """The norm alone in a form; None where it cannot be written so."""
    if form == KEEP:
        return alone.stored
    (only,) = with_choices([lowering], ((alone.output, form),))
    run = Pipeline([only]).run(alone.stored)
    return run.stored if any(r.into == form for r in run.applied) else None
