"""``samething train``: every field of TrainConfig is an option; those not given come from the recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import docstring_parser
from cyclopts import Parameter

import samething.training
from samething.training.config import TrainConfig
from samething.training.finetune_config import FinetuneConfig


def _options(config: type[Any], name_of_class: str) -> type[Any]:
    """A dataclass with the fields of a configuration, all None, and their sentences as help."""
    sentences = {
        parameter.arg_name: parameter.description
        for parameter in docstring_parser.parse_from_object(config).params
    }
    fields: list[tuple[str, Any, Any]] = [
        (
            name,
            Annotated[kind | None, Parameter(help=sentences[name], show_default=False, negative_none=())],
            dataclasses.field(default=None),
        )
        for name, kind in get_type_hints(config).items()
        if name != "loss_options"
    ]
    return dataclasses.make_dataclass(name_of_class, fields, frozen=True, kw_only=True)


TrainOptions = _options(TrainConfig, "TrainOptions")
FinetuneOptions = _options(FinetuneConfig, "FinetuneOptions")
# cyclopts takes a class of the module "types" for a plain value
TrainOptions.__module__ = FinetuneOptions.__module__ = __name__
_UNCHANGED = TrainOptions()
_FROZEN = FinetuneOptions()


def train(
    features: Path,
    *,
    output: Path = Path("run"),
    recipe: str = "universal",
    resume: bool = True,
    loss_option: dict[str, float | bool | str] | None = None,
    weights: Path | None = None,
    options: Annotated[TrainOptions, Parameter(name="*")] = _UNCHANGED,  # type: ignore[valid-type]
    finetune: Annotated[FinetuneOptions, Parameter(name="*")] = _FROZEN,  # type: ignore[valid-type]
) -> Any:
    """Train a head on the train images of a feature folder and validate it on the val images.

    A killed run continues from its last checkpoint and ends with the same weights as an undisturbed one. The
    recipe sets every option; options given beside it change it. Several processes or GPUs share each batch
    when they are started by torchrun --standalone --nproc-per-node 2 --no-python samething train …

    Args:
        features: the feature folder.
        output: the run folder to write.
        recipe: universal (best on unseen domains), demo (Sub-Center ArcFace) or paper (the paper's winner).
        resume: continue an unfinished run; --no-resume starts it over.
        loss_option: further options of a loss by their names in docs/losses.md, such as --loss-option.h 0.333
            for adaface, --loss-option.dynamic true for adacos and --loss-option.schedule inverse_root for
            dynm-arcface.
        weights: with --unfreeze: the backbone's checkpoint, if the features were made from one.
        options: changes to the recipe.
        finetune: how the backbone learns after the head; it stays frozen without --unfreeze.
    """
    from samething.training.distributed import is_first_by_environment

    changes = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    if loss_option:
        changes["loss_options"] = loss_option
    tuning = {name: value for name, value in dataclasses.asdict(finetune).items() if value is not None}
    run = samething.training.train(
        features,
        output=output,
        recipe=recipe,
        resume=resume,
        finetune=FinetuneConfig(**tuning) if tuning else None,
        weights=weights,
        **changes,
    )
    return run if is_first_by_environment() else None  # several processes print one result
