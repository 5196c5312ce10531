"""Networks of timm: any architecture without its classifier, with or without CLIP's projection, any size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samething.backbones.network import bytes_of
from samething.errors import ArtefactError, InputError, MissingExtraError
from samething.images import Preprocessing


def timm_network(
    name: str, *, projection: bool = False, size: int | None = None, **options: Any
) -> nn.Module:
    """A network of timm that maps normalised pixels (b, 3, height, width) to features (b, w).

    Args:
        name: ARCHITECTURE or ARCHITECTURE.TAG.
        projection: keep the projection (timm's classifier) that CLIP's weights come with.
        size: side of the input, where it is not the architecture's own.
        options: for ``timm.create_model``.

    Raises:
        InputError: the architecture has a fixed input size.
        MissingExtraError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", extra="train") from error
    if not projection:
        options["num_classes"] = 0
    network: Any = timm.create_model(name, **options)
    if name.startswith("samvit"):
        _without_neck(network)
    if name.startswith("convnext_large_mlp") and not projection:
        network.head.pre_logits = nn.Identity()  # the hidden layer belongs to the projection
    if size is not None:
        _resize_input(network, size, name=name)
    result: nn.Module = network
    return result


def _without_neck(network: Any) -> None:
    """SAM's neck narrows its tokens to 256 numbers for the mask decoder; features come before it."""
    network.neck = nn.Identity()
    network.num_features = network.head_hidden_size = network.pos_embed.shape[-1]


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


def timm_from_checkpoint(
    name: str, checkpoint: Path, *, projection: bool = False, size: int | None = None
) -> nn.Module:
    """The network with the weights of a file in timm's layout.

    Raises:
        ArtefactError: the file does not exist, is damaged, or lacks weights of the network.
    """
    expected = f"a checkpoint in timm's layout for {name} (.safetensors, .pth or .bin)"
    try:
        # timm loads without complaint whatever a checkpoint lacks, so the network is built twice from
        # different random starts: what differs was not in the checkpoint
        first = _digests(_loaded_from(name, checkpoint, seed=0, projection=projection, size=size))
        network = _loaded_from(name, checkpoint, seed=1, projection=projection, size=size)
    except (MissingExtraError, InputError):
        raise
    except Exception as error:
        raise ArtefactError(
            f"{checkpoint} does not fit {name} ({type(error).__name__}: {first_line(error)})",
            expected=expected,
            next_step="check that backbone and checkpoint belong together",
        ) from error
    missing = [key for key, digest in _digests(network).items() if first[key] != digest]
    if missing:
        raise ArtefactError(
            f"{checkpoint} does not fit {name}: it lacks {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            expected=expected,
            next_step="check that backbone and checkpoint belong together",
        )
    return network


def _loaded_from(name: str, checkpoint: Path, *, seed: int, projection: bool, size: int | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm_network(
            name,
            projection=projection,
            size=size,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(checkpoint)},
        )


def _digests(network: nn.Module) -> dict[str, bytes]:
    return {key: hashlib.sha256(bytes_of(tensor)).digest() for key, tensor in network.state_dict().items()}


def first_line(error: Exception) -> str:
    """The first line of an error's message, cut to what a person reads."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def timm_settings(network: nn.Module) -> Preprocessing:
    """Preprocessing of any timm model, as timm's own evaluation transform has it."""
    import timm.data

    settings = timm.data.resolve_model_data_config(network)
    return Preprocessing(
        size=settings["input_size"][-1],
        crop_fraction=float(settings["crop_pct"]),
        resize="squash" if settings["crop_mode"] == "squash" else "short_side_crop",
        interpolation=settings["interpolation"],
        mean=three(settings["mean"]),
        std=three(settings["std"]),
    )


def timm_licence(name: str) -> str:
    """Licence of a model's weights as timm knows it."""
    import timm

    configured = timm.get_pretrained_cfg(name)
    return (configured.license if configured else None) or "unknown"


def require_timm_name(timm_name: str) -> None:
    """Raise an InputError with neighbours if this version of timm does not know the model."""
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", extra="train") from error
    if not timm.is_model(timm_name):
        close = timm.list_models(f"*{timm_name.split('.')[0].split('_')[0]}*", pretrained=True)[:5]
        raise InputError(
            f"timm:{timm_name}",
            expected="a model that this version of timm knows",
            next_step=f"for instance {', '.join(close)}" if close else "see timm.list_models()",
        )


def three(channels: Sequence[float]) -> tuple[float, float, float]:
    """Red, green and blue as plain floats."""
    red, green, blue = channels
    return float(red), float(green), float(blue)
