"""What a build has finished so far: images with their checksums, one per line, added to as they come.

A killed build leaves its journal behind. The next build of the same kind reads it and takes over the images
whose files still have these checksums; a line or a file that was cut off is made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from samething.files import atomic_path, disk_errors

JOURNAL_NAME: Final = ".unfinished.jsonl"


def read_journal(folder: Path) -> tuple[str, dict[str, str]]:
    """The fingerprint of an unfinished build and its checksums by image; empty when there is none.

    Lines that are no JSON are passed over: the last one may be cut off.
    """
    made_from, checksums = "", {}
    path = folder / JOURNAL_NAME
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "made_from" in entry:
            made_from = entry["made_from"]
        elif "image" in entry and "sha256" in entry:
            checksums[entry["image"]] = entry["sha256"]
    return made_from, checksums


def start_journal(folder: Path, made_from: str, checksums: Mapping[str, str]) -> None:
    """Write the journal anew with what is known to be finished."""
    with atomic_path(folder / JOURNAL_NAME) as partial:
        partial.write_text(json.dumps({"made_from": made_from}) + "\n" + _lines(checksums), encoding="utf-8")


def add_to_journal(folder: Path, checksums: Mapping[str, str]) -> None:
    """Append finished images."""
    with disk_errors(folder), (folder / JOURNAL_NAME).open("a", encoding="utf-8") as stream:
        stream.write(_lines(checksums))


def remove_journal(folder: Path) -> None:
    """The build is finished."""
    (folder / JOURNAL_NAME).unlink(missing_ok=True)


def _lines(checksums: Mapping[str, str]) -> str:
    return "".join(
        json.dumps({"image": image, "sha256": sha256}) + "\n" for image, sha256 in checksums.items()
    )
