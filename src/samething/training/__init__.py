"""From cached features to a trained head: seconds, because the backbone never runs again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samething.errors import InputError
from samething.features import FeatureSet
from samething.training.config import RECIPES, TrainConfig
from samething.training.finetune_config import FinetuneConfig

if TYPE_CHECKING:
    from samething.training.run import Run

__all__ = ["RECIPES", "FinetuneConfig", "TrainConfig", "train"]


def train(
    features: Path,
    *,
    output: Path = Path("run"),
    recipe: str = "universal",
    config: TrainConfig | None = None,
    resume: bool = True,
    finetune: FinetuneConfig | None = None,
    weights: Path | None = None,
    **overrides: Any,
) -> Run:
    """Train a head on the ``train`` images of a feature folder and validate it on the ``val`` images.

    A killed run continues from its last checkpoint and ends with the same weights as an undisturbed one.

    Args:
        features: the feature folder.
        output: the run folder to write.
        recipe: name of the preset in :data:`RECIPES` that the overrides change.
        config: a whole configuration instead of a recipe.
        resume: continue an unfinished run; otherwise start it over.
        finetune: let the backbone learn after the head, see :class:`FinetuneConfig`.
        weights: with ``finetune``: the backbone's checkpoint, if the features were made from one.
        overrides: fields of :class:`TrainConfig`, such as ``epochs=20``.

    Returns:
        The finished run.

    Raises:
        InputError: fewer than two classes, an option out of range, or a loss that is not finite any more.
        FingerprintError: the run folder is of another configuration or other features.
    """
    from samething.training.loop import run_training

    if config is None:
        if recipe not in RECIPES:
            raise InputError(
                f"recipe {recipe!r}",
                expected=f"one of {', '.join(RECIPES)}",
                next_step="choose one of these; single options can be changed after it",
            )
        config = RECIPES[recipe]()
    unknown = set(overrides) - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise InputError(
            f"unknown option {', '.join(sorted(unknown))}",
            expected="fields of TrainConfig",
            next_step="see samething train --help",
        )
    config = dataclasses.replace(config, **overrides)
    feature_set = FeatureSet.open(features)
    if finetune is not None and finetune.unfreeze:
        from samething.training.finetune import run_finetuning

        return run_finetuning(feature_set, config, finetune, Path(output), resume=resume, weights=weights)
    return run_training(feature_set, config, Path(output), resume=resume)
