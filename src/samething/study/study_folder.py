"""A study on disk: what was tried, line after line, so that a killed study goes on where it stopped.

Layout::

    studies/NAME/
      config.json       the question, and the fingerprint of the features it is asked about; written first
      log.jsonl         a line per trial: what was tried, its seed, its score for every query; only appended
      runs/             the training under way; empty otherwise
      results.parquet   the result table
      report.md, report.html
      manifest.json     written last

The log is what a study remembers: a trial that is in it is not run again, and one look at the test
images is all there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from samething.arrays import PerQuery
from samething.checksums import checksums_of, require_whole
from samething.errors import ArtefactError
from samething.files import (
    MANIFEST_NAME,
    Json,
    Manifest,
    claim_folder,
    disk_errors,
    fingerprint,
    is_finished,
    only_one_writer,
    read_manifest,
    write_manifest,
)

KIND: Final = "study"
FORMAT_VERSION: Final = 1
CONFIG_NAME: Final = "config.json"
LOG_NAME: Final = "log.jsonl"
_DIGITS: Final = 6


def canonical(value: Json) -> str:
    """One text for equal values, whatever the order of their keys.

    >>> canonical({"b": 1, "a": [2.0]}) == canonical({"a": [2.0], "b": 1})
    True
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@dataclasses.dataclass(eq=False)
class StudyFolder:
    """A study that is being made; open it with :meth:`claimed`."""

    folder: Path
    made_from: Mapping[str, Json]
    trials: dict[str, dict[str, Json]] = dataclasses.field(default_factory=dict)
    """Lines of the log by the canonical text of what was tried."""
    num_new: int = 0
    """Trials that this process has run, rather than found."""

    @classmethod
    @contextlib.contextmanager
    def claimed(cls, folder: Path, made_from: Mapping[str, Json]) -> Iterator[StudyFolder]:
        """Hold a folder for a study and read what it remembers.

        Args:
            folder: new, empty, or of the same study.
            made_from: everything that decides the result: the options and the features' fingerprint.

        Raises:
            FingerprintError: the folder is of another study, or of other features.
            ArtefactError: it holds other files, another process writes to it, or its log is damaged.
        """
        folder = Path(folder)
        with only_one_writer(folder), disk_errors(folder):
            # as it will be read again: tuples become lists
            plain = json.loads(canonical(dict(made_from)))
            claim_folder(folder, CONFIG_NAME, plain, kind=KIND, next_step="choose another folder with -o")
            study = cls(folder, plain)
            if is_finished(folder):
                manifest = read_manifest(folder, kind=KIND, format_version=FORMAT_VERSION)
                require_whole(folder, manifest, [LOG_NAME])
            path = folder / LOG_NAME
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # a line that a killed process left half written
                with path.open("rb+") as stream:
                    stream.truncate(len(whole))
            for number, line in enumerate(whole.splitlines()):
                try:
                    record = json.loads(line)
                    study.trials[canonical(record["tried"])] = record
                except (ValueError, KeyError, TypeError) as error:
                    raise ArtefactError(
                        f"line {number + 1} of {path} cannot be read ({error})",
                        expected="a line of JSON a trial, as the study wrote it",
                        next_step="remove that line and run the study again: what is missing is tried again",
                    ) from error
            yield study

    def _append(self, record: dict[str, Json]) -> None:
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)  # it is not finished any more
        with (self.folder / LOG_NAME).open("ab") as stream:
            stream.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())
        self.trials[canonical(record["tried"])] = record
        self.num_new += 1

    def scores(self, tried: Mapping[str, Json], measure: Callable[[Path], PerQuery]) -> PerQuery:
        """The score of every query in a trial: from the log, or measured now and written there.

        Args:
            tried: what decides the trial, its seed included, as JSON.
            measure: run it; is given a folder for its own files, which stays if the process is killed, so
                that the same trial can go on there, and is removed afterwards.
        """
        key = canonical(dict(tried))
        if key not in self.trials:
            work = self.folder / "runs" / fingerprint(json.loads(key))
            self._append({"tried": json.loads(key), "values": _listed(measure(work))})
            shutil.rmtree(work, ignore_errors=True)
        return _scores(self.trials[key]["values"])

    def tested(
        self, chosen: Mapping[str, Json], measure: Callable[[], Mapping[str, PerQuery]]
    ) -> dict[str, PerQuery]:
        """The one look at the test images; a second look returns what the first one saw.

        Args:
            chosen: what was chosen on validation images, as JSON.
            measure: a score for every test query, for each of the things that are compared.

        Raises:
            ArtefactError: the test images have been looked at for another choice.
        """
        plain = json.loads(canonical(dict(chosen)))
        for record in self.trials.values():
            if record["tried"].get("part") == "test" and record["tried"]["chosen"] != plain:
                raise ArtefactError(
                    f"the test images were looked at in {self.folder} for another choice",
                    expected="one look at the test images, when everything has been chosen",
                    next_step="start a new study with -o, on test images that were not looked at",
                )
        tried = {"part": "test", "chosen": plain}
        if canonical(tried) not in self.trials:
            values = {name: _listed(scores) for name, scores in measure().items()}
            self._append({"tried": tried, "values": values})
        found = self.trials[canonical(tried)]["values"]
        return {name: _scores(values) for name, values in found.items()}

    def finish(self, content: Mapping[str, Json]) -> None:
        """Write the manifest."""
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        manifest = Manifest(
            kind=KIND,
            format_version=FORMAT_VERSION,
            made_from=dict(self.made_from),
            content={**content, **checksums_of(self.folder)},
        )
        write_manifest(self.folder, manifest)


def _listed(scores: PerQuery) -> list[float | None]:
    """Scores as the log keeps them."""
    return [None if np.isnan(value) else round(float(value), _DIGITS) for value in scores]


def _scores(listed: list[float | None]) -> PerQuery:
    """The inverse of :func:`_listed`, but for the digits that it cut off."""
    return np.array([np.nan if value is None else value for value in listed], dtype=np.float64)
