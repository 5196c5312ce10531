"""Artwork: the Met dataset."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from samething.datasets.description import Dataset, Published
from samething.datasets.official import OfficialFiles


def read_met(source: OfficialFiles) -> pa.Table:
    """``MET_database.json``: a list of {id, path}, with paths in ``MET/`` (and in some copies with it)."""
    where = "met_dataset/ground_truth/MET_database.json"
    paths: list[pa.Array] = []
    labels: list[pa.Array] = []
    for first, batch in source.json_objects(where):
        for number, entry in enumerate(batch):
            if not isinstance(entry.get("path"), str) or "id" not in entry:
                raise source.malformed(
                    where, f"entry {first + number} is {entry!r}", expected="{id, path} in every entry"
                )
        paths.append(pa.array([entry["path"] for entry in batch], pa.string()))
        labels.append(pa.array([str(entry["id"]) for entry in batch], pa.string()))
    path = pc.replace_substring_regex(pa.chunked_array(paths), "^MET/", "")
    return source.rows(where, image=path, folder="met_dataset/MET/", label=pa.chunked_array(labels))


MET_ART = Dataset(
    key="met_art",
    title="The Met (exhibits)",
    domain="artwork",
    classes=224_408,
    images=397_121,
    licence="images CC0 (The Met Open Access); annotations for research",
    source="http://cmp.felk.cvut.cz/met/",
    get="unpack MET.tgz and ground_truth.tgz into met_dataset/",
    files=("met_dataset/ground_truth/MET_database.json", "met_dataset/MET/"),
    layout="https://github.com/nikosips/met, code/utils/datasets.py",
    reader=read_met,
    published=(Published(classes=224_408, images=397_121),),
)
