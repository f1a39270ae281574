"""An affine map along the edges: into the constants of what reads a value, or to what ignores it.

    (s * x + t) W + b  =  x (diag(s) W) + (b + t W)        norm(x + t) = norm(x)

Nodes are visited in graph order, each with the maps of all its inputs. A linear operator takes s
into its weight, and t W is a shift of its result that goes on until a constant that is added takes
it, or something ignores it; where nothing does, one Add behind the operator stays. What is the same
for every entry that a norm normalizes vanishes by the algebra of its nodes: x + t minus its mean,
which is the mean of x plus t. Source: the definitions of these operators in the ONNX operator
specification.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np

from onnxnorm.affine import (
    IDENTITY,
    LARGEST,
    Affine,
    Vector,
    aligned,
    carried,
    extent,
    slim,
    varies,
)
from onnxnorm.einsum import Equation
from onnxnorm.facts import AnyValue, Constant, Use
from onnxnorm.flow import Addition, Flow, Retune, concatenated, dtype_of, fits, pad
from onnxnorm.layout import Layout, Part
from onnxnorm.module import Node
from onnxnorm.moves import MOVES, Halt, moved
from onnxnorm.norm_operators import batch_norm_affine, norm_operator
from onnxnorm.port import MIXING, Inlet, bias_of, is_real, row_blocks, spread_along
from onnxnorm.shift import UNSEEN, keys
from onnxnorm.transfer import Stop, Transfer, described

Maps: TypeAlias = "dict[int, Affine]"  # of the inputs of a node, by index


def flow_forth(value: AnyValue, affine: Affine, transfer: Transfer) -> Flow | Stop:
    """How everything that reads `value` would compute the same if it read x for affine(x).

    Args:
        value: What holds affine(x) now.
        affine: The map.
        transfer: The rules on this graph.
    """
    held: set[Node] = set()
    while True:
        walk = _Walk(affine, transfer, held)
        found = walk.run(value)
        if isinstance(found, Flow) or not walk.blamed - held:
            return found
        held |= walk.blamed  # their shift stays there, and the walk is another one


def ignored(value: AnyValue, shift: Vector, transfer: Transfer) -> Flow | None:
    """How nothing that reads `value` sees a shift of it, as it is; None where something would.

    The walk ends with the first constant or attribute that would have to change.
    """
    found = _Walk(Affine.of(1.0, shift), transfer, set(), changing=False).run(value)
    return found if isinstance(found, Flow) else None


def unseen(use: Use, affine: Affine, transfer: Transfer) -> bool:
    """Whether a reader of a value makes the same of x and of affine(x), as it is."""
    node = use.node
    if node.domain == "" and node.op in ("Shape", "Size"):
        return True
    walk = _Walk(affine, transfer, set(), far=False)
    try:
        outputs = walk.through(node, {use.index: affine})
    except Halt:
        return False
    changed = walk.flow.changes or walk.flow.retunes or walk.flow.additions
    return not changed and all(made.identity for made in outputs.values())


class _Walk:
    """One walk.

    Attributes:
        held: Linear operators behind which a shift stays.
        blamed: Those whose shift stood in the way.
        far: Whether to look beyond the node for what ignores a shift.
        changing: Whether constants and attributes may change.
    """

    def __init__(
        self,
        affine: Affine,
        transfer: Transfer,
        held: set[Node],
        *,
        far: bool = True,
        changing: bool = True,
    ) -> None:
        self.affine = affine
        self.transfer = transfer
        self.facts = transfer.facts
        self.flow = Flow()
        self.held = held
        self.far = far
        self.changing = changing
        self.blamed: set[Node] = set()
        self._maps: dict[AnyValue, Affine] = {}
        self._origins: dict[AnyValue, frozenset[Node]] = {}
        self._order = self.facts.positions
        self._heap: list[tuple[int, Node]] = []
        self._known: set[Node] = set()

    def run(self, value: AnyValue) -> Flow | Stop:
        stop = self._spread(value, self.affine, frozenset())
        while self._heap and stop is None:
            _, node = heapq.heappop(self._heap)
            maps = {i: self._maps[v] for i, v in enumerate(node.inputs) if v in self._maps}
            given = (self._origins[v] for v in node.inputs if v in self._maps)
            origins: frozenset[Node] = frozenset().union(*given)
            ended = len(self.flow.ends)
            try:
                outputs = self.through(node, maps)
            except Halt as halt:
                self.blamed = set(origins)
                return Stop(node, f"{described(node)} {halt.why}")
            if not self.changing and (self.flow.changes or self.flow.retunes):
                return Stop(node, f"{described(node)} would have to change")
            if len(self.flow.ends) == ended:
                self.flow.between[node] = None
            for index, made in outputs.items():
                output = node.outputs[index]
                linear = node.op in MIXING
                own = frozenset({node}) if linear and made.shifts else frozenset()
                if own and node in self.held:
                    stop = self._hold(node, made)
                    made, own = Affine.of(made.scale), frozenset()
                if made.identity:
                    self.flow.results[output] = None
                elif stop is None:
                    stop = self._spread(output, made, origins | own)
        return self.flow if stop is None else stop

    def _hold(self, node: Node, made: Affine) -> Stop | None:
        value, dtype = node.outputs[0], dtype_of(node.outputs[0], self.facts)
        if dtype is None or not fits(value, made, self.transfer):
            return Stop(node, f"{described(node)} makes a value of unknown type or shape")
        if not (made.scale != 0.0).all():
            return Stop(node, f"{described(node)} makes what is multiplied by zero")
        # s u + t  =  s (u + t / s), and s goes on
        self.flow.additions.append(Addition(value, slim(made.shift / made.scale), dtype))
        return None

    def _spread(self, value: AnyValue, made: Affine, origins: frozenset[Node]) -> Stop | None:
        if (why := self.facts.pinned(value)) is not None:
            self.blamed = set(origins)
            return Stop(self.facts.producer(value), f"'{value.name}' is {why}")
        self._maps[value], self._origins[value] = made, origins
        for use in self.facts.uses(value):
            node = use.node
            if node.domain == "" and node.op in ("Shape", "Size"):
                continue
            if node.scope is not value.scope:
                self.blamed = set(origins)
                return Stop(node, f"{described(node)} reads it in another body")
            if node not in self._known:
                self._known.add(node)
                heapq.heappush(self._heap, (self._order[node], node))
        return None

    # ** one node **

    def through(self, node: Node, maps: Maps) -> Maps:
        """The maps of the outputs that change; what changes at the node itself is staged.

        Raises:
            Halt: It is not linear in what is mapped, or what it mixes cannot be told apart.
        """
        if node.domain != "":
            raise Halt(f"is of the domain {node.domain}, and reads it")
        if node.parametric:
            raise Halt("has a parameter of the function")
        if node.op in MOVES:
            if set(maps) != {0}:
                raise Halt("reads it as a parameter")
            return self._moved(node, maps[0])
        rule = _RULES.get(node.op)
        if rule is None:
            raise Halt("reads it, and it is not linear")
        if node.op in _BROADCASTS and node.scope.opsets[""] < 7:
            raise Halt("broadcasts by attributes, as before opset 7")
        try:
            return rule(self, node, maps)
        except (IndexError, KeyError, TypeError, ValueError):  # what its schema forbids
            raise Halt("is not as its operator is defined") from None

    def _moved(self, node: Node, given: Affine) -> Maps:
        if node.op == "Pad":
            inverse = (
                Affine.of(1.0 / given.scale, -given.shift / given.scale)
                if (given.scale != 0.0).all()
                else None
            )
            if inverse is None:
                raise Halt("pads what is multiplied by zero")
            pad(self.flow, node, inverse, self.transfer)
        counted = len(node.outputs) if node.op == "Split" else 1
        return {
            at: moved(self.transfer, node, given, forth=True, output=at)
            for at in range(counted)
            if node.outputs[at].name
        }

    def constant(self, node: Node, index: int) -> Constant | None:
        """A constant operand."""
        return self.facts.constant(node.inputs[index])


# ** operators of several tensors **


def _add(w: _Walk, node: Node, maps: Maps) -> Maps:
    """Constants take a shift; what both operands are scaled by scales their sum."""
    signs = (1.0, -1.0) if node.op == "Sub" else (1.0,) * len(node.inputs)
    scales = [m.scale for m in maps.values()]
    scale = scales[0]
    if not all(np.array_equal(scale, other) for other in scales):
        raise Halt("adds values that are scaled in two ways")
    shift: Vector = slim(sum((signs[i] * m.shift for i, m in maps.items()), np.zeros(())))
    others = [i for i in range(len(signs)) if i not in maps]
    scaled = bool((scale != 1.0).any())
    if not scaled and not shift.any():
        return {0: IDENTITY}
    constants = [i for i in others if w.constant(node, i) is not None]
    if scaled and len(constants) < len(others):
        dynamic = next(node.inputs[i] for i in others if i not in constants)
        raise Halt(f"adds '{dynamic.name}', which is not scaled")
    if scaled and others and not (scale != 0.0).all():
        raise Halt("adds to what is multiplied by zero")
    for at, index in enumerate(constants):
        # s x + t + c  =  s (x + (t + c) / s)
        taken = signs[index] * shift if at == 0 else np.zeros(())
        w.flow.change(node, index, w.transfer, slim(1.0 / scale), slim(taken / scale))
        w.flow.ends[node] = None
    return {0: Affine.of(scale, 0.0 if constants else shift)}


def _mul(w: _Walk, node: Node, maps: Maps) -> Maps:
    if len(maps) == 2:
        if any(m.shifts for m in maps.values()):
            raise Halt("multiplies what is shifted")
        return {0: Affine.of(maps[0].scale * maps[1].scale)}
    ((index, given),) = maps.items()
    if not given.shifts:
        return {0: given}
    constant = w.constant(node, 1 - index)
    if constant is None:
        raise Halt("multiplies what is shifted")
    if math.prod(constant.shape) > LARGEST or not is_real(constant.dtype):
        raise Halt("multiplies by a large constant")
    return {0: Affine.of(given.scale, given.shift * constant.float64())}


def _div(w: _Walk, node: Node, maps: Maps) -> Maps:
    above, below = maps.get(0, IDENTITY), maps.get(1, IDENTITY)
    if below.shifts or not (below.scale != 0.0).all():
        raise Halt("divides by what is shifted, or by zero")
    shift: Vector = np.zeros(())
    if above.shifts:
        constant = w.constant(node, 1)
        if constant is None or math.prod(constant.shape) > LARGEST:
            raise Halt("divides what is shifted")
        divisor = constant.float64()
        if not (divisor != 0.0).all():
            raise Halt("divides by zero")
        shift = above.shift / divisor
    return {0: Affine.of(above.scale / below.scale, shift)}


def _pow(w: _Walk, node: Node, maps: Maps) -> Maps:
    exponent = w.constant(node, 1)
    if set(maps) != {0} or maps[0].shifts or exponent is None or math.prod(exponent.shape) != 1:
        raise Halt("takes a power of it")
    power = float(exponent.float64().reshape(-1)[0])
    if not (maps[0].positive or power == 2.0):
        raise Halt("takes a power of it, and its factor is not positive")
    return {0: Affine.of(maps[0].scale ** power)}


def _sqrt(w: _Walk, node: Node, maps: Maps) -> Maps:
    if maps[0].shifts or not maps[0].positive:
        raise Halt("takes a root of it")
    return {0: Affine.of(np.sqrt(maps[0].scale))}


def _reciprocal(w: _Walk, node: Node, maps: Maps) -> Maps:
    if maps[0].shifts or not (maps[0].scale != 0.0).all():
        raise Halt("divides by it")
    return {0: Affine.of(1.0 / maps[0].scale)}


def _extreme(w: _Walk, node: Node, maps: Maps) -> Maps:
    """The largest of values with one increasing map; constants are mapped back."""
    given = next(iter(maps.values()))
    if not given.positive or not all(m.same(given) for m in maps.values()):
        raise Halt("compares it with other values")
    for index, value in enumerate(node.inputs):
        if index in maps:
            continue
        if w.facts.constant(value) is None:
            raise Halt(f"compares it with '{value.name}'")
        w.flow.change(
            node, index, w.transfer, slim(1.0 / given.scale), slim(-given.shift / given.scale)
        )
    return {0: given}


def _same(w: _Walk, node: Node, maps: Maps) -> Maps:
    """Where and Mean: all that they mix has to be mapped alike."""
    mixed = {1, 2} if node.op == "Where" else set(range(len(node.inputs)))
    given = next(iter(maps.values()))
    if set(maps) != mixed or not all(m.same(given) for m in maps.values()):
        raise Halt("mixes it with other values")
    return {0: given}


def _concat(w: _Walk, node: Node, maps: Maps) -> Maps:
    """Along the channels each part keeps its map; along another axis all must have the same."""
    given = [maps.get(i, IDENTITY) for i in range(len(node.inputs))]
    if all(m.same(given[0]) for m in given) and given[0].scale.size == given[0].shift.size == 1:
        return {0: given[0]}
    axis, starts = concatenated(node, w.transfer)
    others = {a for m in given for v in (m.scale, m.shift) for a in varies(v)} - {axis}
    if others:
        if any(extent(v, axis) > 1 for m in given for v in (m.scale, m.shift)):
            raise Halt("joins maps that vary along several axes")
        if not all(m.same(given[0]) for m in given):
            raise Halt("joins values that are mapped in different ways")
        return {0: given[0]}
    total = starts[-1]
    if total > LARGEST:
        raise Halt("joins too many channels")
    vectors = []
    for part in ("scale", "shift"):
        whole = np.zeros(total)
        for at, m in enumerate(given):
            whole[starts[at] : starts[at + 1]] = getattr(m, part).reshape(-1)
        vectors.append(whole.reshape(-1, *(1,) * (-axis - 1)))
    return {0: Affine.of(*vectors)}


# ** linear operators **


def _matmul(w: _Walk, node: Node, maps: Maps) -> Maps:
    """X W, W X, and the product of two values."""
    if len(maps) > 1:
        return _multiplied(maps)
    ((index, given),) = maps.items()
    along = -1 if index == 0 else -2  # the axis of the value that is contracted
    weight = w.constant(node, 1 - index)
    rank = w.transfer.rank(node.inputs[index])
    if rank is None or rank < 2:
        raise Halt("multiplies a value of unknown rank")
    axes = set(varies(given.scale))
    if weight is None or not is_real(weight.dtype) or len(weight.shape) < 2:
        if given.shifts or along in axes:
            raise Halt("multiplies it by what is computed")
        return {0: given}
    size = weight.shape[-3 - along]
    scale = given.scale
    if axes <= {along} and given.scales:
        factors = np.broadcast_to(scale.reshape(-1), (size,))
        shaped = factors[:, None] if index == 0 else factors
        w.flow.change(node, 1 - index, w.transfer, shaped, bias=False)
        w.flow.ends[node] = None
        scale = np.ones(())
    elif along in axes:
        raise Halt("mixes channels that are scaled along several axes")
    if not given.shifts:
        return {0: Affine.of(scale)}
    if index == 0 and not varies(given.shift)[:-1] and extent(given.shift, -1) in (1, size):
        layout = Layout((Part(-1, size),))
        if not (scale != 1.0).any() and _makes_keys(w, node, index, layout):
            return {0: IDENTITY}
    spread = aligned(given.shift, 2)
    wide = [*spread.shape]
    wide[along] = size
    spread = np.broadcast_to(spread, wide)
    if spread.size > LARGEST:
        raise Halt("takes a shift that varies along too many axes")
    made = _times(spread, weight) if index == 0 else np.matmul(weight.float64(), spread)
    return {0: Affine.of(scale, made)}


def _einsum(w: _Walk, node: Node, maps: Maps) -> Maps:
    """A product with a weight, or of values; what it does not sum over goes where its axes go."""
    if len(maps) > 1:
        return _multiplied(maps)
    ((index, given),) = maps.items()
    equation, inlet = Equation.of(node), Inlet.of(node, index, w.facts)
    if equation is None:
        raise Halt("has an equation that takes a diagonal or is not known")
    axes, scale = varies(given.scale), given.scale
    summed = {} if isinstance(inlet, str) else inlet.axes
    if not isinstance(inlet, str) and set(axes) <= set(summed) and given.scales:
        w.flow.change(node, inlet.weight_index, w.transfer, inlet.factors(scale), bias=False)
        w.flow.ends[node] = None
        scale = np.ones(())
    elif axes:
        places = equation.carried(axes, index)
        if places is None:
            raise Halt("mixes channels that are scaled in different ways")
        scale = carried(scale, dict(zip(axes, places[1], strict=True)))
    if not given.shifts:
        return {0: Affine.of(scale)}
    if isinstance(inlet, str) or set(varies(given.shift)) - set(summed):
        raise Halt("multiplies what is shifted by what is computed, or along another axis")
    layout = Layout(tuple(Part(a, inlet.weight.shape[summed[a]]) for a in sorted(summed)))
    if not (scale != 1.0).any() and _makes_keys(w, node, index, layout):
        return {0: IDENTITY}
    return {0: Affine.of(scale, inlet.through(_spread_over(given.shift, inlet)))}


def _multiplied(maps: Maps) -> Maps:
    """The map of a product of values that are all mapped."""
    if any(m.shifts or m.scale.size > 1 for m in maps.values()):
        raise Halt("multiplies two values with different factors")
    return {0: Affine.of(math.prod(float(m.scale) for m in maps.values()))}


def _makes_keys(w: _Walk, node: Node, index: int, layout: Layout) -> bool:
    """Whether a product with a weight makes keys of attention alone, which ignore a shift."""
    blind = keys(node, index, layout, w.transfer) if w.far else None
    if blind is None:
        return False
    w.flow.between.update(dict.fromkeys(blind))
    w.flow.results.update(dict.fromkeys(n.outputs[0] for n in blind if n.op in UNSEEN))
    return True


def _spread_over(shift: Vector, inlet: Inlet) -> Vector:
    """A shift with an entry of its own wherever the operator sums."""
    shape = [1] * max(-a for a in inlet.axes)
    for axis, at in inlet.axes.items():
        shape[axis] = inlet.weight.shape[at]
    return np.broadcast_to(aligned(shift, len(shape)), shape)


def _times(left: Vector, weight: Constant) -> Vector:
    """A shift times a weight in float64, in runs of rows of the weight."""
    array = weight.array()
    if array.ndim > 2:
        return np.asarray(np.matmul(left, array.astype(np.float64)))
    total = np.zeros((*left.shape[:-1], array.shape[1]))
    for rows in row_blocks(array):
        total += left[..., rows] @ array[rows].astype(np.float64)
    return total


def _gemm(w: _Walk, node: Node, maps: Maps) -> Maps:
    """Alpha A B + beta C."""
    if len(maps) > 1:
        raise Halt("reads it twice")
    ((index, given),) = maps.items()
    gain, beta = (float(node.attrs.get(n, 1.0)) for n in ("alpha", "beta"))
    if index == 2:
        if given.scales:
            raise Halt("adds it to what is not scaled")
        return {0: Affine.of(1.0, beta * given.shift)}
    flipped = [bool(node.attrs.get(n, 0)) for n in ("transA", "transB")]
    weight = w.constant(node, 1 - index)
    if weight is None or not is_real(weight.dtype) or len(weight.shape) != 2:
        raise Halt("multiplies it by what is computed")
    along = -2 if flipped[index] != (index == 1) else -1  # the contracted axis of the value
    axis = (-1 if flipped[1] else -2) if index == 0 else (-2 if flipped[0] else -1)
    size = weight.shape[axis]
    scale = given.scale
    if set(varies(scale)) - {along}:
        raise Halt("is linear along another axis than the one that is scaled")
    if given.scales:
        factors = np.broadcast_to(scale.reshape(-1), (size,))
        shaped = factors[:, None] if axis == -2 else factors
        w.flow.change(node, 1 - index, w.transfer, shaped, bias=False)
    w.flow.ends[node] = None
    if not given.shifts:
        return {0: IDENTITY}
    spread = aligned(given.shift, 2)
    wide = [*spread.shape]
    wide[along] = size
    spread = np.broadcast_to(spread, wide)
    matrix = weight.float64()
    if index == 0:
        left = spread.T if flipped[0] else spread
        made = left @ (matrix.T if flipped[1] else matrix)
    else:
        right = spread.T if flipped[1] else spread
        made = (matrix.T if flipped[0] else matrix) @ right
    made = slim(gain * made)
    place = bias_of(node, w.facts)
    if isinstance(place, str):
        return {0: Affine.of(1.0, made)}
    w.flow.change(node, 2, w.transfer, shift=made / place.gain, dtype=weight.dtype)
    return {0: IDENTITY}


def _conv(w: _Walk, node: Node, maps: Maps) -> Maps:
    """A convolution, grouped or not; where it pads, a shift becomes a map over the positions."""
    if set(maps) != {0}:
        raise Halt("reads it as its weight or bias")
    given, weight = maps[0], w.constant(node, 1)
    if weight is None or not is_real(weight.dtype) or len(weight.shape) < 3:
        if given.shifts or given.scale.size > 1:
            raise Halt("has a weight that is computed")
        if len(node.inputs) > 2 and node.inputs[2].name:
            raise Halt("has a weight that is computed, and a bias")
        return {0: given}
    rank, groups = len(weight.shape), int(node.attrs.get("group", 1))
    axis = 1 - rank
    transposed = node.op == "ConvTranspose"
    inputs = weight.shape[0] if transposed else weight.shape[1] * groups
    if {*varies(given.scale), *varies(given.shift)} - {axis}:
        raise Halt("is linear along another axis than the one that is scaled")
    if any(v.size not in (1, inputs) for v in (given.scale, given.shift)):
        raise Halt(
            f"has a weight '{weight.name}' of shape {list(weight.shape)}, which does not fit"
        )
    if given.scales:
        factors = np.broadcast_to(given.scale.reshape(-1), (inputs,))
        # (C, M / g, *kernel) and (M, C / g, *kernel)
        along = (-rank, 1) if transposed else (axis, groups)
        w.flow.change(node, 1, w.transfer, spread_along(factors, weight.shape, *along), bias=False)
    w.flow.ends[node] = None
    if not given.shifts:
        return {0: IDENTITY}
    if transposed:
        raise Halt("adds up as many neighbours as there are, and takes no shift")
    shift = np.broadcast_to(given.shift.reshape(-1), (inputs,))
    taps = _taps(shift, weight, groups)
    outputs = weight.shape[0]
    if _pads(node, weight.shape[2:]):
        return {0: Affine.of(1.0, _border(w, node, taps))}
    made = taps.reshape(outputs, -1).sum(axis=1)
    if isinstance(bias_of(node, w.facts), str):
        return {0: Affine.of(1.0, made.reshape(-1, *(1,) * (rank - 2)))}
    w.flow.change(node, 2, w.transfer, shift=made, dtype=weight.dtype)
    return {0: IDENTITY}


def _taps(shift: Vector, weight: Constant, groups: int) -> Vector:
    """What a shift adds at each tap of the kernel: (M, *kernel)."""
    array = weight.array()
    given = spread_along(shift, weight.shape, 1 - array.ndim, groups)
    taps = np.zeros((array.shape[0], *array.shape[2:]))
    for rows in row_blocks(array):
        factors = given if groups == 1 else given[rows]
        taps[rows] = (array[rows].astype(np.float64) * factors).sum(axis=1)
    return taps


def _pads(node: Node, kernel: tuple[int, ...]) -> bool:
    """Whether a convolution reads beyond the edge; SAME_* does for every kernel but one of 1."""
    automatic = node.text("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        return any(n != 1 for n in kernel)
    return automatic in ("NOTSET", "") and any(node.attrs.get("pads", ()))


def _border(w: _Walk, node: Node, taps: Vector) -> Vector:
    """What a shift adds at each position of a padded convolution: the taps that lie inside.

    B[o, p] = sum over k with 0 <= p stride + k dilation - pad < size of taps[o, k]
    """
    sizes = w.transfer.sizes.of(node.inputs[0])
    pads, space = node.attrs.get("pads", ()), taps.ndim - 1
    known = sizes is not None and all(isinstance(n, int) for n in sizes[2:])
    if sizes is None or not known or node.text("auto_pad", "NOTSET") not in ("NOTSET", ""):
        raise Halt("pads with zeros, and takes no shift")
    strides, dilations = (node.attrs.get(n, [1] * space) for n in ("strides", "dilations"))
    inside = taps
    for at in range(space):
        kernel, size = taps.shape[1 + at], sizes[2 + at]
        assert isinstance(size, int), "they are known"
        reach = dilations[at] * (kernel - 1) + 1
        count = (size + pads[at] + pads[space + at] - reach) // strides[at] + 1
        starts = np.arange(count)[:, None] * strides[at] - pads[at]
        reads = starts + np.arange(kernel)[None, :] * dilations[at]
        mask = ((reads >= 0) & (reads < size)).astype(np.float64)
        # The kernel axis that comes next is replaced by one of positions, which goes last.
        inside = np.tensordot(inside, mask, axes=(1, 1))
    if inside.size > LARGEST:
        raise Halt("pads with zeros, and its result is too large to hold what a shift adds")
    return inside


# ** norms, and what else ignores a map **


def _normalized(w: _Walk, node: Node, maps: Maps) -> Maps:
    """What is the same for all that a norm normalizes; one factor goes into epsilon."""
    if set(maps) != {0}:
        raise Halt("reads it as a parameter")
    given, rank = maps[0], w.transfer.rank(node.inputs[0])
    told = norm_operator(node, rank)
    if told is None or told.reason or told.axes is None or rank is None:
        raise Halt("normalizes it along axes that are not known")
    if any(v.name for v in node.outputs[1:]):
        raise Halt("normalizes it, and its statistics are read too")
    along = {a - rank for a in told.axes}
    shifted, scaled = set(varies(given.shift)), set(varies(given.scale))
    if given.shifts and told.kind in ("rms_norm", "l2_norm"):
        raise Halt("normalizes it by its size, which a shift changes")
    if told.kind == "group_norm" and shifted == {1 - rank}:
        groups = node.attrs.get("num_groups")
        grouped = given.shift.reshape(int(groups), -1) if groups else given.shift.reshape(1, -1)
        if not (grouped == grouped[:, :1]).all():
            raise Halt("normalizes over channels that are shifted in different ways")
    elif shifted & along:
        raise Halt("normalizes over channels that are shifted in different ways")
    if not given.scales:
        return {0: IDENTITY}
    if told.kind in ("softmax", "log_softmax"):
        raise Halt("is not linear")
    if scaled & along:
        raise Halt("normalizes over channels that are scaled in different ways")
    if not given.positive:
        raise Halt("normalizes it, and keeps the sign of its factor")
    if told.kind == "l2_norm":
        return {0: IDENTITY}
    if given.scale.size > 1 or told.epsilon is None:
        raise Halt("has one epsilon, for channels with different factors")
    epsilon = told.epsilon / float(given.scale) ** 2
    if not np.finfo(np.float32).smallest_normal <= epsilon <= 1e30:
        raise Halt("would have an epsilon that its type does not hold")
    w.flow.retunes.append(Retune(node, {"epsilon": epsilon}))
    w.flow.ends[node] = None
    return {0: IDENTITY}


def _batch_norm(w: _Walk, node: Node, maps: Maps) -> Maps:
    """A map in front of another: gamma (s x + t - mean) / d + beta is linear in x too."""
    if set(maps) != {0}:
        raise Halt("reads it as a parameter")
    rank = w.transfer.rank(node.inputs[0])
    found = batch_norm_affine(node, w.facts)
    if isinstance(found, str) or rank is None:
        raise Halt(f"reads it, and {found}" if isinstance(found, str) else "has an unknown rank")
    scale, given = found[0], maps[0]
    if {*varies(given.scale), *varies(given.shift)} - {1 - rank} or not np.isfinite(scale).all():
        raise Halt("scales along another axis")
    own, added = (np.broadcast_to(v.reshape(-1), scale.shape) for v in (given.scale, given.shift))
    mean = w.constant(node, 3)
    assert mean is not None, "its affine is known"
    # gamma s (x - mean) / d + beta'  =  (gamma / d) (s x + t - mean) + beta
    shift = scale * (added + (own - 1.0) * mean.float64())
    w.flow.change(node, 1, w.transfer, own, bias=False)
    w.flow.change(node, 2, w.transfer, shift=shift)
    w.flow.ends[node] = None
    return {0: IDENTITY}


def _arg(w: _Walk, node: Node, maps: Maps) -> Maps:
    rank = w.transfer.rank(node.inputs[0])
    axis = int(node.attrs.get("axis", 0))
    axis = axis if axis < 0 or rank is None else axis - rank
    if axis >= 0 or axis in {*varies(maps[0].scale), *varies(maps[0].shift)}:
        raise Halt("compares channels that are mapped in different ways")
    if not maps[0].positive:
        raise Halt("compares what is multiplied by a factor that is not positive")
    return {0: IDENTITY}


_BROADCASTS: Final = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Pow", "Sum"})
_RULES: Final[dict[str, Callable[[_Walk, Node, Maps], Maps]]] = {
    **dict.fromkeys(("Add", "Sub", "Sum"), _add),
    "Mul": _mul,
    "Div": _div,
    "Pow": _pow,
    "Sqrt": _sqrt,
    "Reciprocal": _reciprocal,
    **dict.fromkeys(("Max", "Min"), _extreme),
    **dict.fromkeys(("Mean", "Where"), _same),
    "Concat": _concat,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    **dict.fromkeys(
        (
            "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax",
            "LpNormalization", "RMSNormalization", "Softmax",
        ),
        _normalized,
    ),
    "BatchNormalization": _batch_norm,
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
}  # fmt: skip
