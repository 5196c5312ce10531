"""How good a head is on the validation images, quickly."""

from __future__ import annotations

import numpy as np

from samething.arrays import Embeddings, FeatureRows, Float, Int
from samething.catalog import Catalog
from samething.heads import Head
from samething.metrics import modified_mean_precision_at_k
from samething.retrieval import exact_topk
from samething.retrieval.codes import StoredCodes, as_kept


def kept_embeddings(
    head: Head,
    features: FeatureRows,
    rows: Int[np.ndarray, " m"],
    training: Int[np.ndarray, " t"],
    codes: StoredCodes,
) -> Float[np.ndarray, "m d"]:
    """Unit-length embeddings of some rows as they come back from codes, which are fitted to training rows."""
    embeddings = head.embed(features[rows])
    return embeddings if codes == "float32" else as_kept(embeddings, head.embed(features[training]), codes)


def validation_scores(embeddings: Embeddings, catalog: Catalog) -> tuple[float, float]:
    """mMP@5 and R@1 of images searched among each other, in one index over all domains.

    They are plain means over the domains; NaN where there are none. An image does not find itself; images
    without another one of their instance do not count, nor do domains that have no others.

    Args:
        embeddings: unit-length (v, d), one row per image.
        catalog: the v validation images.
    """
    instances = catalog.class_ids()
    own = np.arange(len(embeddings))
    top = exact_topk(embeddings, embeddings, 5, leave_out=own, normalised=True, precision="float32")
    relevance = (instances[top.indices] == instances[:, None]) & (top.indices >= 0)
    num_relevant = np.bincount(instances)[instances] - 1
    counts = num_relevant > 0
    precision = modified_mean_precision_at_k(relevance, num_relevant, k=5)
    domains = catalog.strings("domain")
    scores = [
        (precision[rows].mean(), relevance[rows, 0].mean())
        for domain in catalog.domains
        if (rows := counts & (domains == domain)).any()
    ]
    score, recall = np.mean(scores, axis=0) if scores else (np.nan, np.nan)
    return float(score), float(recall)
