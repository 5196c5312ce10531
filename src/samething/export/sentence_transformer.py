"""Modules that sentence-transformers loads by itself: a timm model, unit length, linear maps, unit length.

Only the library's own modules are used, so ``SentenceTransformer(path)`` needs neither this package nor trust
in foreign code. The head's standardisation becomes part of its linear map.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samething.backbones import BACKBONES, Backbone
from samething.backbones.loading import PACKAGED_ARCHITECTURE
from samething.errors import InputError
from samething.export.embedding_model import EmbeddingModel
from samething.files import write_json
from samething.heads import BatchStandardise, Head, Standardise
from samething.training.run import write_tensors


def write_sentence_transformer(model: EmbeddingModel, output: Path) -> None:
    """Write ``modules.json`` and a folder for each module.

    Raises:
        InputError: a backbone that is not timm's, or prepared in a way that timm's transform does not know.
    """
    modules = [("Transformer", "0_Transformer")]
    _write_backbone(model.backbone, output / "0_Transformer")
    for kind, fields, tensors in _head_modules(model.head):
        path = f"{len(modules)}_{kind}"
        write_json(output / path / "config.json", fields)
        if tensors:
            write_tensors(output / path / "model.safetensors", tensors, metadata={"format": "pt"})
        modules.append((kind, path))
    rows = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(modules)
    ]
    write_json(output / "modules.json", rows)
    write_json(
        output / "config_sentence_transformers.json",
        {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}},
    )


def _write_backbone(backbone: Backbone, folder: Path) -> None:
    preprocessing = backbone.preprocessing
    if preprocessing.resize == "longer_side_pad":
        raise InputError(
            "--format sentence-transformers of a model whose images are padded to a square",
            expected="the resize policies short_side_crop or squash, which timm's transform has",
            next_step="extract features with --views squash, or export without --format",
        )
    size = getattr(getattr(backbone.network, "patch_embed", None), "img_size", None)
    write_json(
        folder / "config.json",
        {
            "architecture": timm_architecture(backbone),
            "architectures": ["TimmWrapperModel"],
            "model_type": "timm_wrapper",
            "num_classes": 0,
            "num_features": backbone.width,
            "label_names": [],
            "dtype": "float32",
            # the architecture's own default would get the input size of a vision transformer wrong
            "model_args": {} if size is None else {"img_size": list(size)},
            "pretrained_cfg": {
                "input_size": [3, preprocessing.size, preprocessing.size],
                "fixed_input_size": True,
                "interpolation": preprocessing.interpolation,
                "crop_pct": preprocessing.crop_fraction,
                "crop_mode": "squash" if preprocessing.resize == "squash" else "center",
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
                "num_classes": 0,
            },
        },
    )
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"image": {"method": "forward", "method_output_name": "pooler_output"}},
            "module_output_name": "sentence_embedding",
        },
    )
    state = {f"timm_model.{name}": value for name, value in backbone.network.state_dict().items()}
    write_tensors(folder / "model.safetensors", state, metadata={"format": "pt"})


def timm_architecture(backbone: Backbone) -> str:
    """timm's name of a backbone's network.

    Raises:
        InputError: it is not one of timm's.
    """
    row = BACKBONES.get(backbone.name)
    name = backbone.name.removeprefix("timm:")
    if row is not None:
        name = PACKAGED_ARCHITECTURE if row.loader == "package" else row.identifier
    if not type(backbone.network).__module__.startswith("timm.") or not re.fullmatch(r"[\w.]+", name):
        raise InputError(
            f"--format sentence-transformers of the backbone {backbone.name}",
            expected="a backbone of timm, which sentence-transformers loads by itself",
            next_step="export without --format, and use samething's own Embedder",
        )
    return name.split(".")[0]


def _head_modules(head: Head) -> list[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """Kind, configuration and tensors of the modules behind the backbone.

    Raises:
        InputError: the head takes powers of the features, for which sentence-transformers has no module.
    """
    if head.config.standardise and head.config.power != 1:
        raise InputError(
            f"--format sentence-transformers of a head with power {head.config.power}",
            expected="a head of the features as they are: sentence-transformers has no module for powers",
            next_step="train with --recipe plain, or export without --format",
        )
    layers = [module for module in head.projection.modules() if isinstance(module, nn.Linear)]
    found: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = []
    if isinstance(head.standardise, Standardise):
        found.append(("Normalize", {}, {}))
    shift, scale = _input_shift_and_scale(head)
    for place, layer in enumerate(layers):
        weight = layer.weight.detach().double()
        bias = (
            torch.zeros(len(weight), dtype=torch.float64)
            if layer.bias is None
            else layer.bias.detach().double()
        )
        if place == 0:
            weight = weight / scale
            bias = bias - weight @ shift
        activation = (
            "torch.nn.modules.activation.GELU"
            if place < len(layers) - 1
            else "torch.nn.modules.linear.Identity"
        )
        fields = {
            "in_features": weight.shape[1],
            "out_features": len(weight),
            "bias": True,
            "activation_function": activation,
        }
        found.append(("Dense", fields, {"linear.weight": weight.float(), "linear.bias": bias.float()}))
    return [*found, ("Normalize", {}, {})]


def _input_shift_and_scale(head: Head) -> tuple[Tensor, Tensor]:
    """The first linear map's input is (feature - shift) / scale, a number each."""
    shift = torch.zeros(head.width, dtype=torch.float64)
    scale = torch.ones(head.width, dtype=torch.float64)
    for module in (head.standardise, *head.projection.modules()):
        if isinstance(module, Standardise):
            own_shift, own_scale = module.mean.double(), module.scale.double().expand(head.width)
        elif isinstance(module, BatchStandardise):
            own_shift = module.running_mean.double()
            own_scale = (module.running_var.double() + 1e-5).sqrt()
        else:
            continue
        shift, scale = shift + scale * own_shift, scale * own_scale
    return shift, scale
