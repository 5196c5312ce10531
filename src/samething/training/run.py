"""A run folder on disk.

Layout::

    runs/NAME/
      config.json             the configuration and what it was trained on; written first
      metrics.jsonl           one line per record: loss and learning rate, validation scores
      checkpoints/last.pt     everything needed to go on
      checkpoints/head-*.safetensors   the head after so many steps, with keep_checkpoints
      head.safetensors        the trained head
      plots/*.svg             loss, learning rate and validation score over the steps
      manifest.json           written last
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
from rich.markup import escape
from torch import Tensor

from samething.checksums import require_whole
from samething.errors import ArtefactError
from samething.features import FeatureSet
from samething.files import Manifest, atomic_path, read_manifest, write_text
from samething.heads import Head, head_from_state
from samething.training.config import TrainConfig

KIND: Final = "run"
FORMAT_VERSION: Final = 1
BACKBONE_NAME: Final = "backbone.safetensors"
"""Weights of a fine-tuned backbone, in timm's layout."""
START_NAME: Final = "head-start.safetensors"
"""The head that a fine-tuned run began with."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training run."""

    folder: Path
    manifest: Manifest
    config: TrainConfig
    head: Head
    """The trained head, in evaluation mode."""
    records: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    was_finished: bool = True
    """Whether the run was found finished, with nothing left to do."""
    moved: tuple[Path, ...] = ()
    """Where feature folders are now, if they were moved after the training."""

    @classmethod
    def open(cls, folder: Path, *, moved: Iterable[Path] = ()) -> Run:
        """Open a finished run.

        Args:
            folder: the run folder.
            moved: where feature folders are now, if they were moved after the training.

        Raises:
            ArtefactError: missing, unfinished or damaged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, kind=KIND, format_version=FORMAT_VERSION)
        require_whole(folder, manifest, ["head.safetensors", "metrics.jsonl"])
        try:
            state = safetensors.torch.load_file(folder / "head.safetensors")
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ArtefactError(
                f"head or metrics of {folder} cannot be read ({error})",
                expected="the head.safetensors and metrics.jsonl of a finished run",
                next_step=f"remove {folder} and train again",
            ) from error
        head = head_from_state(manifest.content["head"], manifest.content["width"], state)
        config = TrainConfig.from_json(manifest.made_from["config"])
        return cls(folder, manifest, config, head, records, moved=tuple(moved))

    def features(self, *moved: Path) -> FeatureSet:
        """The features that the run was trained on.

        Args:
            moved: where feature folders are now; the one that the run was trained on is taken if it is among
                them, otherwise the folder that the run names.

        Raises:
            ArtefactError: no folder holds these features.
        """
        # a fine-tuned run has features of its own, by its own backbone
        wanted = self.manifest.content.get("features_fingerprint", self.manifest.made_from["features"])
        named = (self.folder / str(self.manifest.content["features"])).resolve()
        moved = (*moved, *self.moved)
        for folder in map(Path, moved):
            found = FeatureSet.open(folder)
            if found.manifest.fingerprint == wanted:
                return found
        tried = ", ".join(str(folder) for folder in (*moved, named))
        if not named.exists():
            raise ArtefactError(
                f"the features that {self.folder} was trained on are not at {tried}",
                expected=f"a feature folder with the fingerprint {wanted}",
                next_step="say where it is now with --features FOLDER",
            )
        found = FeatureSet.open(named)
        if found.manifest.fingerprint != wanted:
            raise ArtefactError(
                f"{tried} holds other features than those {self.folder} was trained on",
                expected=f"features with the fingerprint {wanted}",
                next_step="say where the right ones are with --features FOLDER, or train again",
            )
        return found

    @property
    def best_score(self) -> float | None:
        """Best validation mMP@5, or None where there was no validation."""
        score: float | None = self.manifest.content["best_score"]
        return score

    def __rich__(self) -> str:
        """What a person wants to know of the run, in a few lines."""
        content = self.manifest.content
        score = "no validation" if self.best_score is None else f"validation mMP@5 {self.best_score:.1%}"
        note = " (was finished, nothing to do)" if self.was_finished else ""
        trained = content["num_head_parameters"] + content["num_class_parameters"]
        total = content["num_head_parameters"] + (content["num_backbone_parameters"] or 0)
        lines = [
            f"[bold]{escape(str(self.folder))}[/bold]: {self.config.loss}, "
            f"{self.config.num_centers} centre(s) per class, "
            f"{self.head.embedding_dim}-d {self.config.codes}, {content['num_steps']:,} steps, {score}{note}",
            f"  parameters of the model {total:,}; trained {trained:,}: "
            f"{content['num_head_parameters']:,} of the head + {content['num_class_parameters']:,} "
            "of the classes (all centres)",
        ]
        return "\n".join(lines + [f"  [yellow]{escape(note)}[/yellow]" for note in content["notes"]])


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write metrics.jsonl."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def write_tensors(
    target: Path, state: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors by name; a full disk is an OSError, as it is not from the library's own writer."""
    with atomic_path(target) as partial:
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        partial.write_bytes(safetensors.torch.save(tensors, metadata=metadata))


def write_tensorboard(folder: Path, records: list[dict[str, Any]], num_written: int) -> int:
    """Add new records to the TensorBoard log, where TensorBoard is installed; returns how many are in it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return num_written
    new = records[num_written:]
    # a resumed run hides what a killed one logged after its last checkpoint
    step = new[0]["step"] if new else None
    with SummaryWriter(folder / "tensorboard", purge_step=step) as writer:
        for record in new:
            for name in record.keys() - {"step"}:
                writer.add_scalar(name, record[name], record["step"])
    return len(records)


def write_plots(folder: Path, records: list[dict[str, Any]]) -> None:
    """Draw loss, learning rate and validation score over the steps, one SVG each."""
    import matplotlib.figure

    for name, title in (
        ("loss", "loss"),
        ("learning_rate", "learning rate"),
        ("val/mmp@5", "validation mMP@5"),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        if not points:
            continue
        figure = matplotlib.figure.Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True))
        axes.set(xlabel="step", ylabel=title)
        axes.grid(alpha=0.3)
        path = folder / "plots" / f"{name.replace('/', '_').replace('@', '_at_')}.svg"
        with atomic_path(path) as partial:
            figure.savefig(partial, format="svg", metadata={"Date": None})
