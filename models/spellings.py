"""Small models with one normalization each, or one near miss, and what a recogniser should say.

    for case in cases():                      # the same each time
        missed, wrong = judge(case, rows_of(case.model))

Every choice that an exporter has is a field of `Spelling`; each is drawn independently of the
others, and `legal` takes back what an opset, a type or what is known of the shape rules out. A near
miss is one mutation of something that is a normalization. Nothing here shares code with the
recogniser: what a case says of itself is checked by running it against a formula in float64.

Where two answers are right, `Expected` names both; the comment beside it says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from models.network import uniform
from models.norms.build import (
    ROW_LAYOUTS,
    assemble,
    batch_case,
    group_case,
    l2_case,
    moment_case,
    softmax_case,
)
from models.norms.by_hand import hand_written, paper_case
from models.norms.channels import (
    BATCH_FORMS,
    GROUP_FORMS,
    write_instance,
)
from models.norms.choices import (
    BFLOAT,
    DOUBLE,
    DTYPES,
    FLOAT,
    HALF,
    KNOWLEDGE,
    LAYOUTS,
    OPSETS,
    OPTIONS,
    Choose,
    Layout,
    Plan,
    Setting,
    Spelling,
    legal,
)
from models.norms.in_text import text_cases
from models.norms.moments import LAYER_MISSES, RMS_MISSES
from models.norms.rows import (
    L2_FORMS,
    L2_MISSES,
    LOG_SOFTMAX_FORMS,
    LOG_SOFTMAX_MISSES,
    SOFTMAX_FORMS,
    SOFTMAX_MISSES,
)
from models.norms.said import Case, Expected, judge
from models.sheet import SCOPES

__all__ = [
    "FAMILIES",
    "LAYER_MISSES",
    "LOG_SOFTMAX_MISSES",
    "OPTIONS",
    "RMS_MISSES",
    "SOFTMAX_MISSES",
    "Case",
    "Expected",
    "cases",
    "draw_case",
    "judge",
    "random_case",
]

_T = TypeVar("_T")

# What exporters write, by name.
PRESETS: Final[Mapping[str, tuple[str, Spelling]]] = {
    "torch_script": ("layer_norm", Spelling()),
    "torch_dynamo": ("layer_norm", Spelling(divide="reciprocal", keepdims="default")),
    "apex_o2": ("layer_norm", Spelling(casts="before_weight")),
    "jax_flax": (
        "layer_norm",
        Spelling(
            square="mul",
            mean="sum_div",
            variance="moments_max",
            divide="reciprocal",
            form="gamma_inv",
            negative_axes=False,
        ),
    ),
    "keras": (
        "layer_norm",
        Spelling(
            square="subs",
            subs=2,
            divide="reciprocal",
            form="tf",
            negative_axes=False,
            eps_shape=(1,),
        ),
    ),
    "paddle": ("layer_norm", Spelling(square="pow_one", eps_shape=(1,), constants="node")),
    "tutorial_unbiased": ("layer_norm", Spelling(variance="unbiased_factor")),
    "llama": ("rms_norm", Spelling(casts="before_weight", divide="one_over")),
    "llama_dynamo": ("rms_norm", Spelling(casts="before_weight", divide="reciprocal")),
    "t5": ("rms_norm", Spelling(casts="twice", divide="one_over")),
    "gemma": ("rms_norm", Spelling(casts="weight_cast", gamma_style="plus_one", divide="one_over")),
    "rms_torch_dynamo": ("rms_norm", Spelling(divide="reciprocal")),
    "rms_tf": (
        "rms_norm",
        Spelling(square="mul", divide="reciprocal", form="gamma_inv", negative_axes=False),
    ),
}

_BASE: Final = LAYOUTS["last"]


def _moment_catalogue() -> Iterator[Case]:
    for kind in ("layer_norm", "rms_norm"):
        for name, (owner, spelling) in PRESETS.items():
            if owner != kind:
                continue
            dtypes = (HALF, BFLOAT) if spelling.casts != "none" else (FLOAT, HALF, DOUBLE)
            for dtype in dtypes:
                for opset in (13, 18):
                    setting = Setting(opset, dtype, "symbolic", neighbours=opset == 18)
                    beta = None if kind == "rms_norm" else (8,)
                    plan = Plan(kind, _BASE, spelling, setting, (8,), beta)
                    yield moment_case(f"{kind}/{name}/{setting.label()}", plan)
        yield from _one_choice_at_a_time(kind)
        yield from _layouts_and_affines(kind)
        yield from _settings(kind)


def _one_choice_at_a_time(kind: str) -> Iterator[Case]:
    """Each option in float32 and in another type, at opsets that take turns."""
    turn = 0
    for choice, options in OPTIONS.items():
        for number, option in enumerate(options):
            for narrow in (False, True) if number else (False,):
                turn += 1
                spelling = dataclasses.replace(Spelling(), **{choice: option})
                opset = (17, 18, 12, 13, 20)[turn % 5]
                dtype = (HALF, DOUBLE)[number % 2] if narrow else FLOAT
                layout = _BASE
                gamma: tuple[int, ...] = (8,)
                beta: tuple[int, ...] | None = None if kind == "rms_norm" else (8,)
                if option == "pool":
                    layout, gamma, beta = LAYOUTS["spatial"], (6, 1, 1), beta and (6, 1, 1)
                if choice == "casts":
                    opset, dtype = (18, BFLOAT) if narrow else (17, HALF)
                if choice == "at":
                    how = ("identity", "dropout", "reshape", "transpose", "cast")[turn % 5]
                    spelling = dataclasses.replace(spelling, between=how)
                if option == "inv":
                    spelling = dataclasses.replace(spelling, divide="reciprocal")
                # where the choice is about epsilon, one that shows when it is lost
                epsilon = 1e-2 if choice.startswith("eps") else (1e-5, 1e-3, 1e-2)[turn % 3]
                setting = Setting(opset, dtype, epsilon=epsilon)
                plan = Plan(kind, layout, spelling, setting, gamma, beta)
                if getattr(legal(plan).spelling, choice) != option:
                    continue  # the kind does not have it
                yield moment_case(f"{kind}/{choice}={option}/{setting.label()}", plan)


def _layouts_and_affines(kind: str) -> Iterator[Case]:
    turn = 0
    for name, layout in LAYOUTS.items():
        if name in ("square", "cube") or (kind == "rms_norm" and name.startswith("spatial")):
            continue
        for shape in layout.gammas:
            affines: tuple[tuple[Any, Any], ...] = ((shape, shape),)
            if shape == layout.gammas[0]:
                affines += ((shape, None), (None, shape), (None, None))
            for gamma, beta in affines:
                turn += 1
                spelling = Spelling(
                    divide=("div", "reciprocal", "pow")[turn % 3],
                    square=("pow", "mul")[turn % 2],
                    mean=("mean", "sum_div", "sum_shape")[turn % 3],
                )
                setting = Setting((13, 17, 18)[turn % 3], neighbours=turn % 2 == 0)
                said = ("both" if beta else "gamma") if gamma else "beta" if beta else "bare"
                label = f"{kind}/{name}-{said}-{len(shape)}/{setting.label()}"
                yield moment_case(label, Plan(kind, layout, spelling, setting, gamma, beta))


def _settings(kind: str) -> Iterator[Case]:
    beta = None if kind == "rms_norm" else (8,)
    for turn, opset in enumerate(OPSETS):
        setting = Setting(opset, DTYPES[turn % 2], epsilon=1e-3)
        plan = Plan(kind, _BASE, Spelling(divide="reciprocal"), setting, (8,), beta)
        yield moment_case(f"{kind}/opset/{setting.label()}", plan)
    for name in ("last", "channel"):
        layout = LAYOUTS[name]
        gamma = layout.gammas[0]
        for knowledge in KNOWLEDGE[1:]:
            for form in ("plain", "gamma_inv"):
                setting = Setting(18 if form == "plain" else 13, FLOAT, knowledge)
                plan = Plan(kind, layout, Spelling(form=form), setting, gamma, beta and gamma)
                yield moment_case(f"{kind}/{name}-{form}/{setting.label()}", plan)
    for scope in SCOPES[1:]:
        for opset, constants in ((13, "initializer"), (17, "attribute"), (18, "identity")):
            setting = Setting(opset, FLOAT, "symbolic", scope, neighbours=opset == 17)
            spelling = Spelling(square="mul", constants=constants)
            plan = Plan(kind, _BASE, spelling, setting, (8,), beta)
            yield moment_case(f"{kind}/{constants}/{setting.label()}", plan)
    plan = Plan(kind, _BASE, Spelling(), Setting(), (8,), beta, runtime_gamma=True)
    yield moment_case(f"{kind}/runtime_gamma", plan)
    if kind == "layer_norm":
        for opset in (13, 18):
            plan = Plan(kind, _BASE, Spelling(), Setting(opset), (8,), (8,), "mean_output")
            yield moment_case(f"{kind}/mean_is_output/op{opset}", plan)


def miss_plan(kind: str, miss: str, spelling: Spelling, setting: Setting) -> Plan:
    """Return a plan whose layout and epsilon let the mutation show."""
    layout, epsilon = _BASE, 0.05
    if miss.startswith("keepdims0"):
        layout = LAYOUTS["square" if setting.opset % 2 else "cube"]
        if spelling.mean == "pool":
            spelling = dataclasses.replace(spelling, mean="mean")
    if miss in ("part_mean", "part_variance"):
        layout = LAYOUTS["several"]
    if miss == "gamma_expands_last":  # one feature, which nobody needs to know beforehand
        layout = Layout((2, 3, 1), (2,), ((4,),))
    elif miss.startswith("gamma_expands"):
        layout = Layout((1, 3, 8), (2,), ((8,),))
    if miss in ("pow3", "eps_subtracted"):
        epsilon = 8.0 if miss == "pow3" else 0.01
    gamma = layout.gammas[0]
    setting = dataclasses.replace(setting, epsilon=epsilon)
    if miss == "pow3":  # a third moment is small beside its epsilon where x is
        setting = dataclasses.replace(setting, neighbours=False)
    return Plan(kind, layout, spelling, setting, gamma, gamma if kind != "rms_norm" else None, miss)


def _near_misses() -> Iterator[Case]:
    for kind, misses in (("layer_norm", LAYER_MISSES), ("rms_norm", RMS_MISSES)):
        for miss in misses:
            for opset, spelling in (
                (13, Spelling()),
                (17, Spelling(square="mul", divide="reciprocal", eps_shape=(1,))),
                (18, Spelling(divide="one_over", constants="node", keepdims="default")),
            ):
                setting = Setting(opset, neighbours=opset == 17)
                plan = miss_plan(kind, miss, spelling, setting)
                yield moment_case(f"{kind}/near/{miss}/op{opset}", plan)
            if miss == "gamma_expands_last":
                for knowledge in ("symbolic", "open"):
                    setting = Setting(17, knowledge=knowledge)
                    plan = miss_plan(kind, miss, Spelling(), setting)
                    yield moment_case(f"{kind}/near/{miss}/{setting.label()}", plan)
    for log in (False, True):
        kind = "log_softmax" if log else "softmax"
        for miss in LOG_SOFTMAX_MISSES if log else SOFTMAX_MISSES:
            for opset in (13, 18):
                form = "exp" if miss in ("keepdims0", "sum_epsilon") and opset == 13 else "stable"
                layout = LAYOUTS["square" if miss == "keepdims0" else "last"]
                divide = "div" if opset == 13 else "reciprocal"
                setting = Setting(opset)
                plan = Plan(kind, layout, Spelling(divide=divide), setting, mutation=miss)
                yield softmax_case(f"{kind}/near/{miss}/op{opset}", log, form, plan)
    for miss in L2_MISSES:
        for opset, norm in ((13, "sum"), (18, "sum_square")):
            layout = LAYOUTS["square" if miss == "keepdims0" else "last"]
            setting = Setting(opset, epsilon=0.5 if miss == "min" else 0.05)
            form = "max" if miss == "min" else "add"
            plan = Plan("rms_norm", layout, Spelling(), setting, mutation=miss)
            yield l2_case(f"l2_norm/near/{miss}/op{opset}", form, norm, plan)
    for miss, form in (("shuffled", "rows"), ("shuffled", "instance"), ("uneven", "instance")):
        plan = Plan("layer_norm", LAYOUTS["spatial"], Spelling(), Setting(), mutation=miss)
        yield group_case(f"group_norm/near/{miss}-{form}", form, plan)
    plan = Plan("layer_norm", LAYOUTS["spatial"], Spelling(), Setting(), mutation="uneven")
    yield group_case("group_norm/near/uneven-rows", "rows", plan)


def _other_kinds() -> Iterator[Case]:
    turn = 0
    for log, forms in ((False, SOFTMAX_FORMS), (True, LOG_SOFTMAX_FORMS)):
        kind = "log_softmax" if log else "softmax"
        for form in forms:
            for name in ROW_LAYOUTS:
                for opset in (11, 13, 17) if form == "operator" else ((11, 18)[turn % 2],):
                    turn += 1
                    spelling = Spelling(
                        divide=("div", "reciprocal")[turn % 2],
                        keepdims=("one", "unsqueeze", "default")[turn % 3],
                        negative_axes=bool(turn % 2),
                    )
                    setting = Setting(
                        opset, (FLOAT, FLOAT, DOUBLE)[turn % 3], neighbours=turn % 4 == 0
                    )
                    plan = Plan(kind, LAYOUTS[name], spelling, setting)
                    yield softmax_case(f"{kind}/{form}-{name}/{setting.label()}", log, form, plan)
    for scope in SCOPES[1:]:
        setting = Setting(13, scope=scope, knowledge="symbolic")
        plan = Plan("softmax", _BASE, Spelling(), setting)
        yield softmax_case(f"softmax/stable/{setting.label()}", False, "stable", plan)
    for knowledge in ("open", "unknown"):
        setting = Setting(13, HALF, knowledge)
        plan = Plan("softmax", _BASE, Spelling(divide="reciprocal"), setting)
        yield softmax_case(f"softmax/stable/{setting.label()}", False, "stable", plan)
    for form in L2_FORMS:
        for norm in ("l2", "sum_square", "sum"):
            if form == "operator" and norm != "l2":
                continue
            for name in ("last", "channel"):
                turn += 1
                spelling = Spelling(
                    divide=("div", "reciprocal", "one_over", "pow")[turn % 4],
                    square=("pow", "mul")[turn % 2],
                    keepdims=("one", "unsqueeze")[turn % 2],
                )
                setting = Setting((11, 13, 17, 18)[turn % 4], (FLOAT, HALF)[turn % 2], epsilon=0.02)
                plan = Plan("rms_norm", LAYOUTS[name], spelling, setting)
                yield l2_case(f"l2_norm/{form}-{norm}-{name}/{setting.label()}", form, norm, plan)
    for form in BATCH_FORMS:
        for shape in ((2, 6, 4, 5), (2, 6, 7), (4, 6)) if form == "operator" else ((2, 6, 4, 5),):
            for opset in (7, 9, 13, 14, 15, 17) if len(shape) == 4 else (17,):
                if form != "operator" and opset in (7, 14, 15):
                    continue
                turn += 1
                if form.startswith("tf"):
                    shape = (2, 4, 5, 6)
                setting = Setting(opset, epsilon=(1e-5, 1e-3)[turn % 2], knowledge="symbolic")
                spelling = Spelling(
                    divide=("div", "reciprocal", "pow")[turn % 3], flip=turn % 2 == 0
                )
                plan = Plan("layer_norm", LAYOUTS["spatial"], spelling, setting)
                label = f"batch_norm/{form}-{len(shape)}/{setting.label()}"
                yield batch_case(label, form, shape, plan)
    for scope in SCOPES[1:]:
        setting = Setting(17, scope=scope)
        plan = Plan("layer_norm", LAYOUTS["spatial"], Spelling(), setting)
        yield batch_case(f"batch_norm/operator/{setting.label()}", "operator", (2, 6, 4, 5), plan)
    for form in GROUP_FORMS:
        for opset, silu in ((13, False), (17, True), (18, False), (21, True)):
            if form.startswith("operator") and opset not in (18, 21):
                continue
            turn += 1
            knowledge = "symbolic" if turn % 2 else "static"
            if form == "operator18":
                opset = 18
            setting = Setting(opset, FLOAT, knowledge, neighbours=turn % 3 == 0)
            spelling = Spelling(
                divide=("div", "reciprocal")[turn % 2],
                square=("pow", "mul")[turn % 2],
                flip=turn % 2 == 0,
            )
            plan = Plan("layer_norm", LAYOUTS["spatial"], spelling, setting)
            label = f"group_norm/{form}{'-silu' if silu else ''}/{setting.label()}"
            yield group_case(label, form, plan, silu)
    for name in ("spatial", "spatial1"):
        for opset in (7, 13, 17, 22):
            setting = Setting(opset, (FLOAT, HALF)[turn % 2], epsilon=1e-3)
            turn += 1
            plan = legal(Plan("layer_norm", LAYOUTS[name], Spelling(), setting))
            yield assemble(
                f"instance_norm/operator-{name}/{setting.label()}",
                setting,
                LAYOUTS[name].shape,
                lambda s, x, plan=plan: write_instance(s, x, plan),  # type: ignore[misc]
            )
    for which in ("evo_s0", "evo_b0", "frn", "ibn", "ws", "ws_outside"):
        for opset in (11, 13, 18):
            setting = Setting(opset, epsilon=1e-3)
            spelling = Spelling(square=("mul", "pow")[opset % 2], flip=opset == 18)
            plan = Plan("layer_norm", LAYOUTS["spatial"], spelling, setting)
            yield paper_case(f"{which}/{setting.label()}", which, plan)


# ** by chance **

FAMILIES: Final = (
    "layer_norm",
    "rms_norm",
    "softmax",
    "log_softmax",
    "l2_norm",
    "batch_norm",
    "group_norm",
    "papers",
)


def random_setting(choose: Choose) -> Setting:
    """Choose where a norm stands."""
    return Setting(
        opset=choose("opset", OPSETS),
        dtype=choose("dtype", DTYPES),
        knowledge=choose("knowledge", KNOWLEDGE),
        scope=choose("scope", SCOPES),
        neighbours=choose("neighbours", (False, True)),
        epsilon=choose("epsilon", (1e-5, 1e-6, 1e-3, 0.05)),
    )


def random_spelling(choose: Choose) -> Spelling:
    """Choose every part of a spelling by itself."""
    return Spelling(**{name: choose(name, options) for name, options in OPTIONS.items()})


def random_case(name: str, choose: Choose, family: str | None = None) -> Case:
    """Choose a kind and everything else.

    Args:
        name: Of the case; also the seed of its numbers.
        choose: Called once for each choice, with what it is for and the options.
        family: One of `FAMILIES`, instead of a choice.
    """
    family = family or choose("family", FAMILIES)
    near = choose("near miss", (False, False, True))
    setting, spelling = random_setting(choose), random_spelling(choose)
    layouts = [k for k in LAYOUTS if k not in ("square", "cube")]
    if family in ("layer_norm", "rms_norm"):
        if near:
            misses = LAYER_MISSES if family == "layer_norm" else RMS_MISSES
            return moment_case(name, miss_plan(family, choose("miss", misses), spelling, setting))
        layout = LAYOUTS[choose("layout", layouts)]
        parameters = (None, *layout.gammas)
        plan = Plan(
            family,
            layout,
            spelling,
            setting,
            choose("gamma", parameters),
            choose("beta", parameters),
            runtime_gamma=choose("runtime gamma", (False, False, False, True)),
        )
        if plan.runtime_gamma:
            plan = dataclasses.replace(plan, gamma=plan.gamma or layout.gammas[0], beta=None)
        return moment_case(name, plan)
    if family in ("softmax", "log_softmax"):
        log = family == "log_softmax"
        forms = LOG_SOFTMAX_FORMS if log else SOFTMAX_FORMS
        layout = LAYOUTS[choose("layout", ROW_LAYOUTS)]
        plan = Plan(family, layout, spelling, setting)
        if not near:
            return softmax_case(name, log, choose("form", forms), plan)
        miss = choose("miss", LOG_SOFTMAX_MISSES if log else SOFTMAX_MISSES)
        layout = LAYOUTS["square"] if miss == "keepdims0" else layout
        setting = dataclasses.replace(setting, neighbours=False)  # small inputs hide a second Exp
        plan = dataclasses.replace(plan, layout=layout, mutation=miss, setting=setting)
        return softmax_case(name, log, "stable", plan)
    if family == "l2_norm":
        layout = LAYOUTS[choose("layout", ROW_LAYOUTS)]
        setting = dataclasses.replace(setting, epsilon=0.05)
        plan = Plan("rms_norm", layout, spelling, setting)
        norm = choose("norm", ("l2", "sum_square", "sum"))
        if not near:
            return l2_case(name, choose("form", L2_FORMS), norm, plan)
        miss = choose("miss", L2_MISSES)
        layout = LAYOUTS["square"] if miss == "keepdims0" else layout
        setting = dataclasses.replace(setting, epsilon=0.5)
        plan = dataclasses.replace(plan, layout=layout, mutation=miss, setting=setting)
        form = choose("form", ("max",)) if miss == "min" else choose("form", ("add",))
        return l2_case(name, form, norm, plan)
    if family == "batch_norm":
        form = choose("form", BATCH_FORMS)
        shape = (2, 4, 5, 6) if form.startswith("tf") else (2, 6, 4, 5)
        return batch_case(
            name, form, shape, Plan("layer_norm", LAYOUTS["spatial"], spelling, setting)
        )
    plan = Plan("layer_norm", LAYOUTS["spatial"], spelling, setting)
    if family == "group_norm":
        silu = choose("silu", (False, True))
        return group_case(name, choose("form", GROUP_FORMS), plan, silu)
    which = choose("paper", ("evo_s0", "evo_b0", "frn", "ibn", "ws", "ws_outside"))
    plan = dataclasses.replace(plan, setting=dataclasses.replace(setting, dtype=FLOAT))
    return paper_case(name, which, plan)


def draw_case(draw: Callable[[Any], Any]) -> Case:
    """Draw a case inside a hypothesis composite: `draw_case(draw)`, or `data.draw` for `draw`."""
    from hypothesis import strategies as st

    def choose(name: str, options: Sequence[_T]) -> _T:
        drawn: _T = draw(st.sampled_from(list(options)).map(lambda o: o))
        return drawn

    return random_case("drawn", choose)


class _Seeded:
    """Choices that are the same each time: one stream of draws for each name of a case."""

    def __init__(self, seed: str) -> None:
        self.seed, self.turn = seed, 0

    def __call__(self, name: str, options: Sequence[_T]) -> _T:
        self.turn += 1
        u = uniform(f"{self.seed}/{name}/{self.turn}", (1,), 0.0, 1.0)[0]
        return options[int(u * len(options))]


def cases(by_chance: int = 240) -> Iterator[Case]:
    """The catalogue, the same each time: what exporters write, one choice at a time, near misses.

    Args:
        by_chance: How many more are drawn with every choice left open.
    """
    yield from _moment_catalogue()
    yield from _other_kinds()
    yield from hand_written()
    yield from text_cases()
    yield from _near_misses()
    for number in range(by_chance):
        name = f"by_chance/{number}"
        yield random_case(name, _Seeded(name), FAMILIES[number % len(FAMILIES)])
