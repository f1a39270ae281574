"""What an exporter chooses: spelling, layout, setting; and what goes together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from onnx import TensorProto, helper

from models.sheet import CONSTANTS

_T = TypeVar("_T")

FLOAT: Final = int(TensorProto.FLOAT)
HALF: Final = int(TensorProto.FLOAT16)
BFLOAT: Final = int(TensorProto.BFLOAT16)
DOUBLE: Final = int(TensorProto.DOUBLE)
DTYPES: Final = (FLOAT, HALF, BFLOAT, DOUBLE)
OPSETS: Final = (7, 9, 10, 11, 12, 13, 14, 15, 17, 18, 20, 21, 22, 23, 24)
KNOWLEDGE: Final = ("static", "symbolic", "open", "unknown")


class Choose(Protocol):
    """Takes one of several options; `name` says what for."""

    def __call__(self, name: str, options: Sequence[_T]) -> _T:
        """Return one of the options."""
        ...


@dataclass(frozen=True)
class Spelling:
    """How one normalization is written down. The defaults are torch's below opset 17."""

    square: str = "pow"
    mean: str = "mean"
    keepdims: str = "one"
    negative_axes: bool = True
    eps_left: bool = False
    eps_shape: tuple[int, ...] = ()
    root: str = "sqrt"
    divide: str = "div"
    subs: int = 1
    means: int = 1
    variance: str = "centred"
    form: str = "plain"
    negated: str = "no"
    casts: str = "none"
    gamma_style: str = "stored"
    flip: bool = False
    between: str = "none"
    at: str = "input"
    constants: str = "initializer"


OPTIONS: Final[Mapping[str, tuple[Any, ...]]] = {
    "square": ("pow", "mul", "pow_int", "pow_one", "subs", "sum_square", "l2"),
    "mean": ("mean", "sum_div", "sum_mul", "sum_shape", "pool"),
    "keepdims": ("one", "default", "explicit", "unsqueeze", "reshape"),
    "negative_axes": (True, False),
    "eps_left": (False, True),
    "eps_shape": ((), (1,), (1, 1, 1)),
    "root": ("sqrt", "pow"),
    "divide": ("div", "reciprocal", "one_over", "pow"),
    "subs": (1, 2),
    "means": (1, 2),
    "variance": (
        "centred",
        "moments",
        "moments_max",
        "moments_relu",
        "x_times_d",
        "unbiased_sum",
        "unbiased_factor",
        "unbiased_torch",
    ),
    "form": ("plain", "gamma_inv", "inv", "tf"),
    "negated": ("no", "sub", "neg"),
    "casts": ("none", "before_weight", "after_weight", "weight_cast", "twice", "inv_back"),
    "gamma_style": ("stored", "plus_one"),
    "flip": (False, True),
    "between": ("none", "identity", "dropout", "reshape", "transpose", "cast"),
    "at": ("input", "mean", "square", "centred", "statistic", "inv", "core", "output"),
    "constants": CONSTANTS,
}


@dataclass(frozen=True)
class Layout:
    """Where a norm's axes are.

    Attributes:
        shape: Of its input.
        axes: That the statistics are taken over.
        gammas: Shapes that its parameters come in.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    gammas: tuple[tuple[int, ...], ...]


LAYOUTS: Final[Mapping[str, Layout]] = {
    "last": Layout((2, 3, 8), (2,), ((8,), (1, 1, 8), (1, 8))),
    "matrix": Layout((4, 8), (1,), ((8,), (1, 8))),
    "last4": Layout((2, 3, 4, 8), (3,), ((8,), (1, 1, 1, 8))),
    "several": Layout((2, 3, 4, 5), (2, 3), ((4, 5), (1, 1, 4, 5), (5,))),
    "channel": Layout((2, 6, 4, 5), (1,), ((6, 1, 1), (1, 6, 1, 1))),
    "channel3": Layout((2, 6, 7), (1,), ((6, 1), (1, 6, 1))),
    "middle": Layout((2, 4, 3, 5), (1, 2), ((4, 3, 1), (1, 4, 3, 1))),
    "all": Layout((2, 6, 4, 5), (1, 2, 3), ((6, 4, 5), (6, 1, 1))),
    "spatial": Layout((2, 6, 4, 5), (2, 3), ((6, 1, 1), (1, 6, 1, 1))),
    "spatial1": Layout((2, 6, 7), (2,), ((6, 1), (1, 6, 1))),
    "square": Layout((4, 4), (1,), ((4,),)),
    "cube": Layout((4, 4, 4), (2,), ((4,),)),
}


@dataclass(frozen=True)
class Setting:
    """Where a norm stands.

    Attributes:
        opset: Of the default domain.
        dtype: Of the model's input.
        knowledge: What is known of the input's shape: `static`; `symbolic`, with names for all
            axes but the normalized ones and the channels; `open`, names for all; `unknown`.
        scope: One of `models.sheet.SCOPES`.
        neighbours: Whether something linear stands before and after it.
        epsilon: As it is written in the model.
    """

    opset: int = 17
    dtype: int = FLOAT
    knowledge: str = "static"
    scope: str = "main"
    neighbours: bool = False
    epsilon: float = 1e-5

    @property
    def said(self) -> str:
        """What is known of the shape where the norm stands: in a function, nothing is."""
        return "unknown" if self.scope == "function" else self.knowledge

    def label(self) -> str:
        """The setting in a case's name."""
        kind = helper.tensor_dtype_to_np_dtype(self.dtype).name
        words = [kind, f"op{self.opset}", self.knowledge]
        words += [self.scope] if self.scope != "main" else []
        return "-".join(words + (["linear"] if self.neighbours else []))


@dataclass(frozen=True)
class Plan:
    """All that a moment norm is made from; the parameters' shapes are None where there is none."""

    kind: str
    layout: Layout
    spelling: Spelling
    setting: Setting
    gamma: tuple[int, ...] | None = None
    beta: tuple[int, ...] | None = None
    mutation: str = ""
    runtime_gamma: bool = False


def known_shape(
    shape: Sequence[int], fixed: Iterable[int], knowledge: str
) -> list[int | str | None] | None:
    """Return what a model says of a shape."""
    if knowledge == "unknown":
        return None
    keep = range(len(shape)) if knowledge == "static" else () if knowledge == "open" else fixed
    return [n if a in set(keep) else f"d{a}" for a, n in enumerate(shape)]


def fixed_axes(layout: Layout, *parameters: tuple[int, ...] | None) -> set[int]:
    """Return the axes whose extents an exporter knows: the normalized ones and the channels."""
    rank = len(layout.shape)
    found = set(layout.axes)
    for shape in parameters:
        for back, extent in enumerate(reversed(shape or ())):
            if extent > 1:
                found.add(rank - 1 - back)
    return found


# Mutations behind or beside the variance, whatever way it was computed.
_KEEP_THE_VARIANCE: Final = (
    "clamped",
    "eps_outside",
    "eps_subtracted",
    "eps_twice",
    "gamma_expands",
    "gamma_expands_rank",
    "gamma_expands_last",
    "mean_output",
    "not_centred",
    "other_root",
    "shift_sign",
    "std_twice",
    "std_twice_chain",
    "two_roots",
)


def legal(plan: Plan) -> Plan:
    """Take back the choices that opset, type, layout or the known shape rule out."""
    s, where, layout = plan.spelling, plan.setting, plan.layout
    opset, change = where.opset, dataclasses.replace
    if plan.mutation == "clamped" and opset < 8:  # Max does not broadcast
        where = change(where, opset=9)
    if where.dtype == BFLOAT and opset < 16:  # Pow and If have it later than the others
        where = change(where, dtype=HALF)
    if where.scope == "function" and opset < 11:
        where = change(where, scope="main")
    closed = where.knowledge in ("static", "symbolic")
    centred = plan.kind != "rms_norm"
    if opset < 11:
        s = change(s, negative_axes=False)
    if s.square == "pow_int" and opset < 12:
        s = change(s, square="pow")
    if s.keepdims == "reshape" and (  # 0 copies an extent only where nothing moves
        where.knowledge == "unknown" or layout.axes != (len(layout.shape) - 1,)
    ):
        s = change(s, keepdims="unsqueeze")
    if s.square == "subs" and not centred:
        s = change(s, square="mul")
    spatial = layout.axes == tuple(range(2, len(layout.shape)))
    narrow = (BFLOAT,) if opset < 22 else ()
    if s.mean == "pool" and (not spatial or where.dtype in narrow):
        s = change(s, mean="mean")
    if s.mean in ("sum_div", "sum_mul") and not closed:
        s = change(s, mean="sum_shape")
    if s.square in ("sum_square", "l2") and not closed:
        s = change(s, square="pow")
    if not centred or (s.variance.startswith("unbiased") and not closed):
        s = change(s, variance="centred")
    if s.square in ("sum_square", "l2", "subs") and s.variance != "centred":
        s = change(s, square="mul")
    if s.variance == "moments_max" and opset < 8:
        s = change(s, variance="moments_relu")
    if not centred:
        s = change(s, negated="no", subs=1, means=1)
        if s.form in ("inv", "tf"):
            s = change(s, form="gamma_inv")
    if s.form != "plain" and s.divide == "div":
        s = change(s, divide="reciprocal")
    if s.form in ("inv", "tf") and s.negated == "sub":
        s = change(s, negated="neg")
    if s.variance == "x_times_d" and s.negated == "sub":
        s = change(s, negated="no")
    if where.dtype not in (HALF, BFLOAT):
        s = change(s, casts="none")
    if s.casts in ("twice", "inv_back") and centred:
        s = change(s, casts="before_weight")
    if s.casts == "inv_back" and (s.divide == "div" or s.form != "plain"):
        s = change(s, divide="reciprocal", form="plain")
    if s.casts == "before_weight" and s.form in ("gamma_inv", "tf"):
        s = change(s, casts="after_weight")
    if s.casts == "twice" and s.form == "gamma_inv":
        s = change(s, form="plain")
    ranked = where.knowledge != "unknown" and not plan.mutation.startswith(
        ("keepdims0", "gamma_expands")
    )
    if not ranked and s.between in ("reshape", "transpose"):
        s = change(s, between="identity")
    gamma, beta = plan.gamma, plan.beta
    if plan.mutation or plan.runtime_gamma:
        s = change(s, form="plain", negated="no")
        if plan.mutation in ("shift_sign", "two_roots"):
            s = change(s, form="tf", divide="reciprocal" if s.divide == "div" else s.divide)
        late = "after_weight" if s.form == "tf" else "before_weight"
        s = change(s, casts=late if s.casts != "none" else "none")
    if plan.mutation and plan.mutation not in _KEEP_THE_VARIANCE:
        # with a wrong mean the ways to a variance are no longer equal
        s = change(s, variance="centred", subs=1, means=1)
    if plan.runtime_gamma or plan.mutation == "mean_output":
        where = change(where, scope="main")
    if plan.mutation == "gamma_expands_last":
        s = change(s, variance="centred")  # of one number there is no other
    if plan.mutation.startswith("gamma_expands"):
        gamma = gamma or layout.gammas[0]
        where = change(where, scope="main", neighbours=False)
    if where.dtype in (HALF, BFLOAT) and s.casts == "none":
        where = change(where, epsilon=max(where.epsilon, 1e-5))
    if where.knowledge == "unknown":  # a parameter of rank 4 could expand what it scales
        gamma = gamma and tuple(n for n in gamma[-len(layout.shape) :])
    return change(plan, spelling=s, setting=where, gamma=gamma, beta=beta)
