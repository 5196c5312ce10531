"""Exact search, a block at a time under a memory ceiling.

Two precisions, for two uses:

``float64``
    What evaluation uses. A score is the cosine rounded to 10 decimals. Ties go to the lower gallery row in
    what is shown; in ranks and metrics they count against the model (:mod:`samething.retrieval.ranks`).
    The scores do not depend on block sizes, threads or the BLAS, so equal gallery rows always tie: unit
    vectors are cut into whole numbers so small that every sum of products is exact in float64 (Ozaki et al.,
    *Error-free transformations of matrix multiplication by using fast routines of matrix multiplication and
    its applications*, Numerical Algorithms 59, 2012).
``float32``
    A third of the arithmetic at half the width, for big jobs. Scores are right to about 1e-6, and the order
    of entries that are nearer than that is not defined.

Two distances: ``cosine``, and ``euclidean``, whose score is minus the squared distance; in float64 it is
rounded to 10 decimals of the square of the power of two above the longest vector.

Embeddings may be memory-mapped: they are converted a block at a time. torch multiplies the matrices of big
float32 jobs where it is installed, numpy elsewhere.
"""

from samething.retrieval.code_scan import CodeScan, FewCodes
from samething.retrieval.nearest import (
    FlatScan,
    NearPairs,
    TopK,
    exact_topk,
    nearest_units,
    pairs_above,
)
from samething.retrieval.ranks import RankCounter, Relevant, ranks_of_scores
from samething.retrieval.scores import Distance, Precision, require_directions

__all__ = [
    "CodeScan",
    "Distance",
    "FewCodes",
    "FlatScan",
    "NearPairs",
    "Precision",
    "RankCounter",
    "Relevant",
    "TopK",
    "exact_topk",
    "nearest_units",
    "pairs_above",
    "ranks_of_scores",
    "require_directions",
]
