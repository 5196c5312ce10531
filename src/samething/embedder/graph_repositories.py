"""ONNX graphs of others as models: the layout of transformers.js and optimum, without them and torch.

Such a repository holds ``preprocessor_config.json`` and ``onnx/vision_model.onnx``, ``onnx/model.onnx`` or
``model.onnx``: normalised float pixels to the outputs of an image encoder of transformers.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from samething.arrays import Embeddings, PixelBatch, unit
from samething.backbones.processor_settings import processor_preprocessing
from samething.errors import ArtefactError
from samething.files import MANIFEST_NAME, Json, file_sha256, read_json
from samething.images import Preprocessing

SETTINGS_NAME: Final = "preprocessor_config.json"
GRAPH_NAMES: Final = ("onnx/vision_model.onnx", "onnx/model.onnx", "model.onnx")
"""Where the image encoder is, the first of them that there is; the second may need texts as well."""
_OUTPUTS: Final = ("image_embeds", "pooler_output", "last_hidden_state")
"""The first of them that a graph has is the feature; of tokens the first, which is the class token."""


def is_graph_repository(folder: Path) -> bool:
    """Whether a folder is such a repository rather than a model folder of this project."""
    return not (folder / MANIFEST_NAME).exists() and (folder / SETTINGS_NAME).is_file()


def graph_of(folder: Path) -> Path:
    """The image encoder's file.

    Raises:
        ArtefactError: there is none.
    """
    for name in GRAPH_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise ArtefactError(
        f"{folder} holds {SETTINGS_NAME} and no ONNX graph",
        expected=f"one of {', '.join(GRAPH_NAMES)}",
        next_step="choose a repository with ONNX files, such as those of onnx-community on the hub",
    )


def preprocessing_of(folder: Path) -> Preprocessing:
    """What ``preprocessor_config.json`` asks for.

    Raises:
        ArtefactError: it asks for something that images are not prepared with here.
    """
    given = read_json(folder / SETTINGS_NAME)
    kind = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
    normalises = given.get("do_normalize", True)
    size, crop = given.get("size", 224), given.get("crop_size")
    if isinstance(size, int):  # as it was written before 2023
        size = {"shortest_edge": size} if given.get("do_center_crop") else {"height": size, "width": size}
    processor = types.SimpleNamespace(
        size=size,
        crop_size={"height": crop} if isinstance(crop, int) else crop,
        do_center_crop=given.get("do_center_crop", False),
        resample=given.get("resample", 2 if kind.startswith("ViT") else 3),
        image_mean=given.get("image_mean", (0.5, 0.5, 0.5)) if normalises else (0, 0, 0),
        image_std=given.get("image_std", (0.5, 0.5, 0.5)) if normalises else (1, 1, 1),
    )
    try:
        return processor_preprocessing(processor)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            f"{folder / SETTINGS_NAME} asks for a way to prepare images that is not known here ({error!r})",
            expected="size, resample (1, 2 or 3), image_mean and image_std as transformers writes them",
            next_step="choose another repository, or export the model with samething",
        ) from error


class NormalisedGraph:
    """A graph of normalised float pixels, asked as one of uint8 pixels whose vectors have unit length.

    Args:
        session: the graph, opened.
        preprocessing: how its images are prepared and normalised.
        name: of its file, for errors.

    Raises:
        ArtefactError: it needs more than pixels, or has no output of an image encoder.
    """

    def __init__(self, session: Any, preprocessing: Preprocessing, name: str) -> None:
        inputs = session.get_inputs()
        outputs = {one.name for one in session.get_outputs()}
        known = [each for each in _OUTPUTS if each in outputs]
        if len(inputs) != 1 or not known:
            raise ArtefactError(
                f"{name} takes {', '.join(one.name for one in inputs)}; gives {', '.join(sorted(outputs))}",
                expected=f"pixel_values alone, and one of {', '.join(_OUTPUTS)}",
                next_step="choose a repository whose image encoder is a file of its own, vision_model.onnx",
            )
        self._session, self._input, self._output = session, inputs[0].name, known[0]
        self._type = np.float16 if "float16" in inputs[0].type else np.float32
        self._mean = np.array(preprocessing.mean, np.float32).reshape(3, 1, 1)
        self._std = np.array(preprocessing.std, np.float32).reshape(3, 1, 1)

    def run(self, _: object, given: Mapping[str, PixelBatch]) -> list[Embeddings]:
        """Unit-length vectors (b, d) of prepared pixels, called as a session is."""
        (pixels,) = given.values()
        normalised = (pixels.astype(np.float32) / 255 - self._mean) / self._std
        found = self._session.run([self._output], {self._input: normalised.astype(self._type)})[0]
        return [unit((found[:, 0] if found.ndim == 3 else found).astype(np.float32), np.float32)]


def description(folder: Path, session: Any) -> tuple[Json, Json]:
    """What such a model was made from, for its fingerprint, and its configuration."""
    graph, preprocessing = graph_of(folder), preprocessing_of(folder)
    blank = np.zeros((1, 3, *preprocessing.shape), np.uint8)
    dim = session.run(None, {"pixels": blank})[0].shape[1]
    files = sorted(graph.parent.glob(f"{graph.name}*"))
    made_from = {
        "files": {file.name: file_sha256(file) for file in files},
        "preprocessing": preprocessing.to_json(),
    }
    parts = folder.parts
    name = folder.name
    if len(parts) > 2 and parts[-2] == "snapshots":  # in the hub client's cache, below models--OWNER--NAME
        name = parts[-3].removeprefix("models--").replace("--", "/")
    backbone = {"name": name, "preprocessing": preprocessing.to_json()}
    return made_from, {"name": name, "backbone": backbone, "embedding_dim": dim}
