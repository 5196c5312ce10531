"""The paper's questions, asked automatically: which data, which loss, which backbone.

Every study chooses on validation instances and looks at the test instances once, at its end. What was tried
is kept a line each, so that a killed study goes on and ends with the same result.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import cyclopts

from samething.study.greedy import Gain, Step, select
from samething.study.study_folder import StudyFolder
from samething.study.study_report import StudyResult

if TYPE_CHECKING:
    from samething.training import TrainConfig

__all__ = ["Gain", "Step", "StudyFolder", "StudyResult", "backbones", "datasets", "losses", "select"]

_Several = cyclopts.Parameter(consume_multiple=True)


def datasets(
    features: Path,
    *,
    output: Path = Path("study-datasets"),
    by: Literal["domain", "dataset"] = "domain",
    budget: int | None = None,
    cap: Annotated[tuple[int, ...], _Several] = (0,),
    share: Literal["proportional", "equal", "temperature"] = "proportional",
    leave_one_domain_out: bool = False,
    seeds: int = 3,
    min_gain: float = 0.0,
    epochs: float = 20.0,
    embedding_dim: int = 64,
    seed: int = 0,
) -> StudyResult:
    """Choose the data sets to train on, on validation instances that no head has seen.

    Each mix of groups trains a head with at most the budget of images, for the same number of steps. Groups
    are added while the best one helps for certain (the 95 % interval of the paired gain lies above 0), then
    those that do not help are dropped. Written are the ranking, the gain of each group per domain,
    substitutions, score against budget, and chosen.json with chosen.parquet, the catalog to train on. At the
    end the choice is compared once, on the test instances, with taking everything at the same budget.

    Args:
        features: the feature folder; its catalog has train, val and test images.
        output: the study folder; a killed study goes on there.
        by: what a group is: a domain or a data set.
        budget: training images of a mix, at most; by default half of those there are.
        cap: most images per class that are tried for each group; several are each tried, 0 is none.
        share: how the budget is shared over domains, as in samething curate.
        leave_one_domain_out: answer the queries of each domain by heads trained without it, to choose for
            unseen domains; a domain takes a training of its own.
        seeds: trainings a mix.
        min_gain: least gain of an addition, as a share of 1 (0.005 is half a point of mMP@5).
        epochs: passes over a full budget.
        embedding_dim: numbers in an embedding.
        seed: of the draws; trainings use the numbers from it on.

    Raises:
        InputError: no validation or test images, instances in both, fewer than two groups.
        FingerprintError: the folder is of another study or of other features.
    """
    from samething.features import FeatureSet
    from samething.study.data_mix import Terms
    from samething.study.data_study import run_data_study

    if budget is None:
        budget = int(FeatureSet.open(features).catalog.has_role("train").sum()) // 2
    terms = Terms(
        by=by,
        budget=budget,
        caps=tuple(dict.fromkeys(cap)),
        share=share,
        num_seeds=seeds,
        leave_one_domain_out=leave_one_domain_out,
        seed=seed,
    )
    config = dataclasses.replace(_config(epochs, embedding_dim), num_centers=1)
    return run_data_study(Path(features), Path(output), terms=terms, min_gain=min_gain, config=config)


def losses(
    features: Path,
    *,
    output: Path = Path("study-losses"),
    loss: Annotated[tuple[str, ...], _Several] = (),
    trials: int = 12,
    seeds: int = 3,
    epochs: float = 10.0,
    embedding_dim: int = 64,
    seed: int = 0,
) -> StudyResult:
    """Compare the losses, each with the best of a search of its own over scale, margin and sub-centres.

    Every loss gets the same number of trials of the same length (Optuna's TPE, its first trial the loss's own
    defaults), judged on validation instances. The best of each is trained again from seeds that the search
    did not use, and all are looked at once on the test instances.

    Args:
        features: the feature folder; its catalog has train, val and test images.
        output: the study folder; a killed study goes on there. optuna.log in it opens in Optuna's dashboard.
        loss: names of the losses that are compared, by default all.
        trials: trials per loss.
        seeds: trainings of the best of each.
        epochs: passes over the training images in every training.
        embedding_dim: numbers in an embedding.
        seed: of the searches.

    Raises:
        InputError: an unknown loss, no validation or test images, instances in both.
        FingerprintError: the folder is of another study or of other features.
    """
    from samething.losses import LOSSES
    from samething.study.loss_search import run_loss_study

    return run_loss_study(
        Path(features),
        Path(output),
        losses=tuple(dict.fromkeys(loss or LOSSES)),
        num_trials=trials,
        num_seeds=seeds,
        config=_config(epochs, embedding_dim),
        seed=seed,
    )


def backbones(
    *features: Path,
    output: Path = Path("study-backbones"),
    dim: int = 64,
    seeds: int = 3,
    epochs: float = 20.0,
) -> StudyResult:
    """Compare backbones on one catalog: full width, average pool, PCA, linear probe; against size and speed.

    The linear probe is a linear map trained with NormFace (no margin). Which backbone is best is decided on
    validation instances; the test instances are looked at once.

    Args:
        features: feature folders of one catalog, one per backbone.
        output: the study folder; a killed study goes on there.
        dim: numbers in the short embeddings.
        seeds: trainings of each linear probe.
        epochs: passes over the training images.

    Raises:
        InputError: folders of different catalogs, no validation or test images, instances in both.
        FingerprintError: the folder is of another study or of other features.
    """
    from samething.study.backbone_comparison import run_backbone_study

    config = dataclasses.replace(_config(epochs, dim), loss="normface", num_centers=1)
    return run_backbone_study(
        [Path(folder) for folder in features], Path(output), dim=dim, num_seeds=seeds, config=config
    )


def _config(epochs: float, embedding_dim: int) -> TrainConfig:
    """The demo recipe, without validation on the way: validation is asked afterwards."""
    from samething.training import RECIPES

    return dataclasses.replace(
        RECIPES["demo"](), epochs=epochs, embedding_dim=embedding_dim, validate_every=1e6, keep="last"
    )
