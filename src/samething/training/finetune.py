"""Fine-tuning: the head first on cached features, then head and backbone on images.

A fine-tuned run is a run folder like any other, with these beside it::

    runs/NAME/
      head-first/              the run of the head alone
      checkpoints/finetune.pt  everything needed to go on
      backbone.safetensors     the tuned backbone, in timm's layout
      head-start.safetensors   the head that fine-tuning began with
      catalog.parquet          the images
      features/                their features by the tuned backbone: what evaluate and export read
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

import samething.features
from samething.arrays import Float, Int, UInt8
from samething.backbones import Backbone, load_from_metadata, load_the_same
from samething.errors import FingerprintError, InputError
from samething.features import FeatureSet
from samething.heads import Head, whitened_head
from samething.images import prepared
from samething.training.config import FinetuneConfig, TrainConfig
from samething.training.data import TrainingData
from samething.training.loop import HeadTrainer, run_training
from samething.training.optimisers import Schedule
from samething.training.run import BACKBONE_NAME, START_NAME, Run, write_tensors
from samething.training.trainer import Trainer, claimed, copied_state
from samething.training.unfreezing import Unfrozen, unfreeze

HEAD_FIRST: Final = "head-first"
_WARMUP_SHARE: Final = 0.05
"""Share of the steps in which the learning rate grows."""


def run_finetuning(
    features: FeatureSet,
    config: TrainConfig,
    tune: FinetuneConfig,
    folder: Path,
    *,
    resume: bool,
    weights: Path | None,
) -> Run:
    """Train the head, then the backbone with it, into a run folder; see :func:`samething.training.train`."""
    made_from = {
        "config": config.to_json(),
        "finetune": dataclasses.asdict(tune),
        "features": features.manifest.fingerprint,
    }
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--unfreeze on several processes",
            expected="one process",
            next_step="run it without torchrun",
        )
    data = TrainingData.of(features)
    with claimed(folder, made_from, resume=resume) as finished:
        if finished:
            return Run.open(folder)
        features.catalog.require_files()
        backbone = load_the_same(features.backbone, weights=weights)
        run_training(features, config, folder / HEAD_FIRST, resume=True)
        tuner = Finetuner(features, data, config, tune, backbone, folder)
        tuner.run()
        _finish(tuner, made_from)
    return dataclasses.replace(Run.open(folder), was_finished=False)


class Finetuner(Trainer):
    """The second stage in the making: backbone, head and class weights."""

    title = "fine-tune"
    checkpoint_name = "finetune.pt"
    backbone: Backbone
    unfrozen: Unfrozen

    def __init__(
        self,
        features: FeatureSet,
        data: TrainingData,
        config: TrainConfig,
        tune: FinetuneConfig,
        backbone: Backbone,
        folder: Path,
    ) -> None:
        super().__init__(features, data, config, folder)
        self.tune, self.backbone = tune, backbone
        self.batch_size, self.sampling_seed = tune.tune_batch_size, config.seed + 3
        self.dropout_seed = (config.seed, 1)
        self.validate_every = tune.tune_validate_every
        self.advice = f"lower --tune-learning-rate (now {tune.tune_learning_rate})"
        first = HeadTrainer(features, data, config, folder / HEAD_FIRST)
        first.run()  # was finished: it only loads where it stood
        self.records_from = (first.step, first.schedule.num_steps / first.steps_per_epoch)
        self.start = first.learned()["head"]
        self.head = first.head.to(self.device).eval()
        self.margin_head = first.margin_head
        self.unfrozen = unfreeze(backbone.network, tune, seed=config.seed + 2)
        backbone.network = self.unfrozen.network
        backbone.to(self.device)
        num_steps = max(1, round(tune.tune_epochs * self.steps_per_epoch))
        self.schedule = Schedule(
            highest=tune.tune_learning_rate,
            final=0.0,
            course="cosine",
            num_steps=num_steps,
            warmup_steps=round(_WARMUP_SHARE * num_steps),
        )
        self.optimiser = self._build_optimiser()
        self.records = list(first.records)

    def _build_optimiser(self) -> torch.optim.Optimizer:
        locked = self.tune.stage == "locked-head"
        own = [*self.head.parameters(), *self.margin_head.parameters()]
        for parameter in own:
            parameter.requires_grad_(not locked)
        groups: list[dict[str, Any]] = [] if locked else [{"params": own, "share": 1.0}]
        groups += [
            {"params": parameters, "share": self.tune.backbone_rate * share}
            for share, parameters in self.unfrozen.groups
        ]
        return torch.optim.AdamW(
            groups, lr=self.tune.tune_learning_rate, weight_decay=self.config.weight_decay
        )

    def run(self) -> None:
        """Tune from the last checkpoint, or from the trained head, to the end."""
        self._resume()
        if self.step == 0:
            self._validate()
        super().run()

    def _batches(self) -> Generator[tuple[Int[np.ndarray, " b"], Tensor], None, None]:
        wanted = [rows for batches, position in self._epochs_left() for rows in batches[position:]]
        wanted = wanted[: self.schedule.num_steps - self.step]
        pixels = self._pixels(
            np.concatenate([self.data.rows[:0], *(self.data.rows[rows] for rows in wanted)])
        )
        for rows in wanted:
            yield rows, torch.from_numpy(np.stack(list(islice(pixels, len(rows)))))

    def _pixels(self, rows: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "3 height width"]]:
        """Prepared images of catalog rows; a batch of them is decoded ahead."""
        sources = self.features.catalog.sources
        exact = dataclasses.replace(self.backbone.preprocessing, decoding="exact")
        return prepared((sources[row] for row in rows.tolist()), exact, ahead=self.batch_size)

    def _validation_embeddings(self) -> Float[np.ndarray, "v d"]:
        rows = self.data.val_rows
        features = np.empty((len(rows), self.backbone.width), np.float32)
        pixels = self._pixels(rows)
        with torch.inference_mode():
            for start in range(0, len(rows), 32):
                part = np.stack(list(islice(pixels, 32)))
                found = self.backbone(torch.from_numpy(part).to(self.device))
                features[start : start + len(part)] = found.cpu().numpy()
        return self.head.embed(features)

    def learned(self) -> dict[str, dict[str, Tensor]]:
        """Copies of what learns of the backbone, and of the head's weights."""
        return {"backbone": self.unfrozen.state_dict(), "head": copied_state(self.head)}

    def result(self) -> tuple[Backbone, Head]:
        """Backbone and head that the run is for: of the best validation, or the last; on the CPU."""
        if self.config.keep == "best" and self.best:
            self.unfrozen.load_state_dict(self.best["backbone"])
            self.head.load_state_dict(self.best["head"])
        self.backbone.network = self.unfrozen.merged()
        return self.backbone.cpu().eval(), self.head.cpu().eval()


def _finish(tuner: Finetuner, made_from: dict[str, Any]) -> None:
    """Write weights, extract the features of every image by the tuned backbone, and finish the run."""
    folder, before = tuner.folder, tuner.features
    num_trained = sum(p.numel() for group in tuner.unfrozen.groups for p in group[1])
    backbone, head = tuner.result()
    write_tensors(folder / BACKBONE_NAME, backbone.network.state_dict())
    write_tensors(folder / START_NAME, tuner.start)
    before.catalog.write(folder / "catalog.parquet")
    extracted = samething.features.features(
        folder / "catalog.parquet",
        backbone=load_from_metadata(before.backbone, weights=folder / BACKBONE_NAME),
        decoding=before.preprocessing.decoding,
        output=folder / "features",
    )
    assert isinstance(extracted, FeatureSet)
    if extracted.backbone["weights"] != backbone.metadata()["weights"]:
        raise FingerprintError(
            f"{folder / 'features'} was made with other weights than those that were tuned",
            expected=f"the weights {backbone.metadata()['weights']}",
            next_step="start the run over with --no-resume",
        )
    if tuner.config.whiten:
        head = whitened_head(head, extracted.rows, tuner.config.whiten, rows=tuner.data.rows)
    tuner.finish(
        head,
        made_from,
        features="features",
        features_fingerprint=extracted.manifest.fingerprint,
        num_tuned_parameters=num_trained,
        finetune=dataclasses.asdict(tuner.tune),
        head_first_score=Run.open(folder / HEAD_FIRST).best_score,
        notes=[
            *tuner.data.notes,
            f"{num_trained:,} parameters of the backbone were tuned ({tuner.tune.stage})",
        ],
    )
