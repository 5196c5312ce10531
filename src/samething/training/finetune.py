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
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

import samething.features
from samething.backbones import Backbone, load_from_metadata
from samething.errors import FingerprintError, InputError
from samething.features import FeatureSet
from samething.files import (
    Manifest,
    atomic_path,
    claim_folder,
    disk_errors,
    is_finished,
    only_one_writer,
    require_same,
    write_manifest,
)
from samething.heads import Head
from samething.images import prepared
from samething.losses import MarginHead
from samething.progress import progress_bar
from samething.sampling import SamplingConfig, epoch_batches
from samething.training.config import TrainConfig
from samething.training.data import TrainingData
from samething.training.finetune_config import FinetuneConfig
from samething.training.loop import CONFIG_NAME, Trainer, run_training
from samething.training.run import FORMAT_VERSION, KIND, Run, write_head, write_plots, write_records
from samething.training.schedule import learning_rate
from samething.training.unfreezing import unfreeze
from samething.training.validation import validation_scores

BACKBONE_NAME: Final = "backbone.safetensors"
START_NAME: Final = "head-start.safetensors"
HEAD_FIRST: Final = "head-first"
_CHECKPOINT: Final = "finetune.pt"
_WARMUP_SHARE: Final = 0.05
"""Share of the steps in which the learning rate grows."""
_RECORDS_AN_EPOCH: Final = 20


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
    # one backbone is tuned under one head, whatever the recipe joins
    config = dataclasses.replace(config, members=1)
    made_from = {
        "config": config.to_json(),
        "finetune": tune.to_json(),
        "features": features.manifest.fingerprint,
    }
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "--unfreeze on several processes",
            expected="one process",
            next_step="run it without torchrun",
        )
    data = TrainingData.of(features)
    with only_one_writer(folder), disk_errors(folder):
        if not resume and (folder / CONFIG_NAME).exists():
            _start_over(folder)
        claim_folder(
            folder,
            CONFIG_NAME,
            made_from,
            kind=KIND,
            next_step="choose another folder with -o, or start this one over with --no-resume",
        )
        if is_finished(folder):
            return Run.open(folder)
        features.catalog.require_files()
        backbone = load_from_metadata(features.backbone, weights=weights)
        require_same(
            dict(features.backbone),
            backbone.metadata(),
            what="the backbone as it loads now is not the one the features were made with",
            next_step="give the checkpoint with --weights, or compute the features again",
        )
        run_training(features, config, folder / HEAD_FIRST, resume=True)
        tuner = Finetuner(features, data, config, tune, backbone, folder)
        tuner.run()
        _finish(folder, tuner, made_from)
    return dataclasses.replace(Run.open(folder), was_finished=False)


def _start_over(folder: Path) -> None:
    for name in ("manifest.json", "metrics.jsonl", "head.safetensors", BACKBONE_NAME, START_NAME):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "plots", "tensorboard", "features", HEAD_FIRST):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "catalog.parquet").unlink(missing_ok=True)
    (folder / CONFIG_NAME).unlink()  # goes last: until then the folder is known to be a run's


class Finetuner:
    """The second stage in the making: what learns, and where it stands."""

    def __init__(
        self,
        features: FeatureSet,
        data: TrainingData,
        config: TrainConfig,
        tune: FinetuneConfig,
        backbone: Backbone,
        folder: Path,
    ) -> None:
        self.features, self.data, self.config, self.tune = features, data, config, tune
        self.backbone, self.folder = backbone, folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.first = Trainer(features, data, config, folder / HEAD_FIRST)
        self.first.run()  # was finished: it only loads where it stood
        self.head = self.first.current_head().to(self.device).eval()
        self.start = {name: value.detach().cpu().clone() for name, value in self.head.state_dict().items()}
        self.margin_head = self._classes().to(self.device).train()
        self.unfrozen = unfreeze(backbone.network, tune, seed=config.seed + 2)
        backbone.network = self.unfrozen.network
        backbone.to(self.device)
        self.steps_per_epoch = max(1, len(self._epoch(0)))
        self.num_steps = max(1, round(tune.tune_epochs * self.steps_per_epoch))
        self.optimiser = self._build_optimiser()
        self.step = 0
        self.records = list(self.first.records)
        self.best_score: float | None = None
        self.best: dict[str, dict[str, Tensor]] = {}

    def _classes(self) -> MarginHead:
        """The class weights of the first stage.

        Where principal components shortened the head, the classes begin at the mean embeddings of their
        images: those that were learned have the longer form.
        """
        trained = self.first.margin_head
        if self.head.embedding_dim == trained.weight.shape[1]:
            return trained
        short = dataclasses.replace(self.config, train_dim=0)
        margin_head = Trainer(self.features, self.data, short, self.folder / HEAD_FIRST).margin_head
        embeddings = self.head.embed(self.features.rows[self.data.rows])
        means = np.zeros((len(self.data.class_counts), embeddings.shape[1]))
        np.add.at(means, self.data.classes, embeddings)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        centres = np.repeat(means, self.config.num_centers, axis=0)
        # sub-centres that are all alike would share every gradient
        spread = np.random.default_rng(self.config.seed).normal(size=centres.shape) * 1e-3
        with torch.no_grad():
            margin_head.weight.copy_(torch.from_numpy(centres + spread))
        return margin_head

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

    # ---- the loop

    def run(self) -> None:
        """Tune from the last checkpoint, or from the trained head, to the end."""
        self._resume()
        stride = max(1, round(self.tune.tune_validate_every * self.steps_per_epoch))
        losses: list[float] = []
        if self.step == 0:
            self._validate()
        with progress_bar("steps", "{task.fields[score]}") as progress:
            task = progress.add_task("fine-tune", total=self.num_steps, completed=self.step, score="")
            for labels, pixels in self._batches():
                losses.append(self._train_step(labels, pixels))
                self.step += 1
                if self.step % max(1, self.steps_per_epoch // _RECORDS_AN_EPOCH) == 0:
                    self._record(loss=float(np.mean(losses)), learning_rate=self._rate())
                    losses = []
                if self.step % stride == 0 or self.step == self.num_steps:
                    self._validate()
                    self._save()
                    if self.best_score is not None:
                        progress.update(task, score=f"best mMP@5 {self.best_score:.1%}")
                progress.advance(task)

    def _epoch(self, epoch: int) -> list[Int[np.ndarray, " b"]]:
        return epoch_batches(
            self.data.classes,
            self.data.domains,
            batch_size=self.tune.tune_batch_size,
            seed=self.config.seed + 3,
            epoch=epoch,
            config=SamplingConfig(kind=self.config.sampling, temperature=self.config.sampling_temperature),
        )

    def _batches(self) -> Iterator[tuple[Int[np.ndarray, " b"], UInt8[np.ndarray, "b 3 height width"]]]:
        """Classes and pixels of the steps that are left; the next batch is decoded while one is in use."""
        rows_of_steps = [
            rows
            for epoch in range(self.step // self.steps_per_epoch, -(-self.num_steps // self.steps_per_epoch))
            for rows in self._epoch(epoch)[: self.steps_per_epoch]
        ]
        first = self.step // self.steps_per_epoch * self.steps_per_epoch
        wanted = rows_of_steps[self.step - first : self.num_steps - first]
        pixels = self._pixels(row for rows in wanted for row in self.data.rows[rows].tolist())
        for rows in wanted:
            yield self.data.classes[rows], np.stack(list(islice(pixels, len(rows))))

    def _pixels(self, rows: Iterable[int]) -> Iterator[UInt8[np.ndarray, "3 height width"]]:
        """Prepared images of catalog rows; a batch of them is decoded ahead."""
        sources = self.features.catalog.sources
        exact = dataclasses.replace(self.backbone.preprocessing, decoding="exact")
        return prepared((sources[row] for row in rows), exact, ahead=self.tune.tune_batch_size)

    def _rate(self) -> float:
        course = dataclasses.replace(
            self.config,
            learning_rate=self.tune.tune_learning_rate,
            final_learning_rate=0.0,
            schedule="cosine",
            warmup_shape="linear",
        )
        warmup = round(_WARMUP_SHARE * self.num_steps)
        return learning_rate(course, self.step, num_steps=self.num_steps, warmup_steps=warmup)

    def _train_step(
        self, labels: Int[np.ndarray, " b"], pixels: UInt8[np.ndarray, "b 3 height width"]
    ) -> float:
        rate = self._rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        self.margin_head.set_progress(1.0)  # the margin has grown in the first stage
        self.optimiser.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            features = self.backbone(torch.from_numpy(pixels).to(self.device))
            embeddings = self.head(self._dropped_out(features))
            loss: Tensor = self.margin_head(embeddings, torch.from_numpy(labels).to(self.device))
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        if not np.isfinite(value):
            raise InputError(
                f"the loss is {value} at step {self.step} of fine-tuning",
                expected="a finite loss; the last checkpoint is kept",
                next_step=f"lower --tune-learning-rate (now {self.tune.tune_learning_rate})",
            )
        if self.config.gradient_clip:
            learning = [p for group in self.optimiser.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(learning, self.config.gradient_clip)
        self.optimiser.step()
        return value

    def _dropped_out(self, features: Float[Tensor, "b w"]) -> Float[Tensor, "b w"]:
        """Dropout whose mask depends on seed and step alone, whatever was resumed."""
        if self.config.dropout == 0:
            return features
        keep = np.float32(1 - self.config.dropout)
        rng = np.random.default_rng([self.config.seed, 1, self.step])
        mask = torch.from_numpy(rng.random(tuple(features.shape), dtype=np.float32) < keep)
        return features * mask.to(features.device) / float(keep)

    def _record(self, **values: float) -> None:
        epoch = round(self.first.num_steps / self.first.steps_per_epoch + self.step / self.steps_per_epoch, 4)
        self.records.append({"step": self.first.step + self.step, "epoch": epoch, **values})

    # ---- validation and checkpoints

    def _describe(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n w"]:
        result = np.empty((len(rows), self.backbone.width), np.float32)
        pixels = self._pixels(rows.tolist())
        with torch.inference_mode():
            for start in range(0, len(rows), 32):
                part = np.stack(list(islice(pixels, 32)))
                features = self.backbone(torch.from_numpy(part).to(self.device))
                result[start : start + len(part)] = features.cpu().numpy()
        return result

    def _validate(self) -> None:
        if len(self.data.val_rows) == 0:
            return
        embeddings = self.head.embed(self._describe(self.data.val_rows))
        score, recall = validation_scores(embeddings, self.data.val_catalog)
        if np.isnan(score):
            return
        self._record(**{"val/mmp@5": score, "val/r@1": recall})
        if self.best_score is None or score > self.best_score:
            self.best_score = score
            self.best = {"backbone": self.unfrozen.learned(), "head": self._head_state()}

    def _head_state(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.head.state_dict().items()}

    def _save(self) -> None:
        state = {
            "step": self.step,
            "backbone": self.unfrozen.learned(),
            "head": self.head.state_dict(),
            "margin_head": self.margin_head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "records": self.records,
            "best_score": self.best_score,
            "best": self.best,
        }
        with atomic_path(self.folder / "checkpoints" / _CHECKPOINT) as partial:
            buffer = io.BytesIO()  # torch's own writer turns a full disk into an error without a number
            torch.save(state, buffer)
            partial.write_bytes(buffer.getbuffer())
        write_records(self.folder, self.records)

    def _resume(self) -> None:
        path = self.folder / "checkpoints" / _CHECKPOINT
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.unfrozen.load(state["backbone"])
        self.head.load_state_dict(state["head"])
        self.margin_head.load_state_dict(state["margin_head"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name in ("step", "records", "best_score", "best"):
            setattr(self, name, state[name])

    def result(self) -> tuple[Backbone, Head]:
        """Backbone and head that the run is for: of the best validation, or the last; on the CPU."""
        if self.config.keep == "best" and self.best:
            self.unfrozen.load(self.best["backbone"])
            self.head.load_state_dict(self.best["head"])
        self.backbone.network = self.unfrozen.merged()
        return self.backbone.cpu().eval(), self.head.cpu().eval()


def _finish(folder: Path, tuner: Finetuner, made_from: dict[str, Any]) -> None:
    """Write weights, extract the features of every image with the tuned backbone, and finish the run."""
    num_trained = sum(p.numel() for group in tuner.unfrozen.groups for p in group[1])
    backbone, head = tuner.result()
    state = {name: value.contiguous() for name, value in backbone.network.state_dict().items()}
    with atomic_path(folder / BACKBONE_NAME) as partial:
        partial.write_bytes(safetensors.torch.save(state))
    with atomic_path(folder / START_NAME) as partial:
        partial.write_bytes(safetensors.torch.save({k: v.contiguous() for k, v in tuner.start.items()}))
    write_head(folder / "head.safetensors", head)
    write_records(folder, tuner.records)
    write_plots(folder, tuner.records)
    before = tuner.features
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
    first = Run.open(folder / HEAD_FIRST).manifest.content
    content = {
        **first,
        "features": "features",
        "features_fingerprint": extracted.manifest.fingerprint,
        "width": head.width,
        "head": dataclasses.asdict(head.config),
        "num_steps": first["num_steps"] + tuner.step,
        "num_head_parameters": sum(parameter.numel() for parameter in head.parameters()),
        "num_class_parameters": sum(p.numel() for p in tuner.margin_head.parameters()),
        "num_tuned_parameters": num_trained,
        "finetune": tuner.tune.to_json(),
        "best_score": tuner.best_score,
        "head_first_score": first["best_score"],
        "notes": [
            *first["notes"],
            f"{num_trained:,} parameters of the backbone were tuned ({tuner.tune.stage})",
        ],
    }
    write_manifest(
        folder, Manifest(kind=KIND, format_version=FORMAT_VERSION, made_from=made_from, content=content)
    )
