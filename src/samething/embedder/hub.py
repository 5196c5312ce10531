"""Models of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, Final

from samething.backbones.on_disk import hub_access
from samething.embedder.graph_repositories import GRAPH_NAMES, SETTINGS_NAME, is_graph_repository
from samething.errors import ArtefactError, needed

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
"""``owner/name``, or ``owner/name@revision``."""
HUB_FILES: Final = ("manifest.json", "config.json", "model.onnx*", "codes.npz", SETTINGS_NAME)
"""What embedding needs of a model on the hub; the weights for torch stay there."""


def model_folder(model: Path | str) -> Path:
    """The folder of a model: itself, or a hub's snapshot of it in the hub library's cache.

    Args:
        model: a folder, or ``owner/name[@revision]`` on the Hugging Face hub.

    Raises:
        MissingExtraError: it is no folder, looks like a hub id, and huggingface_hub is not installed.
        ArtefactError: the hub has no such model or cannot be reached.
    """
    folder = Path(model)
    if folder.exists() or not HUB_ID.fullmatch(str(model)):
        return folder
    huggingface_hub = needed("huggingface_hub", extra="hf")
    name, _, revision = str(model).partition("@")
    try:
        return Path(_snapshot(huggingface_hub, name, revision or None))
    except Exception as error:  # the client raises a dozen kinds, of several packages
        lines = str(error).strip().splitlines()
        raise ArtefactError(
            f"{model} is no folder here, and as a model on the hub it cannot be had "
            f"({type(error).__name__}{': ' + lines[0][:200] if lines else ''})",
            expected="a model folder, or the hub id owner/name of an exported model that may be read",
            next_step="check the spelling and the network; a private model needs: hf auth login",
        ) from error


def _snapshot(huggingface_hub: Any, name: str, revision: str | None) -> str:
    """The newest snapshot; without a network the one in the cache."""

    def fetched(*patterns: str, revision: str | None) -> str:
        options = {"repo_id": name, "revision": revision, "allow_patterns": list(patterns)}
        try:
            with hub_access():
                return str(huggingface_hub.snapshot_download(**options))
        except Exception:
            # the library falls back to its cache for some network errors only
            with contextlib.suppress(Exception):
                return str(huggingface_hub.snapshot_download(**options, local_files_only=True))
            raise

    folder = Path(fetched(*HUB_FILES, revision=revision))
    for graph in GRAPH_NAMES:  # one of them alone: each is large
        if is_graph_repository(folder) and not any((folder / each).is_file() for each in GRAPH_NAMES):
            fetched(f"{graph}*", revision=folder.name)
    return str(folder)
