"""From cached features to a trained head: seconds, because the backbone never runs again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from samething.configuration import changed, divided, read_config, with_options
from samething.errors import InputError
from samething.features import FeatureSet
from samething.training.config import RECIPES, FinetuneConfig, TrainConfig

if TYPE_CHECKING:
    from samething.training.run import Run

__all__ = ["RECIPES", "FinetuneConfig", "TrainConfig", "train"]


@with_options(
    TrainConfig,
    FinetuneConfig,
    groups={
        "Loss": ("loss", "num_centers", "scale", "margin", "loss_options"),
        "Head": ("start", "embedding_dim", "codes", "dropout", "whiten"),
        "Optimisation": (
            "epochs",
            "batch_size",
            "optimiser",
            "learning_rate",
            "sampling",
            "seed",
        ),
        "Fine-tuning of the backbone": ("unfreeze", "backbone_rate", "lora_rank"),
    },
)
def train(
    features: Path,
    *,
    output: Path = Path("run"),
    recipe: str = "universal",
    config: Path | TrainConfig | None = None,
    resume: bool = True,
    weights: Path | None = None,
    **changes: Any,
) -> Run:
    """Train a head on the train images of a feature folder and validate it on the val images.

    A killed run continues from its last checkpoint and ends with the same weights as an undisturbed one. The
    recipe sets every option, the file given with --config changes it, and options beside it change that.
    Several processes or GPUs share each batch when they are started by torchrun --standalone
    --nproc-per-node 2 --no-python samething train …

    Args:
        features: the feature folder.
        output: the run folder to write.
        recipe: universal (512 numbers in 256 bytes), plain (ArcFace, half whitened, 64 numbers), demo
            (Sub-Center ArcFace) or paper (the paper's winner).
        config: a TOML file with any of the fields listed in docs/commands.md, such as
            matryoshka_dims = [16, 32]; in Python also a whole TrainConfig in place of a recipe.
        resume: continue an unfinished run; --no-resume starts it over.
        weights: with --unfreeze: the backbone's checkpoint, if the features were made from one.
        changes: fields of TrainConfig and FinetuneConfig, such as epochs=20.

    Returns:
        The finished run.

    Raises:
        InputError: fewer than two classes, an option out of range, or a loss that is not finite any more.
        FingerprintError: the run folder is of another configuration or other features.
    """
    from samething.training.loop import run_training

    if config is not None and not isinstance(config, TrainConfig):
        changes = {**read_config(config), **changes}
    of_head, of_backbone = divided(changes, TrainConfig, FinetuneConfig)
    tune = changed(FinetuneConfig(), of_backbone)
    if recipe not in RECIPES:
        raise InputError(
            f"recipe {recipe!r}",
            expected=f"one of {', '.join(RECIPES)}",
            next_step="choose one of these; single options can be changed after it",
        )
    whole = config if isinstance(config, TrainConfig) else RECIPES[recipe]()
    whole = changed(whole, of_head)
    feature_set = FeatureSet.open(features)
    if tune.unfreeze:
        from samething.training.finetune import run_finetuning

        return run_finetuning(feature_set, whole, tune, Path(output), resume=resume, weights=weights)
    return run_training(feature_set, whole, Path(output), resume=resume)
