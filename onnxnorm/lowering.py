"""Which operators a canonical norm is written with: the one table of forms.

The rows of `FORMS` are tried in order; the first one whose conditions hold for the target, the
onnxruntime version, the opset, the axes, the shape and the type is taken. Where none holds, or the
nodes of the file are that form already, the norm keeps its own nodes, and the reason is said.

    target      what may be written
    onnx        standard operators of the file's opset; below opset 17 (layer norm) and 23 (RMS
                norm) the chain of primitives that onnxruntime fuses when it loads the model
    ort-cpu     also LayerNormalization and SimplifiedLayerNormalization at any opset: onnxruntime
                keeps both in ONNX's own domain from version 1 on; and Attention for a softmax with
                what is around it (`ATTENTION`, written by lower-attention)
    ort-cuda    also SkipLayerNormalization and SkipSimplifiedLayerNormalization, which take the
                residual Add in front of a norm along (`RESIDUAL`, written by lower-skip-norm)

A row says since which onnxruntime its operator is there, what it was measured at, and what is known
to be wrong with it. How a form is written is in `onnxnorm.spellings`. Calls of our own operators
are rows too (`OWN`); the sizes from which on they pay are in `onnxnorm.ops.costs`. Nothing was
measured on CUDA: its rows rest on the number of kernels and bytes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import onnx

from onnxnorm.facts import Facts
from onnxnorm.norms import Norm
from onnxnorm.site import Site
from onnxnorm.spellings import (
    Emit,
    emit_chain,
    emit_group_norm,
    emit_instance_norm,
    emit_layer_norm,
    emit_rms,
    emit_softmax,
    emit_transposed,
)

Check: TypeAlias = "Callable[[Site], str | None]"
Version: TypeAlias = "tuple[int, int]"
Choices: TypeAlias = "tuple[tuple[str, str], ...]"  # place of a norm, and the name of its form

TARGETS: Final = ("onnx", "ort-cpu", "ort-cuda")
ORT: Final = ("ort-cpu", "ort-cuda")
OLDEST_RUNTIME: Final = "1.23"  # the oldest onnxruntime that this package runs with
KEEP: Final = "its own nodes"  # what a choice names that leaves a norm as it is
NEWEST_OPSET: Final[dict[Version, int]] = {  # by onnxruntime, as it loads them
    (1, 17): 20,
    (1, 18): 21,
    (1, 21): 22,
    (1, 23): 23,
    (1, 24): 25,
    (1, 25): 26,
}
NOT_MEASURED: Final = "nothing was measured on CUDA"

_FLOAT: Final = onnx.TensorProto.FLOAT
_KERNELS: Final = (_FLOAT, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True)
class Form:
    """One way to write a kind of norm: a row of the table.

    Attributes:
        name: What it is written with.
        kinds: The kinds it can be.
        targets: The targets it may be written for.
        written_by: The pass that writes it.
        since: The first onnxruntime that was seen to run it, on the CPU.
        measured: What it was measured at, against which other form; "" for nothing.
        defects: What is known to be wrong with it, and where.
    """

    name: str
    kinds: tuple[str, ...]
    targets: tuple[str, ...] = TARGETS
    written_by: str = "lower-norms"
    since: Version = (1, 15)
    measured: str = ""
    defects: str = ""


@dataclass(frozen=True)
class Spelling(Form):
    """A form that takes the place of a norm's own nodes.

    Attributes:
        check: Why it cannot be used; None where it can; "" where it is not worth a word.
        emit: Writes it in the norm's place.
        already: Whether a norm is written so already.
    """

    check: Check = lambda site: ""
    emit: Emit = lambda site, rw: None
    already: Callable[[Norm, Facts], bool] = lambda norm, facts: False


def choose(
    norm: Norm,
    facts: Facts,
    target: str,
    runtime: Version = (1, 23),
    wanted: str | None = None,
) -> tuple[Spelling, Site] | str:
    """How a norm is to be written for a target, or why it keeps the nodes it has.

    Args:
        norm: The norm.
        facts: The facts under which it was found.
        target: One of `TARGETS`.
        runtime: The onnxruntime that the model is for.
        wanted: The name of a form, or `KEEP`, to take and no other; None is the first that holds.
    """
    if norm.operator:
        return "it is one operator already"
    if wanted == KEEP:
        return "the choices keep its own nodes"
    site = Site.of(norm, facts, target)
    reasons: dict[str, list[str]] = {}
    for spelling in FORMS:
        if norm.kind not in spelling.kinds or wanted not in (None, spelling.name):
            continue
        if spelling.already(norm, facts):
            return f"it is written as {spelling.name} already"
        reason = lack(spelling, site, runtime)
        if reason is None:
            return spelling, site
        if reason:
            reasons.setdefault(reason, []).append(spelling.name)
    said = [f"{reason} (for {' and '.join(names)})" for reason, names in reasons.items()]
    if wanted is not None and not said:
        return f"the choices name '{wanted}', which is no form of {_A.get(norm.kind, norm.kind)}"
    return "; ".join(said) or f"no cheaper spelling of {_A.get(norm.kind, norm.kind)} is known"


def candidates(
    norm: Norm, facts: Facts, target: str, runtime: Version = (1, 23)
) -> list[tuple[Spelling, Site]]:
    """Every form that a norm can have for a target, but for the nodes it has; in table order."""
    if norm.operator or norm.obstacle or not norm.recognised:
        return []
    site = Site.of(norm, facts, target)
    rows = [s for s in FORMS if norm.kind in s.kinds and not s.already(norm, facts)]
    return [(s, site) for s in rows if lack(s, site, runtime) is None]


def lack(spelling: Spelling, site: Site, runtime: Version) -> str | None:
    """Why a form cannot be written at a site; None where it can, "" where no word is worth it."""
    if site.target not in spelling.targets:
        return ""
    if site.target != "onnx" and runtime < spelling.since:
        since, given = (".".join(map(str, v)) for v in (spelling.since, runtime))
        return f"it needs onnxruntime {since}, and the model is for {given}"
    return spelling.check(site)


_A: Final = {
    "l2_norm": "an L2 norm",
    "filter_response_norm": "a filter response norm",
}


def _is_chain(norm: Norm, facts: Facts) -> bool:
    """Whether a norm's nodes are the chain that onnxruntime fuses, and fuses rightly."""
    ops = sorted(n.op for n in norm.nodes if n.op != "Cast")
    centred = ["Add", "Div", "Mul", "Pow", "ReduceMean", "Sqrt"]
    wanted = centred + (["Add", "ReduceMean", "Sub"] if norm.kind == "layer_norm" else [])
    if norm.kind == "rms_norm" and norm.beta is not None:
        wanted.append("Add")
    if ops != sorted(wanted) or norm.warning:
        return False
    for node in norm.nodes:
        constants = [facts.constant(v) for v in node.inputs]
        if node.op == "Mul" and not any(c is not None and len(c.shape) == 1 for c in constants):
            return False
        if node.op == "Pow" and constants[1] is None:
            return False
    return True


def _is_grouped(norm: Norm, facts: Facts) -> bool:
    """Whether a group norm is an InstanceNormalization on groups."""
    return any(n.op == "InstanceNormalization" for n in norm.nodes)


# ** conditions **


def _own_factors(site: Site) -> str | None:
    """Operators take factors over the normalized axes and no others."""
    axes, rank = site.norm.axes or (), site.rank
    for factor in (site.norm.gamma, site.norm.beta):
        if isinstance(factor, np.ndarray) and rank is not None:
            along = {rank - factor.ndim + a for a, n in enumerate(factor.shape) if n > 1}
            if not along <= {a % rank for a in axes}:
                return "its factors vary along other axes too"
    return None


def _common(site: Site) -> str | None:
    """What every spelling needs."""
    norm = site.norm
    if any(f is not None and not isinstance(f, np.ndarray) for f in (norm.gamma, norm.beta)):
        return "its factors are computed at run time"
    if not site.given or not site.wanted:
        return f"the type of '{norm.input.name}' is not known"
    for element in (site.given, site.wanted):
        if element == onnx.TensorProto.DOUBLE:
            if norm.epsilon is not None:
                return "operators have their epsilon in float32, which is not exact for double"
        elif element not in _KERNELS:
            name = onnx.TensorProto.DataType.Name(element).lower()
            return f"onnxruntime's CPU has no kernel in {name}"
    return None


def _standard(opset: int) -> Callable[[Site], str | None]:
    def check(site: Site) -> str | None:
        if site.opset >= opset or site.target != "onnx":
            return None
        return f"it needs opset {opset}, and the model has {site.opset}"

    return check


def _trailing(site: Site) -> str | None:
    if not site.trailing:
        return f"axes {list(site.norm.axes or ())} are not the last ones, or the rank is unknown"
    if site.features is None:
        return "the sizes of the normalized axes are not known"
    return _own_factors(site)


def _one_axis(site: Site) -> str | None:
    if site.rank is None or site.norm.axes is None or len(site.norm.axes) != 1:
        return "it is not over one axis of a tensor of known rank"
    if site.rank < 3:
        return "a matrix is not worth transposing"
    if site.features is None:
        return "the size of the normalized axis is not known"
    return _own_factors(site)


def _fused(site: Site) -> str | None:
    if site.norm.axes is None or len(site.norm.axes) != 1 or not site.trailing:
        return "onnxruntime fuses it over the last axis only"
    if site.scaled:
        return "onnxruntime would fuse it with the factor behind it, which is not its own"
    return None


def _plain(site: Site) -> str | None:
    if site.centred:
        return "with the difference in front of it onnxruntime would take it for a layer norm"
    return None


def _float_channels(site: Site) -> str | None:
    if site.given != _FLOAT or site.wanted != _FLOAT:
        return "onnxruntime's InstanceNormalization is for float32"
    if site.channels is None:
        return "the number of channels is not known"
    if site.rank is None or site.rank < 3:
        return "it has no spatial axes"
    last = site.norm.kind == "instance_norm" and site.norm.axes != tuple(range(2, site.rank))
    if last or site.norm.channel != 1:
        return "its channels are the last axis"
    if site.features is not None and math.prod(site.features) == 1:
        # x s - mean s, as onnxruntime computes it, is not 0 when s is 1 / sqrt(eps).
        return "it normalizes single values, and onnxruntime's InstanceNormalization loses their 0"
    return None


def _softmax_axis(site: Site) -> str | None:
    axes = site.norm.axes or ()
    if len(axes) != 1:
        return "it is over several axes"
    if site.opset < 13 and (site.rank is None or axes[0] % site.rank != site.rank - 1):
        return "below opset 13 the operator takes all axes from one on together"
    return None


def _all(*checks: Callable[[Site], str | None]) -> Callable[[Site], str | None]:
    def check(site: Site) -> str | None:
        return next((reason for c in (_common, *checks) if (reason := c(site)) is not None), None)

    return check


_TRANSPOSED: Final = (
    "a layer norm over channels of 1x64x128x128 takes 3 to 5 ms so, and 9 to 18 ms as primitives"
    " (onnxruntime 1.31, CPU, AVX2, one thread, 2026-11)"
)
_CHAIN: Final = "as fast as the operator, which onnxruntime makes of it when it loads the model"
_HALF_SUMS: Final = (
    "CUDA kernels before onnxruntime PR 28682 had their sums in float16 (issue 29034): outputs of"
    " zeros"
)
_FULL_RANK: Final = (
    "on CUDA a scale of another rank than the input was wrong (onnxruntime PR 28971): scales are"
    " written over the normalized axes alone"
)
_IN_FUNCTIONS: Final = "onnxruntime 1.31.1 dies on it in a model-local function: never there"

# The first row whose conditions hold is taken.
FORMS: Final[tuple[Spelling, ...]] = (
    Spelling(
        "LayerNormalization",
        ("layer_norm",),
        measured="1024x768: 0.54 ms (onnxruntime 1.31, CPU, AVX2, one thread, 2026-11)",
        defects=_FULL_RANK,
        check=_all(_standard(17), _trailing),
        emit=emit_layer_norm,
    ),
    Spelling(
        "LayerNormalization between Transposes",
        ("layer_norm",),
        measured=_TRANSPOSED,
        check=_all(_standard(17), _one_axis),
        emit=emit_transposed("LayerNormalization"),
    ),
    Spelling(
        "the chain that onnxruntime fuses to LayerNormalization",
        ("layer_norm",),
        measured=_CHAIN,
        defects="onnxruntime 1.31 and 1.32 also fuse what only looks like it: see below; before"
        " 1.30 it lost the epsilon of a float16 chain from opset 17 on, where none is written",
        check=_all(_trailing, _fused),
        emit=emit_chain,
        already=_is_chain,
    ),
    Spelling(
        "RMSNormalization",
        ("rms_norm",),
        targets=("onnx",),
        since=(1, 23),
        measured="1024x768: 0.28 ms (onnxruntime 1.31, CPU, AVX2, one thread, 2026-11)",
        defects=_FULL_RANK,
        check=_all(_standard(23), _trailing),
        emit=emit_rms("RMSNormalization"),
    ),
    Spelling(
        "SimplifiedLayerNormalization",
        ("rms_norm",),
        targets=ORT,
        measured="the kernel of RMSNormalization",
        defects=f"{_IN_FUNCTIONS}; {_HALF_SUMS}",
        check=_all(_trailing),
        emit=emit_rms("SimplifiedLayerNormalization"),
    ),
    Spelling(
        "RMSNormalization between Transposes",
        ("rms_norm",),
        targets=("onnx",),
        since=(1, 23),
        measured=_TRANSPOSED,
        check=_all(_standard(23), _one_axis),
        emit=emit_transposed("RMSNormalization"),
    ),
    Spelling(
        "SimplifiedLayerNormalization between Transposes",
        ("rms_norm",),
        targets=ORT,
        measured=_TRANSPOSED,
        defects=_IN_FUNCTIONS,
        check=_all(_one_axis),
        emit=emit_transposed("SimplifiedLayerNormalization"),
    ),
    Spelling(
        "the chain that onnxruntime fuses to an RMS norm",
        ("rms_norm",),
        measured=_CHAIN,
        check=_all(_trailing, _fused, _plain),
        emit=emit_chain,
        already=_is_chain,
    ),
    Spelling(
        "InstanceNormalization",
        ("instance_norm",),
        check=_all(_float_channels),
        emit=emit_instance_norm,
    ),
    Spelling(
        "InstanceNormalization between Reshapes",
        ("group_norm",),
        measured="8 groups of 1x64x128x128: 1.5 ms, as GroupNormalization(21) 3.3 ms"
        " (onnxruntime 1.31, CPU, AVX2, one thread, 2026-11)",
        check=_all(_float_channels),
        emit=emit_group_norm,
        already=_is_grouped,
    ),
    Spelling(
        "Softmax",
        ("softmax",),
        check=_all(_softmax_axis),
        emit=emit_softmax("Softmax"),
    ),
    Spelling(
        "LogSoftmax",
        ("log_softmax",),
        check=_all(_softmax_axis),
        emit=emit_softmax("LogSoftmax"),
    ),
)

_LOSES: Final = (
    "loses on the CPU: 4.8 ms more at 1024x768, where Add and LayerNormalization together take 0.85"
    " (onnxruntime 1.31, AVX2, one thread, 2026-11); on CUDA not measured"
)
# A residual Add and the norm that reads it, as one operator of onnxruntime.
RESIDUAL: Final[tuple[Form, ...]] = (
    Form(
        "SkipLayerNormalization",
        ("layer_norm",),
        targets=("ort-cuda",),
        written_by="lower-skip-norm",
        since=(1, 16),
        measured=_LOSES,
        defects="onnxruntime 1.15 runs it, but not with a skip that is repeated over the batch;"
        f" {_HALF_SUMS}",
    ),
    Form(
        "SkipSimplifiedLayerNormalization",
        ("rms_norm",),
        targets=("ort-cuda",),
        written_by="lower-skip-norm",
        since=(1, 16),
        measured="on CUDA not measured",
        defects=f"{_HALF_SUMS}; its bias was lost on the CPU from 1.16 to 1.19, so none is written",
    ),
)

# A softmax with the projections and products around it, as one operator of onnxruntime.
ATTENTION: Final = Form(
    "Attention",
    ("softmax",),
    targets=("ort-cpu",),
    written_by="lower-attention",
    since=(1, 23),
    measured="17 tokens of 32 features take 0.6 of what the nodes take, 64 of 128 take 0.8, 197 of"
    " 384 take 0.93, 197 of 768 take 0.97 to 0.98, 512 and 1024 of 512 took 0.91 to 1.16 and are"
    " undecided; with a bias 64 windows of 49 tokens of 96 take 0.94 to 0.97, 128 of 256 take 0.92,"
    " 448 of 384 took 0.87 to 1.04 and are undecided; with a mask and a factor 128 and 512 of 768"
    " take 0.95 to 0.96 and 1024 took 0.84 to 1.09 (onnxruntime 1.31, CPU, AVX-512, one thread,"
    " 2026-11)",
    defects="onnxruntime 1.31.1 dies on it without biases: zeros are written where there are none",
)

_OURS: Final = "see onnxnorm/ops/costs.py and docs/operators.md (2026-11-25, AVX-512, one thread)"
# Calls of our own operators, with --ops.
OWN: Final[tuple[Form, ...]] = tuple(
    Form(name, kinds, ("ort-cpu",), f"{by} (--ops)", (1, 23), _OURS)
    for name, kinds, by in (
        ("ChannelLayerNormalization", ("layer_norm",), "lower-channel-norm"),
        ("ChannelRMSNormalization", ("rms_norm",), "lower-channel-norm"),
        ("TwoPassSoftmax, TwoPassMaskedSoftmax", ("softmax",), "lower-softmax"),
        ("TwoPassLogSoftmax, TwoPassMaskedLogSoftmax", ("log_softmax",), "lower-softmax"),
        ("GroupNormalization, GroupNormalizationSilu", ("group_norm",), "lower-group-norm"),
    )
)


def newest_opset(runtime: Version) -> int:
    """The newest opset that an onnxruntime loads.

    >>> newest_opset((1, 24))
    25
    """
    return max((o for v, o in NEWEST_OPSET.items() if v <= runtime), default=19)


def residual(kind: str, target: str, runtime: Version) -> Form | str:
    """The operator that takes the Add in front of a norm along, or why there is none."""
    for form in RESIDUAL:
        if kind in form.kinds and target in form.targets:
            if runtime >= form.since:
                return form
            since, given = (".".join(map(str, v)) for v in (form.since, runtime))
            return f"{form.name} needs onnxruntime {since}, and the model is for {given}"
    return f"no operator of {target} adds and computes {_A.get(kind, kind)}"


def attention(target: str, runtime: Version) -> Form | str:
    """The operator that takes all of a self-attention, or why there is none."""
    if target not in ATTENTION.targets:
        return f"no operator of {target} computes attention"
    if runtime >= ATTENTION.since:
        return ATTENTION
    since, given = (".".join(map(str, v)) for v in (ATTENTION.since, runtime))
    return f"{ATTENTION.name} needs onnxruntime {since}, and the model is for {given}"


def version(text: str) -> Version:
    """The major and minor number of an onnxruntime version.

    >>> version("1.31.1")
    (1, 31)
    """
    major, minor, *_ = (*text.split("."), "0")
    return int(major), int(minor)
