"""Passes by name and with options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxnorm import passes, registry
from onnxnorm.errors import UsageError
from onnxnorm.passes.eliminate_guard import EliminateGuard
from onnxnorm.passes.eliminate_softmax import EliminateSoftmax
from onnxnorm.passes.fold_affine import FoldAffine
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.passes.fold_constants import FoldConstants
from onnxnorm.passes.fold_layout import FoldLayout
from onnxnorm.passes.fold_modulation import FoldModulation
from onnxnorm.passes.fold_sizes import FoldSizes
from onnxnorm.passes.lower_attention import LowerAttention
from onnxnorm.passes.lower_channel_affine import LowerChannelAffine
from onnxnorm.passes.lower_channel_norm import LowerChannelNorm
from onnxnorm.passes.lower_group_norm import LowerGroupNorm
from onnxnorm.passes.lower_norms import LowerNorms
from onnxnorm.passes.lower_residual_sum import LowerResidualSum
from onnxnorm.passes.lower_skip_norm import LowerSkipNorm
from onnxnorm.passes.lower_softmax import LowerSoftmax
from onnxnorm.passes.merge_constants import MergeConstants
from onnxnorm.passes.merge_factors import MergeFactors
from onnxnorm.passes.merge_parallel_convolutions import MergeParallelConvolutions
from onnxnorm.passes.merge_parallel_norms import MergeParallelNorms
from onnxnorm.passes.prune_dead_channels import PruneDeadChannels
from onnxnorm.passes.stream_fold_affine import StreamFoldAffine
from onnxnorm.passes.stream_fold_mean import StreamFoldMean
from onnxnorm.registry import catalogue, default_passes, options, select
from onnxnorm.rewrite import Pass


def test_names_classes_and_files_agree() -> None:
    for name, kind in catalogue().items():
        assert kind.name == name
        assert re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower() == name
        assert kind.__module__ == f"onnxnorm.passes.{name.replace('-', '_')}"
        assert kind.summary
        assert kind.equation
        assert kind() == kind(), "passes are values"


def test_approximate_passes_are_never_on_by_default() -> None:
    kinds = catalogue()
    assert not any(kinds[name].approximate for name in default_passes())
    assert set(default_passes()) <= set(passes.PASSES)


def test_selections() -> None:
    assert select(None) == [
        FoldConstants(),
        FoldSizes(),
        MergeParallelNorms(),
        FoldBatchnorm(),
        MergeParallelConvolutions(),
        FoldAffine(),
        FoldModulation(),
        MergeFactors(),
        PruneDeadChannels(),
        StreamFoldAffine(),
        FoldLayout(),
        LowerChannelNorm(),
        StreamFoldMean(),
        EliminateSoftmax(),
        EliminateGuard(),
        LowerSoftmax(),
        LowerGroupNorm(),
        LowerChannelAffine(),
        LowerAttention(),
        LowerNorms(),
        LowerSkipNorm(),
        LowerResidualSum(),
        MergeConstants(),
    ]
    assert select("default") == select(None)
    assert select("none") == select("") == []
    assert select("fold-batchnorm{max_copy_mb=64}") == [FoldBatchnorm(max_copy_mb=64)]
    assert select(" fold-batchnorm { max_copy_mb = 64 } , fold-batchnorm") == [
        FoldBatchnorm(max_copy_mb=64),
        FoldBatchnorm(),
    ]
    assert select(["default", FoldBatchnorm(1)]) == [*select(None), FoldBatchnorm(1)]


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("fold-batchnrm", "there is no pass 'fold-batchnrm'", "Did you mean fold-batchnorm?"),
        ("fold-batchnorm{size=1}", "has no option 'size=1'", "max_copy_mb=256"),
        ("fold-batchnorm{max_copy_mb}", "has no option 'max_copy_mb'", "max_copy_mb=256"),
        ("fold-batchnorm{max_copy_mb=big}", "'big' is not a value", "type int"),
        ("fold-batchnorm{max_copy_mb=1", "is not a list of passes", "names separated by commas"),
        ("fold-batchnorm;other", "is not a list of passes", "names separated by commas"),
    ],
)
def test_what_is_wrong_and_what_to_do(text: str, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        select(text)
    assert what in error.value.what
    assert hint in error.value.hint


@given(st.text(alphabet="fold-batchnorm{}=,1 x", max_size=40))
def test_any_text_is_passes_or_a_usage_error(text: str) -> None:
    try:
        chosen = select(text)
    except UsageError:
        return
    assert all(isinstance(p, Pass) for p in chosen)


@dataclass(frozen=True)
class Options(FoldBatchnorm):
    """A pass with an option of every type."""

    name: ClassVar = "options"
    flag: bool = False
    share: float = 0.5
    word: str = "a"
    limit: float | None = None


def test_options_of_every_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(passes.PASSES, "options", f"{__name__}:Options")
    monkeypatch.setattr(registry, "_load", lambda _: Options)
    assert select("options{flag=true,share=0.25,word=b,max_copy_mb=3}") == [
        Options(3, True, 0.25, "b")
    ]
    assert options(Options)["share"] == ("float", 0.5)
    assert select("options{limit=0.5}") == [Options(limit=0.5)]
    for bad in ("flag=yes", "share=x", "limit=x"):
        with pytest.raises(UsageError):
            select(f"options{{{bad}}}")
