"""What training a head and fine-tuning share: the run folder, the loop, its checkpoints and its end."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import io
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from samething.arrays import Float, Int
from samething.backbones import Backbone
from samething.checksums import checksums_of, read_sealed, write_sealed
from samething.errors import ArtefactError, InputError
from samething.features import FeatureSet
from samething.files import (
    Json,
    Manifest,
    claim_folder,
    disk_errors,
    is_finished,
    only_one_writer,
    read_json,
    write_manifest,
)
from samething.heads import Head
from samething.losses import MarginHead
from samething.losses.fused_step import FusedMarginStep
from samething.losses.head import generator_for_step
from samething.losses.matrix_products import bfloat16_slowdown
from samething.losses.processes import is_first, joined, own_part, sum_gradients, wait_for_all
from samething.progress import progress_bar, say
from samething.sampling import epoch_batches
from samething.training.config import REMOVED, TrainConfig
from samething.training.data import TrainingData
from samething.training.on_card import RowsOnDevice
from samething.training.optimisers import Schedule
from samething.training.run import (
    BACKBONE_NAME,
    FORMAT_VERSION,
    KIND,
    START_NAME,
    write_plots,
    write_records,
    write_tensorboard,
    write_tensors,
)
from samething.training.unfreezing import Unfrozen
from samething.training.validation import validation_scores

CONFIG_NAME: Final = "config.json"
RECORDS_PER_EPOCH: Final = 20
_CHECKPOINT_VERSION: Final = 2
_RESULTS: Final = ("manifest.json", "metrics.jsonl", "head.safetensors")
_FOLDERS: Final = ("checkpoints", "plots", "tensorboard", "members")  # members: of earlier versions
_FINETUNED: Final = (BACKBONE_NAME, START_NAME, "catalog.parquet", "features", "head-first")
_COUNTERS: Final = (
    "step",
    "records",
    "losses",
    "best_score",
    "best",
    "validations_without_gain",
    "stopped_early",
)


@contextlib.contextmanager
def claimed(folder: Path, made_from: dict[str, Any], *, resume: bool) -> Iterator[bool]:
    """Hold a run folder, with the other processes if there are some; gives whether the run is finished.

    Args:
        folder: the run folder.
        made_from: what the run is made from.
        resume: go on with what is there; otherwise it is removed first.

    Raises:
        FingerprintError: the folder is of another configuration or other features.
        ArtefactError: it holds other files.
    """
    # the processes may not have joined yet
    lock = only_one_writer(folder) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext()
    with joined(), lock, disk_errors(folder):
        if is_first():
            recorded = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).exists() else None
            if recorded is not None and not resume:
                for name in (*_RESULTS, *_FOLDERS, *(_FINETUNED if "finetune" in recorded else ())):
                    shutil.rmtree(folder / name, ignore_errors=True)
                    with contextlib.suppress(FileNotFoundError):
                        (folder / name).unlink()
                (folder / CONFIG_NAME).unlink()  # goes last: until then the folder is known to be a run's
                recorded = None
            claim_folder(
                folder,
                CONFIG_NAME,
                made_from if recorded is None else _as_recorded(recorded, made_from),
                kind=KIND,
                next_step="choose another folder with -o, or start this one over with --no-resume",
            )
        wait_for_all()
        yield is_finished(folder)
        wait_for_all()


def _as_recorded(recorded: dict[str, Any], made_from: dict[str, Any]) -> dict[str, Any]:
    """What the run is made from, as the version that began it would say: but for options at their defaults
    that came later, and with those that have gone."""
    then, defaults = recorded.get("config", {}), TrainConfig().to_json()
    config = {
        name: value for name, value in made_from["config"].items() if name in then or value != defaults[name]
    }
    gone = {name: value for name, value in REMOVED.items() if name in then}
    return {**made_from, "config": {**config, **gone}}


def copied_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of a module's tensors, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


class Trainer(abc.ABC):
    """A run in the making: what is learned, and where it stands.

    Args:
        features: what is trained on.
        data: the rows that train, and those that validate.
        config: of the head's training.
        folder: the run folder.
    """

    head: Head
    margin_head: MarginHead
    optimiser: torch.optim.Optimizer
    schedule: Schedule
    fused_step: FusedMarginStep | None = None
    """The quick path for the class weights on a CPU; None where autograd has to do it."""
    backbone: Backbone | None = None
    """What makes features of the inputs, where they are images."""
    unfrozen: Unfrozen | None = None
    """What of the backbone learns as well."""
    on_device: RowsOnDevice | None = None
    """The features, where they live on a card."""

    # what a concrete trainer says of itself
    title: str
    checkpoint_name: str
    batch_size: int
    sampling_seed: int
    dropout_seed: tuple[int, ...]
    validate_every: float
    patience: int = 0
    records_from: tuple[int, float] = (0, 0.0)
    """Steps and epochs that went before."""
    advice: str

    def __init__(self, features: FeatureSet, data: TrainingData, config: TrainConfig, folder: Path) -> None:
        self.features, self.data, self.config, self.folder = features, data, config, folder
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        is_slow = config.precision == "bfloat16" and self.device.type == "cpu"
        if is_slow and (slower := bfloat16_slowdown()) > 1.2:
            say(
                f"--precision bfloat16 takes {slower:.1f} times as long as float32 on this processor, "
                "which has no instructions for it; leave it out"
            )
        self.step = 0
        self.records: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self._under_way: list[Tensor] = []
        self._full_step: Callable[..., Tensor] = self._step
        self.num_logged = 0
        self.best_score: float | None = None
        self.best: dict[str, dict[str, Tensor]] = {}
        self.validations_without_gain = 0
        self.stopped_early = False

    # ---- what differs

    @abc.abstractmethod
    def _batches(self) -> Generator[tuple[Int[np.ndarray, " b"], Tensor], None, None]:
        """The batches that are left: rows of the training data, and this process's part of what is put in, or
        its places in :attr:`on_device`."""

    @abc.abstractmethod
    def _validation_embeddings(self) -> Float[np.ndarray, "v d"]:
        """Unit-length embeddings of the validation images."""

    @abc.abstractmethod
    def learned(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the weights as they would be used."""

    # ---- the loop

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return max(1, len(self._epoch(0)))

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end."""
        self._resume()
        num_steps = self.schedule.num_steps
        if self.step == 0 and self.config.start == "lda" and not self.records:
            self._validate()
        per_epoch = self.steps_per_epoch
        stride = max(1, round(self.validate_every * per_epoch))
        between = (
            max(1, round(self.config.checkpoint_every * per_epoch)) if self.config.checkpoint_every else 0
        )
        bar = progress_bar(
            "images",
            "{task.fields[loss]} {task.fields[score]}",
            disable=not is_first() or num_steps == 0,
        )
        sizes = [len(batch) for batch in self._epoch(0)]
        total, done = (  # epochs of one length are assumed
            steps // len(sizes) * sum(sizes) + sum(sizes[: steps % len(sizes)])
            for steps in (num_steps, self.step)
        )
        score = "" if self.best_score is None else f"best mMP@5 {self.best_score:.1%}"
        with bar as progress, contextlib.closing(self._batches()) as batches:
            task = progress.add_task(self.title, total=total, completed=done, loss="", score=score)
            while self.step < num_steps and not self.stopped_early:
                rows, inputs = next(batches)
                self._under_way.append(self._train_step(rows, inputs))
                self.step += 1
                is_recorded = self.step % max(1, per_epoch // RECORDS_PER_EPOCH) == 0
                is_validated = self.step % stride == 0 or self.step == num_steps
                is_saved = is_validated or (between and self.step % between == 0)
                if is_recorded or is_saved or self.device.type == "cpu":  # a card is not waited for
                    self._look_at_losses()
                if is_recorded:
                    rate = float(self.optimiser.param_groups[0]["lr"])
                    self._record(learning_rate=rate, loss=float(np.mean(self.losses)))
                    progress.update(task, loss=f"loss {np.mean(self.losses):.3f}")
                    self.losses = []
                if is_validated:
                    self._validate()
                    if self.best_score is not None:
                        progress.update(task, score=f"best mMP@5 {self.best_score:.1%}")
                if is_saved:
                    self._save()
                progress.advance(task, len(rows))

    def _epoch(self, epoch: int) -> list[Int[np.ndarray, " b"]]:
        config = self.config
        return epoch_batches(
            self.data.classes,
            self.data.domains,
            batch_size=self.batch_size,
            seed=self.sampling_seed,
            epoch=epoch,
            kind=config.sampling,
            temperature=config.sampling_temperature,
        )

    def _epochs_left(self) -> Iterator[tuple[list[Int[np.ndarray, " b"]], int]]:
        """The batches of every epoch that is left, and how many of them are done."""
        per_epoch = self.steps_per_epoch
        first, position = divmod(self.step, per_epoch)
        for epoch in range(first, -(-self.schedule.num_steps // per_epoch)):
            yield self._epoch(epoch)[:per_epoch], position if epoch == first else 0

    def _train_step(self, rows: Int[np.ndarray, " b"], inputs: Tensor) -> Tensor:
        """Take a step; returns its loss, which may still be under way on a card."""
        labels = None
        if self.on_device is None:
            labels = torch.from_numpy(self.data.classes[own_part(rows)]).to(self.device)
        rate = self.schedule.rate(self.step)
        for group in self.optimiser.param_groups:
            own = rate * group.get("share", 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(own)
            else:
                group["lr"] = own
        take = self._full_step if len(rows) == self.batch_size else self._step
        return take(inputs.to(self.device), labels, self._dropout(len(rows)), len(inputs) / len(rows))

    def _step(
        self, inputs: Tensor, labels: Tensor | None, dropout: Tensor | None, share: float
    ) -> Float[Tensor, ""]:
        """What a card does in one go: on it, nothing here waits for a number."""
        if self.on_device is not None:
            inputs, labels = self.on_device.gathered(inputs)
        assert labels is not None

        self.optimiser.zero_grad()
        in_bfloat16 = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bfloat16):
            features = inputs if self.backbone is None else self.backbone(inputs)
            embeddings = self.head(features, dropout)
            if self.fused_step is None:
                loss = self.margin_head(embeddings, labels) * share
        if self.fused_step is None:
            loss.backward()
        else:
            loss, gradient = self.fused_step.loss_and_embedding_gradient(embeddings, labels, share=share)
            embeddings.backward(gradient.to(embeddings.dtype))
        loss = sum_gradients(loss, self.optimiser)
        if self.config.gradient_clip:
            parameters = [each for group in self.optimiser.param_groups for each in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
        self.optimiser.step()
        return loss

    def _look_at_losses(self) -> None:
        """Wait for the losses since the last record, and refuse one that is not finite."""
        losses = torch.stack(self._under_way).tolist() if self._under_way else []
        for step, loss in enumerate(losses, start=self.step - len(losses)):
            if not np.isfinite(loss):
                raise InputError(
                    f"the loss is {loss} at step {step} of {self.title}",
                    expected="a finite loss; the last checkpoint is kept",
                    next_step=self.advice,
                )
            self.losses.append(loss)
        self._under_way.clear()

    def _dropout(self, num_global: int) -> Float[Tensor, "b w"] | None:
        """Factors for this process's part of a batch, from seed and step alone, whatever was resumed."""
        if self.config.dropout == 0:
            return None
        keep = float(np.float32(1 - self.config.dropout))
        shape, seed = (num_global, self.head.width), [*self.dropout_seed, self.step]
        if self.device.type == "cuda":  # drawn there: on the host it takes longer than the step
            generator = generator_for_step(*seed, device=self.device)
            numbers = torch.rand(shape, generator=generator, device=self.device)
        else:
            numbers = torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))
        return own_part(numbers < keep) / keep

    def _record(self, **values: float) -> None:
        steps, epochs = self.records_from
        epoch = round(epochs + self.step / self.steps_per_epoch, 4)
        self.records.append({"step": steps + self.step, "epoch": epoch, **values})

    # ---- validation, checkpoints and the end

    def _validate(self) -> None:
        if len(self.data.val_rows) == 0:
            return
        score, recall = validation_scores(self._validation_embeddings(), self.data.val_catalog)
        if np.isnan(score):
            return
        self._record(**{"val/mmp@5": score, "val/r@1": recall})
        if self.best_score is None or score > self.best_score:
            self.best_score, self.validations_without_gain = score, 0
            self.best = self.learned()
        else:
            self.validations_without_gain += 1
            self.stopped_early = 0 < self.patience <= self.validations_without_gain

    def _parts(self) -> dict[str, Any]:
        """What a checkpoint keeps the state of."""
        parts = {"head": self.head, "margin_head": self.margin_head, "optimiser": self.optimiser}
        return parts if self.unfrozen is None else {**parts, "backbone": self.unfrozen}

    def _save(self) -> None:
        if not is_first():
            return
        state = {
            "version": _CHECKPOINT_VERSION,
            **{name: part.state_dict() for name, part in self._parts().items()},
            **{name: getattr(self, name) for name in _COUNTERS},
        }
        # by way of memory: torch's own writer turns a full disk into an error without a number
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_sealed(self.folder / "checkpoints" / self.checkpoint_name, buffer.getbuffer())
        write_records(self.folder, self.records)
        self.num_logged = write_tensorboard(self.folder, self.records, self.num_logged)

    def _resume(self) -> None:
        path = self.folder / "checkpoints" / self.checkpoint_name
        if not path.exists():
            return
        state = torch.load(io.BytesIO(read_sealed(path)), map_location=self.device, weights_only=True)
        if state.get("version") != _CHECKPOINT_VERSION:
            raise ArtefactError(
                f"{path} was written by another version of the program",
                expected="a checkpoint of this version, to go on from it",
                next_step="finish the run with that version, or start it over with --no-resume",
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.num_logged = len(self.records)

    def finish(self, head: Head, made_from: dict[str, Any], **content: Json) -> None:
        """Write the head that the run is for, the records, the plots and, last, the manifest."""
        write_tensors(self.folder / "head.safetensors", head.state_dict())
        write_records(self.folder, self.records)
        write_plots(self.folder, self.records)
        whole = {
            # relative, so that a project folder can be moved as a whole
            "features": os.path.relpath(self.features.folder.resolve(), self.folder.resolve()),
            "backbone": self.features.backbone["name"],
            "num_backbone_parameters": self.features.manifest.content.get("num_backbone_parameters"),
            "width": head.width,
            "head": dataclasses.asdict(head.config),
            "num_classes": len(self.data.class_counts),
            "num_images": len(self.data.rows),
            "num_steps": self.records_from[0] + self.step,
            "num_head_parameters": sum(parameter.numel() for parameter in head.parameters()),
            "num_class_parameters": sum(each.numel() for each in self.margin_head.parameters()),
            "best_score": self.best_score,
            "notes": list(self.data.notes),
            **checksums_of(self.folder),
        }
        manifest = Manifest(
            kind=KIND, format_version=FORMAT_VERSION, made_from=made_from, content={**whole, **content}
        )
        write_manifest(self.folder, manifest)
