"""The catalogue of passes: one readable table of names.

Importing this package imports no pass; `onnxnorm.registry` imports one when it is asked for.
"""

from __future__ import annotations

from typing import Final

if __name__ != "onnxnorm.passes":  # a second copy would have its own classes
    raise ImportError("import onnxnorm.passes, not passes")

# name -> "module:class", in the order in which the passes run
PASSES: Final[dict[str, str]] = {
    "raise-skip-norm": "onnxnorm.passes.raise_skip_norm:RaiseSkipNorm",
    "fold-constants": "onnxnorm.passes.fold_constants:FoldConstants",
    "fold-sizes": "onnxnorm.passes.fold_sizes:FoldSizes",
    "merge-adapters": "onnxnorm.passes.merge_adapters:MergeAdapters",
    "merge-parallel-norms": "onnxnorm.passes.merge_parallel_norms:MergeParallelNorms",
    "fold-batchnorm": "onnxnorm.passes.fold_batchnorm:FoldBatchnorm",
    "merge-parallel-convolutions": (
        "onnxnorm.passes.merge_parallel_convolutions:MergeParallelConvolutions"
    ),
    "fold-affine": "onnxnorm.passes.fold_affine:FoldAffine",
    "fold-modulation": "onnxnorm.passes.fold_modulation:FoldModulation",
    "merge-factors": "onnxnorm.passes.merge_factors:MergeFactors",
    "prune-dead-channels": "onnxnorm.passes.prune_dead_channels:PruneDeadChannels",
    "stream-fold-affine": "onnxnorm.passes.stream_fold_affine:StreamFoldAffine",
    "fold-layout": "onnxnorm.passes.fold_layout:FoldLayout",
    "lower-channel-norm": "onnxnorm.passes.lower_channel_norm:LowerChannelNorm",
    "stream-fold-mean": "onnxnorm.passes.stream_fold_mean:StreamFoldMean",
    "fold-norm-affine": "onnxnorm.passes.fold_norm_affine:FoldNormAffine",
    "stream-compress": "onnxnorm.passes.stream_compress:StreamCompress",
    "stream-rotate": "onnxnorm.passes.stream_rotate:StreamRotate",
    "eliminate-softmax": "onnxnorm.passes.eliminate_softmax:EliminateSoftmax",
    "eliminate-guard": "onnxnorm.passes.eliminate_guard:EliminateGuard",
    "lower-softmax": "onnxnorm.passes.lower_softmax:LowerSoftmax",
    "lower-group-norm": "onnxnorm.passes.lower_group_norm:LowerGroupNorm",
    "lower-channel-affine": "onnxnorm.passes.lower_channel_affine:LowerChannelAffine",
    "lower-attention": "onnxnorm.passes.lower_attention:LowerAttention",
    "lower-norms": "onnxnorm.passes.lower_norms:LowerNorms",
    "lower-skip-norm": "onnxnorm.passes.lower_skip_norm:LowerSkipNorm",
    "lower-residual-sum": "onnxnorm.passes.lower_residual_sum:LowerResidualSum",
    "merge-constants": "onnxnorm.passes.merge_constants:MergeConstants",
}

# What `optimize` runs when it is not told otherwise: passes that are equal over the reals.
# Those that write calls of our own operators do nothing unless --ops asks for them.
DEFAULT: Final[tuple[str, ...]] = (
    "fold-constants",
    "fold-sizes",
    "merge-parallel-norms",
    "fold-batchnorm",
    "merge-parallel-convolutions",
    "fold-affine",
    "fold-modulation",
    "merge-factors",
    "prune-dead-channels",
    "stream-fold-affine",
    "fold-layout",
    "lower-channel-norm",
    "stream-fold-mean",
    "eliminate-softmax",
    "eliminate-guard",
    "lower-softmax",
    "lower-group-norm",
    "lower-channel-affine",
    "lower-attention",
    "lower-norms",
    "lower-skip-norm",
    "lower-residual-sum",
    "merge-constants",
)
