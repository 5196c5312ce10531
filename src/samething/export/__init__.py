"""From a run to a model that anyone can run: without torch, in the challenge, on the hub.

Making one needs torch; asking for help does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import cyclopts

from samething.export.exported import Exported
from samething.export.form import Form, Format, ModelPrecision, numbers_and_codes
from samething.retrieval.codes import StoredCodes

__all__ = ["Exported", "Form", "export"]


def export(
    run: Path,
    *,
    output: Path = Path("model"),
    name: str | None = None,
    weights: Path | None = None,
    features: tuple[Path, ...] = (),
    format: Format = "folder",  # noqa: A002 (the option's name)
    preprocessing_inside: bool = False,
    precision: ModelPrecision = "float32",
    dim: int | None = None,
    codes: StoredCodes | None = None,
    bytes: int | None = None,  # noqa: A002
    average: tuple[Path, ...] = (),
    soup: Literal["uniform", "greedy"] = "uniform",
    interpolate: float = 1.0,
    tolerance: float = 0.01,
    allow_quality_loss: Annotated[bool, cyclopts.Parameter(negative=())] = False,
) -> Exported:
    """Write a model folder: ONNX, safetensors, configuration and a card, checked against torch.

    Vectors are kept as the run was trained for: with the recipe universal 512 numbers of 4 bits, 256 bytes.
    Smaller and faster forms (--precision, --dim, --codes, --bytes, --preprocessing-inside) are measured
    against the model in float32 on the test images; one that loses more than the tolerance is refused.

    Args:
        run: the finished run folder.
        output: the model folder to write.
        name: name of the model; by default the folder's.
        weights: the backbone's checkpoint, if the features were made from one.
        features: where feature folders are now, if they were moved after the training.
        format: folder; hub (as folder, for the Hugging Face hub); guiec (the challenge's submission.zip);
            sentence-transformers.
        preprocessing_inside: let model.onnx take images of any size and resize them itself.
        precision: of the weights; float16 halves the file, int8 quarters it and computes in whole numbers,
            calibrated on training images.
        dim: keep the first numbers of the embedding only; good where matryoshka_dims trained them.
        codes: how vectors are kept: float32, int8 or int4; by default as the run was trained for.
        bytes: of a kept vector, at most: all numbers of the embedding in as many bits as fit, or its first
            ones in 4 bits. Instead of --dim and --codes.
        average: further runs whose weights are averaged with the first (a model soup); same start, same
            features.
        soup: uniform averages all; greedy keeps those that do not make the validation worse.
        interpolate: share of the trained weights, the rest being their start (WiSE); 1 is the trained model.
        tolerance: largest accepted fall of mMP@5 on the mean over domains, as a share: 0.01 is a point.
        allow_quality_loss: finish the model even if it falls by more.

    Returns:
        The finished model.

    Raises:
        FingerprintError: the backbone is not the one that the features were made with, or the folder holds
            another model.
        ArtefactError: features have moved, the model does not agree with torch, or its form loses too much.
        InputError: options that do not go together.
    """
    from samething.export.model_folder import write_model
    from samething.export.soups import Mix
    from samething.training.run import Run

    trained = Run.open(Path(run), moved=tuple(Path(folder) for folder in features))
    own: StoredCodes = "float32" if format == "guiec" else trained.config.codes
    dim, codes = numbers_and_codes(trained.head.embedding_dim, own, dim=dim, codes=codes, budget=bytes)
    return write_model(
        trained,
        Path(output),
        Form(
            format=format,
            input="images" if preprocessing_inside else "pixels",
            precision=precision,
            dim=dim,
            codes=codes,
        ),
        Mix(tuple(Path(other) for other in average), soup=soup, interpolate=interpolate),
        name=name,
        weights=weights,
        features=tuple(Path(folder) for folder in features),
        tolerance=tolerance,
        allow_quality_loss=allow_quality_loss,
    )
