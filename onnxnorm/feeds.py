"""Inputs for a model that nobody has described: plausible, varied, and the same for each seed.

Eight samples by default, each of another distribution, because an error that hides behind one
kind of input shows on another. They share runs where all inputs have a common symbolic first
axis. A symbolic axis has one size per run, the same wherever its name occurs, and two sizes over
all runs. Integers stay within what their consumers allow: the rows of the table they index, the
depth of a OneHot. When a model rejects all that, `candidates` goes on to plainer inputs.
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
import onnx.inliner as inliner
from numpy.typing import NDArray

from onnxnorm.errors import UsageError
from onnxnorm.float64 import is_float_dtype, is_float_type

Array: TypeAlias = NDArray[Any]
Dim: TypeAlias = int | str
Sizes: TypeAlias = dict[str, int]


@dataclass(frozen=True)
class Feed:
    """The inputs of one run.

    Attributes:
        values: An array (a list of arrays for a sequence) for each graph input, in its own dtype.
        description: One line that says what the values are.
        samples: How many samples the run carries.
    """

    values: Mapping[str, Any]
    description: str
    samples: int = 1


@dataclass(frozen=True)
class _Recipe:
    """One kind of inputs, from the most telling to the plainest."""

    batched: bool = True
    floats: str = "varied"  # varied, small, ones, zeros
    integers: str = "varied"  # varied, ones, zeros
    padded_masks: bool = True
    sizes: int = 0  # which row of the tables of sizes comes first
    lone: bool = False  # free axes of all inputs but the first are 1, as a state's batch is

    def describe(self) -> str:
        parts = {
            ("varied", "varied"): "random values of several distributions",
            ("small", "varied"): "small random values",
            ("ones", "ones"): "ones",
            ("zeros", "zeros"): "zeros",
        }
        return parts.get((self.floats, self.integers), f"{self.floats}, {self.integers} integers")


_RECIPES: Final = (
    _Recipe(),
    _Recipe(batched=False),
    _Recipe(batched=False, padded_masks=False),
    _Recipe(batched=False, padded_masks=False, sizes=1),
    _Recipe(batched=False, padded_masks=False, sizes=2),
    _Recipe(batched=False, padded_masks=False, sizes=3),
    _Recipe(batched=False, padded_masks=False, sizes=4),
    _Recipe(batched=False, padded_masks=False, sizes=5),
    _Recipe(batched=False, padded_masks=False, sizes=6),
    _Recipe(batched=False, padded_masks=False, sizes=7),
    _Recipe(batched=False, padded_masks=False, lone=True),
    _Recipe(batched=False, padded_masks=False, sizes=5, lone=True),
    _Recipe(batched=False, padded_masks=False, sizes=7, lone=True),
    _Recipe(batched=False, padded_masks=False, floats="small"),
    _Recipe(batched=False, padded_masks=False, floats="ones", integers="ones"),
    _Recipe(batched=False, padded_masks=False, floats="zeros", integers="zeros"),
    _Recipe(batched=False, padded_masks=False, floats="ones", integers="ones", sizes=2),
    _Recipe(batched=False, padded_masks=False, floats="zeros", integers="zeros", sizes=2),
)

# Two sizes of a row are used together: a model that bakes one in shows with the other.
# The last rows of the sequences are for waveforms, whose windows take hundreds of samples.
_SPATIAL: Final = (
    (64, 96),
    (224, 256),
    (32, 48),
    (128, 160),
    (299, 331),
    (384, 416),
    (512, 640),
    (416, 384),
)
_SEQUENCE: Final = (
    (16, 11),
    (8, 5),
    (1, 1),
    (32, 24),
    (128, 64),
    (256, 288),
    (512, 576),
    (16000, 12000),
)
_OTHER: Final = ((4, 3), (2, 5), (1, 1), (8, 6), (16, 12), (64, 48), (512, 384), (256, 192))

_MOST_ELEMENTS: Final = 1 << 26  # of one choice of inputs, where its sizes are our own guess

_MASK_NAME: Final = re.compile(r"mask", re.IGNORECASE)
_POSITION_NAME: Final = re.compile(r"position|cache_pos", re.IGNORECASE)
_LENGTH_NAME: Final = re.compile(r"(^|_|\b)(seq)?len(s|gth|gths)?($|_|\b)", re.IGNORECASE)
_SPATIAL_NAME: Final = re.compile(r"height|width|^h$|^w$|spatial|image", re.IGNORECASE)
_SEQUENCE_NAME: Final = re.compile(r"seq|len|time|token|frame|sample|step|^[lst]$", re.IGNORECASE)
_BATCH_NAME: Final = re.compile(r"batch|^[bn]$", re.IGNORECASE)
_PAST_NAME: Final = re.compile(r"past|cache", re.IGNORECASE)


@dataclass(frozen=True)
class _Input:
    """A graph input as declared: `dims` is None where the rank is not known."""

    name: str
    elem_type: int
    dims: tuple[Dim, ...] | None
    sequence: bool = False


@dataclass
class _Limits:
    """What the consumers of an integer input ask of it."""

    below: int | None = None
    index: bool = False
    shape_like: bool = False
    seen: set[str] = field(default_factory=set)


# --- distributions -----------------------------------------------------------------------------


def _smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return values in [0, 1) that vary slowly along the last two axes, as pixels do."""
    x = rng.random(shape)
    for axis in range(max(len(shape) - 2, 0), len(shape)):
        x = (x + np.roll(x, 1, axis) + np.roll(x, 2, axis) + np.roll(x, 3, axis)) / 4
    return x


def _sparse(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) * (rng.random(shape) < 0.25)


_DISTRIBUTIONS: Final = (
    ("standard normal", lambda rng, shape: rng.standard_normal(shape)),
    ("uniform [0, 1)", lambda rng, shape: rng.random(shape)),
    ("normal times 3", lambda rng, shape: 3.0 * rng.standard_normal(shape)),
    ("image-like", _smooth),
    ("normal times 0.1", lambda rng, shape: 0.1 * rng.standard_normal(shape)),
    ("sparse", _sparse),
    ("normal about 2", lambda rng, shape: 2.0 + rng.standard_normal(shape)),
    ("heavy-tailed", lambda rng, shape: rng.laplace(size=shape)),
)


# --- public ------------------------------------------------------------------------------------


def make_feeds(
    proto: onnx.ModelProto,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    count: int = 8,
    arrays: Path | None = None,
) -> list[Feed]:
    """Return the first choice of inputs for a model.

    Args:
        proto: The model; its weights are not read.
        shapes: Concrete shapes of some inputs (`--input-shape`).
        seed: The same seed gives the same inputs.
        count: Samples over all feeds.
        arrays: The user's own inputs, an .npz file with one array per graph input.

    Raises:
        UsageError: `shapes` or `arrays` do not fit the model.
    """
    return next(candidates(proto, shapes=shapes, seed=seed, count=count, arrays=arrays))


def candidates(
    proto: onnx.ModelProto,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    count: int = 8,
    arrays: Path | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Iterator[list[Feed]]:
    """Yield choices of inputs, the most telling first, for a model that may reject some.

    Arguments and errors are those of `make_feeds`; the user's own arrays are the only choice.
    `sizes` settles symbolic axes by name, over what `shapes` says of them.
    """
    inputs = _inputs(proto)
    if arrays is not None:
        yield [_own(inputs, arrays)]
        return
    bound = _bind(inputs, shapes or {})
    if sizes:
        bound |= sizes
        # What the user's shapes say of the other axes of these inputs is bound already.
        varied = {i.name for places in map(_symbols(inputs).get, sizes) for i, _ in places or ()}
        shapes = {name: shape for name, shape in (shapes or {}).items() if name not in varied}
    bound = {s: n for s, n in _windows(inputs, proto).items() if s not in bound} | bound
    inputs = [i if i.name in (shapes or {}) else _fitting(i, proto) for i in inputs]
    limits = {i.name: _limits(proto, i) for i in inputs if not is_float_type(i.elem_type)}
    previous: list[Any] = []
    for recipe in _RECIPES:
        layout = _layout(inputs, recipe, bound, count)
        padded = recipe.padded_masks and any(_MASK_NAME.search(i.name) for i in inputs)
        signature = [recipe.floats, recipe.integers, padded, layout]
        too_large = recipe.sizes and _elements(inputs, layout) > _MOST_ELEMENTS
        if signature in previous or too_large:
            continue
        previous.append(signature)
        yield _build(inputs, recipe, layout, shapes or {}, limits, seed)


# --- shapes ------------------------------------------------------------------------------------


def symbols(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of the symbolic axes of a model's inputs, in order."""
    return tuple(name for name in _symbols(_inputs(proto)) if not name.startswith("?"))


def batch_axis(proto: onnx.ModelProto) -> str | None:
    """Return the name of the batch axis; None where there is none that could vary.

    The first axis of all inputs, or of one where it is called like a batch, or of the first input.
    """
    inputs = _inputs(proto)
    firsts = [d for i in inputs if i.dims and isinstance(d := i.dims[0], str) and _is_one(d)]
    named = (d for d in firsts if _BATCH_NAME.search(d))
    return _batch_symbol(inputs) or next(named, None) or next(iter(firsts[:1]), None)


def sequence_axes(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of all axes that are called like the length of a sequence.

    Where none is: that of axis 1, of inputs with two or three axes.
    """
    inputs = _inputs(proto)
    batch = batch_axis(proto)
    found = [s for s in _symbols(inputs) if s != batch and not _PAST_NAME.search(s)]
    called = [s for s in found if _SEQUENCE_NAME.search(s) and not s.startswith(("?", "total"))]
    if called:
        return tuple(called)
    second = [i.dims[1] for i in inputs if i.dims is not None and len(i.dims) in {2, 3}]
    return tuple(dict.fromkeys(d for d in second if isinstance(d, str) and d in found))


def _is_one(dim: str) -> bool:
    return len(_terms(dim)) == 1


def _inputs(proto: onnx.ModelProto) -> list[_Input]:
    given = {tensor.name for tensor in proto.graph.initializer}
    given |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    found = []
    for value in proto.graph.input:
        if value.name in given:
            continue
        kind, sequence = value.type, False
        if kind.HasField("optional_type"):
            kind = kind.optional_type.elem_type
        if kind.HasField("sequence_type"):
            kind, sequence = kind.sequence_type.elem_type, True
        if not kind.HasField("tensor_type"):
            raise UsageError(
                f"input '{value.name}' is neither a tensor nor a sequence of tensors",
                "No inputs can be made for it; use --no-parity --no-latency.",
            )
        tensor = kind.tensor_type
        dims: tuple[Dim, ...] | None = None
        if tensor.HasField("shape"):
            rank = len(tensor.shape.dim)
            dims = tuple(
                d.dim_value
                if d.HasField("dim_value") and d.dim_value >= 0
                else (d.dim_param or ("?0" if axis == 0 else f"?{rank}.{axis}"))
                for axis, d in enumerate(tensor.shape.dim)
            )
        found.append(_Input(value.name, tensor.elem_type, dims, sequence))
    return found


# Nodes that give their output the sizes of their first input, where the others are weights.
_KEEPS_SIZES: Final = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Sub"})


def _fitting(entry: _Input, proto: onnx.ModelProto) -> _Input:
    """Return the input with the channels, and the rank, that the weights behind it ask for."""
    sizes = _table_sizes(proto)
    for node in proto.graph.node:
        if entry.name in node.input and entry.dims is not None and len(entry.dims) == 4:
            heads = _cache_heads(node, list(node.input).index(entry.name), sizes, proto)
            sizes_of = {axis: n for axis, n in zip((1, 3), heads, strict=True) if n}
            fitting = [
                sizes_of.get(a, d) if isinstance(d, str) else d for a, d in enumerate(entry.dims)
            ]
            entry = replace(entry, dims=tuple(fitting))
    frontier, seen = [entry.name], set()
    while frontier:
        name = frontier.pop()
        seen.add(name)
        for node in proto.graph.node:
            if name not in node.input:
                continue
            if node.op_type in _KEEPS_SIZES:
                frontier += [out for out in node.output if out not in seen]
            table = sizes.get(node.input[1], ()) if len(node.input) > 1 else ()
            if name != node.input[0] or 0 in table:  # 0 is an axis that is not known
                continue
            values = {a.name: a.i for a in node.attribute}
            axis, size, rank = -1, 0, 0
            if node.op_type in {"Conv", "ConvTranspose"} and len(table) > 2:
                axis, rank = 1, len(table)
                size = table[1] * values.get("group", 1) if node.op_type == "Conv" else table[0]
            elif node.op_type == "MatMul" and len(table) == 2:
                size = table[0]
            elif node.op_type == "Gemm" and len(table) == 2 and not values.get("transA"):
                size, rank = table[1 if values.get("transB") else 0], 2
            if not size:
                continue
            dims = entry.dims
            if dims is None and rank:
                dims = tuple("?0" if a == 0 else f"?{rank}.{a}" for a in range(rank))
            if dims and len(dims) > max(axis, 0) and isinstance(dims[axis], str):
                settled = list(dims)
                settled[axis] = size
                return replace(entry, dims=tuple(settled))
            return replace(entry, dims=dims)
    return entry


# Attention operators: where the cache of keys is, that of values behind it, and the attributes
# that count the heads of queries and those of keys. A cache is [batch, heads, past, head size].
_CACHES: Final = {
    ("com.microsoft", "GroupQueryAttention"): (3, "num_heads", "kv_num_heads"),
    ("com.microsoft", "MultiHeadAttention"): (6, "num_heads", "num_heads"),
    ("", "Attention"): (4, "q_num_heads", "kv_num_heads"),
}


def _cache_heads(
    node: onnx.NodeProto,
    position: int,
    sizes: Mapping[str, tuple[int, ...]],
    proto: onnx.ModelProto,
) -> tuple[int, int]:
    """Return heads and head size of the cache that an operator reads there; 0 is not known.

    Microsoft's operators take queries, keys and values as [batch, length, heads * head size], or
    the three of them side by side where the keys are left out.
    """
    past, queries, keys = _CACHES.get((node.domain, node.op_type), (-1, "", ""))
    if past < 0 or position not in {past, past + 1}:
        return 0, 0
    values = {a.name: a.i for a in node.attribute}
    heads, shared = values.get(queries, 0), values.get(keys, 0)
    given = node.input[position - past + 1]  # the keys, or the values
    rank = len(sizes.get(given or node.input[0], (0, 0, 0)))
    if rank == 4:
        shape = sizes[given or node.input[0]]
        return shape[1], shape[3]
    if rank != 3 or not heads or not shared:
        return shared, 0
    parts = shared if given else heads + 2 * shared
    return shared, _width(given or node.input[0], sizes, proto) // parts


def _windows(inputs: Sequence[_Input], proto: onnx.ModelProto) -> Sizes:
    """Return the sizes of axes that are the length of a ring buffer: it holds a window whole."""
    by_name = {i.name: i.dims for i in inputs if i.dims is not None and len(i.dims) == 4}
    found: Sizes = {}
    for node in proto.graph.node:
        values = {a.name: a.i for a in node.attribute}
        if values.get("sliding_window_cache"):
            for name in node.input:
                past = by_name.get(name, (0, 0, 0, 0))[2]
                if isinstance(past, str):
                    found[past] = max(found.get(past, 1), values.get("local_window_size", 1))
    return found


def _width(name: str, sizes: Mapping[str, tuple[int, ...]], proto: onnx.ModelProto) -> int:
    """Return the size of a value's last axis, by its shape or by the weights behind it; or 0."""
    if sizes.get(name) and sizes[name][-1]:
        return sizes[name][-1]
    node = next((n for n in proto.graph.node if name in n.output), None)
    if node is None:
        return 0
    if node.op_type == "MatMulNBits":
        return next((int(a.i) for a in node.attribute if a.name == "N"), 0)
    if node.op_type == "MatMul":
        return _width(node.input[1], sizes, proto)
    if node.op_type == "Add":
        return max(_width(operand, sizes, proto) for operand in node.input)
    return 0


def _elements(inputs: Sequence[_Input], layout: Sequence[tuple[Sizes, int]]) -> int:
    """Return the elements of all inputs over all feeds."""
    return sum(math.prod(_concrete(i, sizes, {})) for sizes, _ in layout for i in inputs)


def _bind(inputs: Sequence[_Input], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the size of each symbol that the user's shapes settle."""
    by_name = {i.name: i for i in inputs}
    bound: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in by_name:
            raise UsageError(
                f"--input-shape names '{name}', which is no input of the model",
                f"Its inputs are: {', '.join(by_name) or 'none'}.",
            )
        dims = by_name[name].dims
        if dims is None:
            continue
        spelled = f"[{', '.join(map(str, dims))}]"
        if len(dims) != len(shape):
            raise UsageError(
                f"--input-shape gives '{name}' {len(shape)} axes; the model declares {spelled}",
                f"Give {len(dims)} numbers.",
            )
        for axis, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            if size < 0:
                raise UsageError(
                    f"--input-shape gives '{name}' the size {size}", "Give sizes of 0 or more."
                )
            if isinstance(dim, int) and dim != size:
                raise UsageError(
                    f"--input-shape gives axis {axis} of '{name}' the size {size}; "
                    f"the model declares {spelled}",
                    f"Only the symbolic axes are free; axis {axis} must be {dim}.",
                )
            if isinstance(dim, str) and bound.setdefault(dim, size) != size:
                if dim.startswith("?"):  # unnamed: sharing a size was our guess
                    continue
                raise UsageError(
                    f"--input-shape gives the axis '{dim}' the sizes {bound[dim]} and {size}",
                    "An axis has one size wherever its name occurs.",
                )
    return bound


def _symbols(inputs: Sequence[_Input]) -> dict[str, list[tuple[_Input, int]]]:
    """Return where each symbol occurs; a sum such as 'past + 1' counts for its terms."""
    found: dict[str, list[tuple[_Input, int]]] = {}
    for entry in inputs:
        for axis, dim in enumerate(entry.dims or ()):
            if isinstance(dim, str):
                for term in _terms(dim):
                    if not term.isdigit():
                        found.setdefault(term, []).append((entry, axis))
    return found


def _terms(dim: str) -> list[str]:
    terms = [term.strip() for term in dim.split("+")]
    return terms if len(terms) > 1 and all(re.fullmatch(r"\w+", t) for t in terms) else [dim]


def _batch_symbol(inputs: Sequence[_Input]) -> str | None:
    """Return the symbol that is the first axis of every input, and no other axis of any."""
    first = {(i.dims[0] if i.dims else None) for i in inputs if i.dims is None or len(i.dims) > 0}
    if len(first) != 1:
        return None
    (symbol,) = first
    if not isinstance(symbol, str) or len(_terms(symbol)) > 1:
        return None
    if any(i.sequence for i in inputs):
        return None
    others = {d for i in inputs for d in (i.dims or ())[1:]}
    return None if symbol in others else symbol


def _size_pair(symbol: str, places: Sequence[tuple[_Input, int]], step: int) -> tuple[int, int]:
    """Return the two sizes of a symbolic axis that is not the batch."""
    entry, axis = places[0]
    rank = len(entry.dims or ())
    if _PAST_NAME.search(symbol) and not symbol.startswith("?"):
        return (3, 6)
    image = rank == 4 and axis >= 2 and is_float_type(entry.elem_type)
    if image or (rank >= 3 and _SPATIAL_NAME.search(symbol) and axis > 0):
        return _SPATIAL[step]
    if axis == 0 and rank > 1:
        return (1, 2) if step == 0 else (1, 1)
    if _SEQUENCE_NAME.search(symbol) or (rank in {2, 3} and axis == 1):
        return _SEQUENCE[step]
    return _OTHER[step]


def _layout(
    inputs: Sequence[_Input], recipe: _Recipe, bound: Mapping[str, int], count: int
) -> list[tuple[Sizes, int]]:
    """Return, for each feed, the size of every symbol and the number of samples."""
    symbols = _symbols(inputs)
    batch = _batch_symbol(inputs)
    free = [s for s in symbols if s not in bound and s != batch]
    pairs = {s: _size_pair(s, symbols[s], recipe.sizes) for s in free}
    if recipe.lone:
        pairs |= {s: (1, 1) for s in free if symbols[s][0][0] is not inputs[0]}
    fixed = dict(bound)
    settled = batch is not None and batch in bound
    if recipe.batched and batch is not None and not settled:
        # the single sample first: it is the cheapest, and tells what the others will cost
        half = count // 2
        batches = [n for n in (1, count - half - 1, half) if n > 0]
    elif settled and batch is not None:
        batches = [bound[batch]] * max(2, -(-count // max(bound[batch], 1)))
    else:
        batches = [1] * count
    layout = []
    for position, size in enumerate(batches):
        chosen = {s: pair[position % 2] for s, pair in pairs.items()} | fixed
        if batch is not None:
            chosen[batch] = size
        samples = size if batch is not None and not settled else 1
        _total(chosen)
        layout.append((chosen, max(samples, 1)))
    return layout


def _total(sizes: Sizes) -> None:
    """Make 'total_...' the sum of the past and the new length, when both are there."""
    past = [s for s in sizes if _PAST_NAME.search(s) and not s.startswith(("?", "total"))]
    new = [s for s in sizes if s in {"sequence_length", "seq_len", "seq_length", "sequence"}]
    for symbol in sizes:
        if symbol.startswith("total") and past and new:
            own = symbol.replace("total", "past", 1)  # a sliding window has another length
            sizes[symbol] = sizes[own if own in past else past[0]] + sizes[new[0]]


def _concrete(entry: _Input, sizes: Sizes, given: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if entry.name in given:
        return tuple(given[entry.name])
    if entry.dims is None:
        return (1,)
    out = []
    for dim in entry.dims:
        if isinstance(dim, int):
            out.append(dim)
        else:
            out.append(sum(int(t) if t.isdigit() else sizes[t] for t in _terms(dim)))
    return tuple(out)


# --- values ------------------------------------------------------------------------------------


def _build(
    inputs: Sequence[_Input],
    recipe: _Recipe,
    layout: Sequence[tuple[Sizes, int]],
    given: Mapping[str, tuple[int, ...]],
    limits: Mapping[str, _Limits],
    seed: int,
) -> list[Feed]:
    feeds, sample = [], 0
    batch = _batch_symbol(inputs)
    for position, (sizes, samples) in enumerate(layout):
        rng = np.random.default_rng([seed, position])
        kinds = [_DISTRIBUTIONS[(sample + i) % len(_DISTRIBUTIONS)] for i in range(samples)]
        values: dict[str, Any] = {}
        for entry in inputs:
            shape = _concrete(entry, sizes, given)
            rows = samples if batch is not None and shape and shape[0] == samples else 0
            if entry.sequence:
                items = [
                    _value(entry, shape, 0, kinds, recipe, limits, rng, sample) for _ in range(2)
                ]
                values[entry.name] = items
            else:
                value = _value(entry, shape, rows, kinds, recipe, limits, rng, sample)
                values[entry.name] = np.asarray(value)  # numpy's generators give bare scalars
        feeds.append(Feed(values, _describe(recipe, kinds, inputs, values), samples))
        sample += samples
    return feeds


def _describe(
    recipe: _Recipe,
    kinds: Sequence[tuple[str, Any]],
    inputs: Sequence[_Input],
    values: Mapping[str, Any],
) -> str:
    what = recipe.describe()
    if recipe.floats == "varied" and any(is_float_type(i.elem_type) for i in inputs):
        what = ", ".join(dict.fromkeys(name for name, _ in kinds))
    shapes = ", ".join(
        f"{name} {'x'.join(map(str, v.shape)) or 'scalar'}"
        if isinstance(v, np.ndarray)
        else f"{name} (sequence of {len(v)})"
        for name, v in values.items()
    )
    return f"{what}; {shapes}" if shapes else "the model has no inputs"


def _value(
    entry: _Input,
    shape: tuple[int, ...],
    rows: int,
    kinds: Sequence[tuple[str, Any]],
    recipe: _Recipe,
    limits: Mapping[str, _Limits],
    rng: np.random.Generator,
    sample: int,
) -> Array:
    if entry.elem_type == onnx.TensorProto.STRING:
        words = np.array(["norm", "layer", "batch", "a b c", ""], dtype=object)
        return np.asarray(words[rng.integers(0, len(words), shape)], dtype=object).reshape(shape)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.elem_type)
    if is_float_type(entry.elem_type):
        return _float_value(entry, shape, rows, kinds, recipe, rng).astype(dtype)
    if np.dtype(dtype).kind == "c":
        real, imaginary = rng.standard_normal(shape), rng.standard_normal(shape)
        return np.asarray(real + 1j * imaginary).astype(dtype)
    return _integer_value(entry, shape, recipe, limits[entry.name], rng, sample).astype(dtype)


def _float_value(
    entry: _Input,
    shape: tuple[int, ...],
    rows: int,
    kinds: Sequence[tuple[str, Any]],
    recipe: _Recipe,
    rng: np.random.Generator,
) -> Array:
    if recipe.floats in {"ones", "zeros"}:
        return np.full(shape, float(recipe.floats == "ones"))
    if _MASK_NAME.search(entry.name):
        return _mask(shape, recipe.padded_masks, 0).astype(np.float64)
    if rows:
        x = np.stack([draw(rng, shape[1:]) for _, draw in kinds])
    else:
        x = np.asarray(kinds[0][1](rng, shape))
    return np.asarray(0.01 * x if recipe.floats == "small" else x)


def _mask(shape: tuple[int, ...], padded: bool, sample: int) -> Array:
    """Return ones, with zeros at the end of every second row where padding is tried."""
    mask = np.ones(shape, dtype=np.int64)
    if padded and len(shape) >= 2 and shape[-1] > 1:
        flat = mask.reshape(-1, shape[-1])
        for row in range(flat.shape[0]):
            if (row + sample) % 2:
                flat[row, -(shape[-1] // 3 or 1) :] = 0
    return mask


def _integer_value(
    entry: _Input,
    shape: tuple[int, ...],
    recipe: _Recipe,
    limit: _Limits,
    rng: np.random.Generator,
    sample: int,
) -> Array:
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(entry.elem_type))
    boolean = dtype.kind == "b"
    if recipe.integers in {"ones", "zeros"}:
        value = int(recipe.integers == "ones")
        return np.full(shape, min(value, max((limit.below or 2) - 1, 0)), dtype=np.int64)
    if _MASK_NAME.search(entry.name):
        return _mask(shape, recipe.padded_masks, sample)
    if boolean:
        return (rng.random(shape) < 0.5).astype(np.int64)
    if limit.shape_like:
        return np.ones(shape, dtype=np.int64)
    if _POSITION_NAME.search(entry.name) and shape:
        positions = np.broadcast_to(np.arange(shape[-1]), shape)
        return positions % limit.below if limit.below else positions
    if limit.below is not None:
        return rng.integers(0, max(limit.below, 1), shape)
    if limit.index:
        return rng.integers(0, 2, shape)
    if _LENGTH_NAME.search(entry.name):
        return np.ones(shape, dtype=np.int64)
    if dtype.itemsize == 1 and dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(int(info.min), int(info.max) + 1, shape)
    if dtype.kind == "V":  # the 4- and 2-bit types
        return rng.integers(0, 2, shape)
    return rng.integers(0, 10, shape)


_CARRIES: Final = frozenset(
    {
        "Cast",
        "Identity",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Flatten",
        "Transpose",
        "Slice",
        "Expand",
        "Split",
        "Concat",
        "Where",
        "Clip",
        "Max",
        "Min",
    }
)
_SHAPE_INPUTS: Final = {
    "Reshape": {1},
    "Expand": {1},
    "Tile": {1},
    "ConstantOfShape": {0},
    "TopK": {1},
    "Resize": {3},
    "Loop": {0},
}


def _limits(proto: onnx.ModelProto, entry: _Input) -> _Limits:
    """Follow an integer input to its consumers and collect what they allow."""
    if proto.functions:
        proto = _inlined(proto)
    sizes = _table_sizes(proto)
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in proto.graph.node:
        for position, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, position))
    limits = _Limits()
    frontier = [(entry.name, 0)]
    while frontier:
        name, offset = frontier.pop()
        if name in limits.seen:
            continue
        limits.seen.add(name)
        for node, position in readers.get(name, []):
            below = _below(node, position, sizes, proto)
            if below is not None:
                limits.index = True
                room = below - offset
                if room > 0:
                    limits.below = min(limits.below or room, room)
            elif position in _SHAPE_INPUTS.get(node.op_type, set()):
                limits.shape_like = True
            elif node.op_type in _CARRIES or (node.op_type == "Gather" and position == 0):
                frontier.extend((out, offset) for out in node.output)
            elif node.op_type == "Add":
                other = _scalar(proto, node.input[1 - position])
                if other is not None:  # position tables that begin with reserved rows
                    frontier.extend((out, offset + max(other, 0)) for out in node.output)
    return limits


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    inlined = proto
    with contextlib.suppress(Exception):  # advice only: without it plainer inputs are tried
        inlined = inliner.inline_local_functions(proto)
    return inlined


def _table_sizes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    sizes = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    for value in [*proto.graph.value_info, *proto.graph.input]:
        shape = value.type.tensor_type.shape
        sizes.setdefault(value.name, tuple(d.dim_value for d in shape.dim))
    for node in proto.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    sizes[node.output[0]] = tuple(attribute.t.dims)
        elif (
            node.op_type in {"Identity", "Cast", "DequantizeLinear"}
            and node.input
            and node.input[0] in sizes
        ):
            sizes.setdefault(node.output[0], sizes[node.input[0]])
    return sizes


def _scalar(proto: onnx.ModelProto, name: str) -> int | None:
    """Return the value of a small integer constant, None for anything else."""
    tensor: onnx.TensorProto | None = None
    for candidate in proto.graph.initializer:
        if candidate.name == name:
            tensor = candidate
    for node in proto.graph.node:
        if name in node.output and node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    tensor = attribute.t
                elif attribute.name == "value_int":
                    return int(attribute.i)
    if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    if math.prod(tensor.dims) != 1 or is_float_type(tensor.data_type):
        return None
    return int(onnx.numpy_helper.to_array(tensor).reshape(-1)[0])


def _below(
    node: onnx.NodeProto,
    position: int,
    sizes: Mapping[str, tuple[int, ...]],
    proto: onnx.ModelProto,
) -> int | None:
    """Return the bound that a node puts on an index input; 0 where there is one, unknown."""
    if node.op_type in {"Gather", "GatherElements", "ScatterElements"} and position == 1:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        table = sizes.get(node.input[0], ())
        return table[axis] if -len(table) <= axis < len(table) else 0
    if node.op_type in {"GatherND", "ScatterND"} and position == 1:
        table = sizes.get(node.input[0], ())
        return min((d for d in table if d), default=0)
    if node.op_type == "OneHot" and position == 0:
        return _scalar(proto, node.input[1]) or 0
    if node.op_type == "EmbedLayerNormalization" and position in {0, 1}:
        table = sizes.get(node.input[2 if position == 0 else 4], ())
        return table[0] if table else 0
    return None


# --- the user's own ----------------------------------------------------------------------------


# What numpy and its archive reader raise, as it comes, for a file that is damaged.
_UNREADABLE: Final = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def _own(inputs: Sequence[_Input], path: Path) -> Feed:
    """Read an .npz file with one array per graph input."""
    hint = f"The model's inputs are: {', '.join(i.name for i in inputs) or 'none'}."
    try:
        # opened here, because numpy leaves a file open that turns out to be no archive
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file", "Give an .npz file written by numpy.") from error
    except _UNREADABLE as error:
        # What is neither .npz nor .npy numpy takes for a pickle, and says how to open one.
        told = "" if "pickle" in str(error) else f": {error}"
        raise UsageError(
            f"{path} is no .npz file of plain arrays{told}",
            "Write it with numpy.savez(path, name=array, ...).",
        ) from error
    names = {i.name for i in inputs}
    for name in arrays:
        if name not in names:
            raise UsageError(f"{path} holds '{name}', which is no input of the model", hint)
    values: dict[str, Any] = {}
    for entry in inputs:
        if entry.name not in arrays:
            raise UsageError(f"{path} has no array for input '{entry.name}'", hint)
        values[entry.name] = _fitted(entry, arrays[entry.name], path)
    shapes = ", ".join(f"{n} {'x'.join(map(str, v.shape)) or 'scalar'}" for n, v in values.items())
    return Feed(values, f"{path.name}; {shapes}", 1)


def _fitted(entry: _Input, array: Array, path: Path) -> Array:
    if entry.sequence:
        raise UsageError(
            f"input '{entry.name}' is a sequence, which an .npz file cannot hold",
            "Leave out --inputs: sequences are generated.",
        )
    dims = entry.dims
    if dims is not None:
        spelled = f"[{', '.join(map(str, dims))}]"
        fits = len(dims) == array.ndim and all(
            isinstance(d, str) or d == n for d, n in zip(dims, array.shape, strict=True)
        )
        if not fits:
            raise UsageError(
                f"{path}: '{entry.name}' has shape {list(array.shape)}; the model wants {spelled}",
                "Save an array of the declared rank and sizes; no sample axis is added or removed.",
            )
    if entry.elem_type == onnx.TensorProto.STRING:
        if array.dtype.kind not in "US":
            raise UsageError(
                f"{path}: '{entry.name}' has dtype {array.dtype}; the model wants strings",
                "Save an array of str.",
            )
        return array.astype(object)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(entry.elem_type))
    if array.dtype == dtype:
        return array
    if array.dtype.kind == "V" and array.dtype.itemsize == dtype.itemsize:
        return array.view(dtype)  # how numpy stores bfloat16 and its like
    floats = is_float_dtype(array.dtype) and is_float_dtype(dtype)
    integers = array.dtype.kind in "iu" and (dtype.kind in "iu")
    if floats or (integers and np.array_equal(array.astype(dtype).astype(object), array)):
        return array.astype(dtype)
    raise UsageError(
        f"{path}: '{entry.name}' has dtype {array.dtype}; the model wants {dtype}",
        f"Save it with .astype({dtype.name!r}).",
    )


def smaller(feed: Feed, samples: int = 1) -> Feed:
    """Return the first samples of a batched feed, for when time is short."""
    if feed.samples <= samples:
        return feed
    # Scalars have no batch axis; every other input of a batched feed has it first.
    values = {
        name: value[:samples] if np.ndim(value) else value for name, value in feed.values.items()
    }
    return replace(feed, values=values, samples=samples)
