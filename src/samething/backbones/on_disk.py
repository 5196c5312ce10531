"""Whether a row's weights are on this disk, and whether the hub with the others answers. Needs no torch."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from samething.backbones.backbone_table import BackboneRow

_WEIGHT_FILES: Final = (
    "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Names that the hub's repositories give their weights; the last two list the pieces of large ones."""


def _hub() -> Any:
    """The settings of the hub's client; None if it is not installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    return importlib.import_module("huggingface_hub.constants")


def hub_cache() -> Path | None:
    """The hub client's cache folder; None if the client is not installed."""
    hub = _hub()
    return None if hub is None else Path(hub.HF_HUB_CACHE)


def weights_on_disk(row: BackboneRow) -> Path | None:
    """Where a row's weights lie on this disk; None if they have to be fetched first."""
    if not row.hub:
        found = importlib.util.find_spec(row.identifier.replace("-", "_"))
        return Path(found.origin).parent if found and found.origin else None
    cache = hub_cache()
    if cache is None:
        return None
    for snapshot in sorted((cache / f"models--{row.hub.replace('/', '--')}" / "snapshots").glob("*")):
        for name in _WEIGHT_FILES:
            if (snapshot / name).exists():  # a link whose file is gone does not exist
                return snapshot / name
    return None


HUB_PATIENCE_S: Final = 3.0
"""How long the hub may take to say anything at all."""


def hub_answers() -> bool:
    """Whether the model hub can be reached, asked once per process; False where its client is missing."""
    hub = _hub()
    return hub is not None and not hub.HF_HUB_OFFLINE and _answers(str(hub.ENDPOINT))


@functools.cache
def _answers(address: str) -> bool:
    heard: list[bool] = []

    def ask() -> None:
        import urllib.request

        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_PATIENCE_S)
        except urllib.error.HTTPError:
            heard.append(True)  # any answer is one
        except (OSError, ValueError):
            return
        else:
            heard.append(True)

    # looking up a name has no time limit of its own
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_PATIENCE_S)
    return bool(heard)


@contextlib.contextmanager
def hub_access() -> Iterator[None]:
    """Inside, clients of the hub use the network only if the hub answers.

    Otherwise they take what is on this disk at once, or fail at once: each would try again for most of a
    minute.
    """
    hub = _hub()
    if hub is None:
        yield
        return
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
