"""Training a head on cached features."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samething.arrays import Float, Int
from samething.features import FeatureSet
from samething.features.row_reader import RowReader
from samething.files import Json
from samething.heads import Head, whitened_head
from samething.losses import LOSSES, MarginHead, build_margin
from samething.losses.fused_step import FusedMarginStep
from samething.losses.processes import is_first, num_processes, own_part
from samething.training.config import TrainConfig
from samething.training.data import TrainingData
from samething.training.on_card import Recorded, RowsOnDevice
from samething.training.optimisers import Schedule, build_optimiser
from samething.training.run import Run, write_tensors
from samething.training.starts import reduction_score, start_classes, starting_head
from samething.training.trainer import Trainer, claimed, copied_state
from samething.training.validation import kept_embeddings


def run_training(features: FeatureSet, config: TrainConfig, folder: Path, *, resume: bool) -> Run:
    """Train into a run folder; see :func:`samething.training.train`."""
    made_from = {"config": config.to_json(), "features": features.manifest.fingerprint}
    data = TrainingData.of(features)
    with claimed(folder, made_from, resume=resume) as finished:
        if finished:
            return Run.open(folder)
        trainer = HeadTrainer(features, data, config, folder)
        trainer.run()
        if is_first():
            trainer.finish(trainer.result(), made_from, **trainer.found_out())
    return dataclasses.replace(Run.open(folder), was_finished=False)


class HeadTrainer(Trainer):
    """A head and its class weights in the making."""

    title = "train"
    checkpoint_name = "last.pt"

    def __init__(self, features: FeatureSet, data: TrainingData, config: TrainConfig, folder: Path) -> None:
        super().__init__(features, data, config, folder)
        self.batch_size, self.sampling_seed = config.batch_size, config.seed
        self.dropout_seed = (config.seed,)
        self.validate_every, self.patience = config.validate_every, config.patience
        self.advice = f"lower --learning-rate (now {config.learning_rate}) or set gradient_clip"
        self.reader = RowReader(features.rows)
        per_epoch = self.steps_per_epoch
        self.schedule = Schedule(
            highest=config.learning_rate,
            final=config.final_learning_rate,
            course=config.schedule,
            num_steps=config.iterations or max(config.start == "random", round(config.epochs * per_epoch)),
            warmup_steps=round(config.warmup * (per_epoch if config.warmup_unit == "epochs" else 1)),
        )
        self.head, self.found = starting_head(features, data, config)
        self.margin_head = self._build_margin_head()
        if config.start == "lda":
            start_classes(self.margin_head, self.head, features, data)
        self.head.to(self.device).train()
        self.margin_head.to(self.device).train()
        # what a card would be waited for shows in the loss
        self.margin_head.checks = self.device.type == "cpu"
        if num_processes() == 1 and self.device.type == "cuda":
            self._full_step = Recorded(self._step)
        self.optimiser = build_optimiser(config, [*self.head.parameters(), *self.margin_head.parameters()])
        if FusedMarginStep.covers(self.margin_head):
            # gradients that are summed or clipped first must be there whole
            in_one_go = num_processes() == 1 and not config.gradient_clip
            optimiser = self.optimiser if in_one_go else None
            self.fused_step = FusedMarginStep(self.margin_head, optimiser, precision=config.precision)

    def _build_margin_head(self) -> MarginHead:
        config, dim = self.config, self.head.embedding_dim
        counts = self.data.class_counts.tolist()
        options: dict[str, Any] = dict(config.loss_options)
        if config.scale is not None:
            options["scale"] = config.scale
        if config.margin is not None:  # under the name that the loss has for it
            accepted = inspect.signature(LOSSES[config.loss]).parameters if config.loss in LOSSES else {}
            names = [name for name in ("margin_radians", "margin_max_radians") if name in accepted]
            options[names[0] if names else "margin"] = config.margin
        margin = build_margin(config.loss, num_classes=len(counts), class_counts=counts, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            return MarginHead(
                dim,
                len(counts),
                margin,
                num_centers=config.num_centers,
                class_fraction=config.class_sample_ratio,
                prefixes=(*config.matryoshka_dims, dim) if config.matryoshka_dims else (),
                seed=config.seed,
            )

    def _batches(self) -> Generator[tuple[Int[np.ndarray, " b"], Tensor], None, None]:
        self.on_device = self.on_device or RowsOnDevice.if_they_fit(self.features, self.data, self.device)
        if self.on_device is not None:
            for batches, position in self._epochs_left():
                mine = [own_part(batch) for batch in batches[position:]]
                places = torch.from_numpy(np.concatenate(mine)).to(self.device)
                parts = torch.split(places, [len(part) for part in mine])
                yield from zip(batches[position:], parts, strict=True)
            return
        with contextlib.closing(self.reader):
            for batches, position in self._epochs_left():
                if self.config.sampling == "block-shuffled":  # a plan does not help random access
                    num_seen = sum(len(batch) for batch in batches[:position])
                    self.reader.plan(self.data.rows[np.concatenate(batches)], start=num_seen)
                for batch in batches[position:]:
                    rows = self.reader.rows(self.data.rows[own_part(batch)])
                    yield batch, torch.from_numpy(np.asarray(rows, np.float32))

    def current_head(self) -> Head:
        """The head as it would be used: whitened, if that is asked for."""
        head, power = self.head, self.config.whiten
        return whitened_head(head, self.features.rows, power, rows=self.data.rows) if power else head

    def _validation_embeddings(self) -> Float[np.ndarray, "v d"]:
        head, rows = self.current_head(), self.features.rows
        return kept_embeddings(head, rows, self.data.val_rows, self.data.rows, self.config.codes)

    def learned(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the head's weights."""
        return {"head": copied_state(self.current_head())}

    def result(self) -> Head:
        """The head that the run is for: of the best validation, or the last; on the CPU."""
        head = self.current_head()
        if self.config.keep == "best" and self.best:
            head.load_state_dict(self.best["head"])
        return head.cpu().eval()

    def found_out(self) -> dict[str, Json]:
        """What was found out of the start, and whether the backbone's own reduction would be better."""
        found = dict(self.found)
        if self.config.start == "lda" and self.best_score is not None:
            plain = reduction_score(self.features, self.data, self.config, self.head.embedding_dim)
            if self.best_score < plain:
                worse = (
                    f"the backbone's own principal components are better on validation: mMP@5 {plain:.1%} "
                    f"against {self.best_score:.1%}, in as many bytes; label more instances"
                )
                found["notes"] = [*self.data.notes, worse]
        return found

    def _save(self) -> None:
        super()._save()
        if self.config.keep_checkpoints and is_first():
            name = f"head-{self.step:09d}.safetensors"
            write_tensors(self.folder / "checkpoints" / name, self.current_head().state_dict())
