"""The training loop, from top to bottom."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import os
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from samething.errors import InputError
from samething.features import FeatureSet
from samething.features.row_reader import RowReader
from samething.files import (
    Manifest,
    atomic_path,
    claim_folder,
    disk_errors,
    is_finished,
    only_one_writer,
    read_json,
    write_manifest,
)
from samething.heads import Head, HeadConfig, build_head, reduced_head
from samething.losses import LOSSES, MarginHead, build_margin
from samething.losses.fused_step import FusedMarginStep
from samething.progress import progress_bar
from samething.sampling import SamplingConfig, epoch_batches
from samething.training import distributed
from samething.training.config import TrainConfig
from samething.training.data import TrainingData
from samething.training.members import Trained, joined, member_configs
from samething.training.optimisers import build_optimiser, take_step
from samething.training.run import (
    FORMAT_VERSION,
    KIND,
    Run,
    write_head,
    write_plots,
    write_records,
    write_tensorboard,
)
from samething.training.schedule import checkpoint_steps, learning_rate, warmup_steps
from samething.training.validation import validation_scores

CONFIG_NAME: Final = "config.json"
RECORDS_AN_EPOCH: Final = 20


def run_training(features: FeatureSet, config: TrainConfig, folder: Path, *, resume: bool) -> Run:
    """Train into a run folder; see :func:`samething.training.train`."""
    made_from = {"config": config.to_json(), "features": features.manifest.fingerprint}
    if config.distill and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"--distill {config.distill} on several processes",
            expected="one process: similarities are taken within the whole batch",
            next_step="run it without torchrun, or with --distill 0",
        )
    data = TrainingData.of(features)
    with distributed.processes(), distributed.writer(only_one_writer(folder)), disk_errors(folder):
        if distributed.is_first():
            _claim(folder, made_from, resume=resume)
        distributed.wait_for_all()
        if is_finished(folder):
            return Run.open(folder)
        if config.members > 1:
            runs = [
                run_training(features, member, folder / "members" / str(number), resume=True)
                for number, member in enumerate(member_configs(config))
            ]
            trained = joined(runs, config, features, data)
        else:
            trainer = Trainer(features, data, config, folder)
            trainer.run()
            trained = trainer.trained()
        if distributed.is_first():
            _finish(folder, features, data, trained, made_from)
        distributed.wait_for_all()
    return dataclasses.replace(Run.open(folder), was_finished=False)


def _claim(folder: Path, made_from: dict[str, Any], *, resume: bool) -> None:
    if not resume and (folder / CONFIG_NAME).exists():
        # the configuration goes last: until then the folder is known to be a run's
        for name in ("manifest.json", "metrics.jsonl", "head.safetensors"):
            (folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "plots", "tensorboard", "members"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / CONFIG_NAME).unlink()
    claim_folder(
        folder,
        CONFIG_NAME,
        _as_recorded(folder, made_from),
        kind=KIND,
        next_step="choose another folder with -o, or start this one over with --no-resume",
    )


def _as_recorded(folder: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """What the run is made from, but for options that are newer than its folder and at their defaults."""
    record = folder / CONFIG_NAME
    if not record.exists():
        return made_from
    recorded, defaults = read_json(record).get("config", {}), TrainConfig().to_json()
    config = {
        name: value
        for name, value in made_from["config"].items()
        if name in recorded or value != defaults[name]
    }
    return {**made_from, "config": config}


class Trainer:
    """A run in the making: what is learned, and where it stands."""

    def __init__(self, features: FeatureSet, data: TrainingData, config: TrainConfig, folder: Path) -> None:
        self.features, self.data, self.config, self.folder = features, data, config, folder
        self.reader = RowReader(features)
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        self.steps_per_epoch = max(1, len(self._epoch(0)))
        self.num_steps = config.iterations or max(1, round(config.epochs * self.steps_per_epoch))
        head_config = HeadConfig(
            kind=config.head,
            embedding_dim=config.train_dim or config.embedding_dim,
            bias=config.bias,
            standardise=config.standardise,
            initialise=config.initialise,
            hidden_dim=config.hidden_dim,
        )
        self.head = build_head(head_config, features.rows.shape[1], seed=config.seed)
        self.head.fit(features.rows, data.rows)
        self.head.to(self.device).train()
        self.margin_head = self._build_margin_head().to(self.device).train()
        self.optimiser = build_optimiser(config, [*self.head.parameters(), *self.margin_head.parameters()])
        self.fused_step = self._build_fused_step()
        self.average = (
            AveragedModel(
                self.head,
                multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay),  # type: ignore[no-untyped-call]
                use_buffers=True,
            )
            if config.ema_decay
            else None
        )
        self.start = [parameter.detach().clone() for parameter in self.head.parameters()]
        self.step = 0
        self.records: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.num_logged = 0
        self.best_score: float | None = None
        self.best_head: dict[str, Tensor] | None = None
        self.validations_without_gain = 0
        self.stopped_early = False

    def _build_margin_head(self) -> MarginHead:
        config = self.config
        counts = self.data.class_counts.tolist()
        margin = build_margin(
            config.loss, num_classes=len(counts), class_counts=counts, **_margin_options(config)
        )
        prefixes = (*config.matryoshka_dims, config.embedding_dim) if config.matryoshka_dims else ()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            return MarginHead(
                config.train_dim or config.embedding_dim,
                len(counts),
                margin,
                num_centers=config.num_centers,
                margin_growth=config.margin_growth,
                class_fraction=config.class_sample_ratio,
                dimension_fraction=config.feature_sample_ratio,
                prefixes=prefixes,
                seed=config.seed,
            )

    def _build_fused_step(self) -> FusedMarginStep | None:
        """The quick path for the class weights on a CPU; None where autograd has to do it."""
        config = self.config
        if not FusedMarginStep.covers(self.margin_head):
            return None
        # gradients that are summed, clipped or ascended first must be there whole
        in_one_go = distributed.world_size() == 1 and not config.gradient_clip and not config.sam_rho
        return FusedMarginStep(
            self.margin_head,
            self.optimiser if in_one_go else None,
            precision=config.precision,
            compiled=config.compile,
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    # ---- the loop

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end."""
        self._resume()
        stride = max(1, round(self.config.validate_every * self.steps_per_epoch))
        between = checkpoint_steps(self.config, steps_per_epoch=self.steps_per_epoch)
        batches: list[Int[np.ndarray, " b"]] = []
        with contextlib.closing(self.reader), self._progress_bar() as progress:
            task = progress.tasks[0].id
            while self.step < self.num_steps and not self.stopped_early:
                epoch, position = divmod(self.step, self.steps_per_epoch)
                if position == 0 or not batches:
                    batches = self._epoch(epoch)
                    self._read_ahead(batches, position)
                self.losses.append(self._train_step(batches[position]))
                self.step += 1
                if self.step % max(1, self.steps_per_epoch // RECORDS_AN_EPOCH) == 0:
                    self._record(loss=float(np.mean(self.losses)))
                    progress.update(task, loss=f"loss {np.mean(self.losses):.3f}")
                    self.losses = []
                if self.step % stride == 0 or self.step == self.num_steps:
                    self._validate()
                    self._save()
                    if self.best_score is not None:
                        progress.update(task, score=f"best mMP@5 {self.best_score:.1%}")
                elif between is not None and self.step % between == 0:
                    self._save()
                progress.advance(task, len(batches[position]))

    def _progress_bar(self) -> Progress:
        """Images done, of all, and a second; loss; validation score; time left."""
        bar = progress_bar(
            "images", "{task.fields[loss]} {task.fields[score]}", disable=not distributed.is_first()
        )
        bar.add_task(
            "train",
            total=self._num_images(self.num_steps),
            completed=self._num_images(self.step),
            loss="",
            score="" if self.best_score is None else f"best mMP@5 {self.best_score:.1%}",
        )
        return bar

    def _num_images(self, num_steps: int) -> int:
        """Images that so many steps look at; epochs of one length are assumed."""
        sizes = [len(batch) for batch in self._epoch(0)]
        epochs, rest = divmod(num_steps, self.steps_per_epoch)
        return epochs * sum(sizes) + sum(sizes[:rest])

    def _epoch(self, epoch: int) -> list[Int[np.ndarray, " b"]]:
        config = self.config
        return epoch_batches(
            self.data.classes,
            self.data.domains,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            config=SamplingConfig(kind=config.sampling, temperature=config.sampling_temperature),
        )

    def _read_ahead(self, batches: list[Int[np.ndarray, " _"]], position: int) -> None:
        """Read an order of blocks ahead of its use; a plan does not help random access."""
        if self.config.sampling == "block-shuffled":
            num_seen = sum(len(batch) for batch in batches[:position])
            self.reader.plan(self.data.rows[np.concatenate(batches)], start=num_seen)

    def _train_step(self, batch: Int[np.ndarray, " b"]) -> float:
        mine = distributed.share(batch)
        features = torch.from_numpy(np.asarray(self.reader.rows(self.data.rows[mine]), np.float32))
        inputs = self._dropped_out(features, len(batch)).to(self.device)
        labels = torch.from_numpy(self.data.classes[mine]).to(self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(
                self.config,
                self.step,
                num_steps=self.num_steps,
                warmup_steps=warmup_steps(self.config, steps_per_epoch=self.steps_per_epoch),
            )
        self.margin_head.set_progress(self.step / self.num_steps)

        def loss_and_gradients() -> float:
            self.optimiser.zero_grad()
            share = len(mine) / len(batch)
            with self._autocast():
                embeddings = self.head(inputs)
                extra = self._regularisation(inputs, embeddings) * share
            if self.fused_step is not None:
                loss, gradient = self.fused_step.loss_and_embedding_gradient(embeddings, labels, share=share)
                # one backward pass for both: the loss enters by its gradient, the rest by itself
                ((embeddings * gradient).sum() + extra).backward()
            else:
                with self._autocast():
                    loss = self.margin_head(embeddings, labels) * share
                (loss + extra).backward()
            return distributed.sum_gradients(loss.detach() + extra.detach(), self.optimiser)

        loss = take_step(self.optimiser, loss_and_gradients, self.config)
        if not np.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {self.step}",
                expected="a finite loss; the last checkpoint is kept",
                next_step=f"lower --learning-rate (now {self.config.learning_rate}) or set --gradient-clip",
            )
        if self.average is not None:
            self.average.update_parameters(self.head)
        return loss

    def _regularisation(
        self, inputs: Float[Tensor, "b w"], embeddings: Float[Tensor, "b d"]
    ) -> Float[Tensor, ""]:
        """What keeps the head general: a pull to its start (L2-SP, Li et al. 2018, eq. 4) and the backbone's
        similarities within the batch (Tung & Mori 2019, eq. 4, with cosines and the mean over pairs).
        """
        config, extra = self.config, embeddings.new_zeros(())
        if config.pull_to_start:
            pairs = zip(self.head.parameters(), self.start, strict=True)
            squares = [(parameter - start).square().sum() for parameter, start in pairs]
            extra = extra + config.pull_to_start * torch.stack(squares).sum()
        if config.distill:
            with torch.no_grad():
                described = torch.nn.functional.normalize(self.head.standardise(inputs), dim=1)
                wanted = described @ described.T
            unit = torch.nn.functional.normalize(embeddings, dim=1)
            extra = extra + config.distill * (unit @ unit.T - wanted).square().mean()
        return extra

    def _dropped_out(self, features: Float[Tensor, "b w"], num_global: int) -> Float[Tensor, "b w"]:
        """Dropout whose mask depends on seed and step alone, whatever was resumed or distributed."""
        if self.config.dropout == 0:
            return features
        keep = np.float32(1 - self.config.dropout)
        rng = np.random.default_rng([self.config.seed, self.step])
        mask = torch.from_numpy(rng.random((num_global, features.shape[1]), dtype=np.float32) < keep)
        return features * distributed.share(mask) / float(keep)

    def _record(self, **values: float) -> None:
        epoch = round(self.step / self.steps_per_epoch, 4)
        rate = self.optimiser.param_groups[0]["lr"]
        self.records.append({"step": self.step, "epoch": epoch, "learning_rate": rate, **values})

    # ---- validation and checkpoints

    def current_head(self) -> Head:
        """The head as it would be used: averaged, on the line to its start, reduced, as configured."""
        head = self.head if self.average is None else self.average.module
        assert isinstance(head, Head)
        if self.config.interpolate < 1:
            head = copy.deepcopy(head)
            with torch.no_grad():
                for parameter, start in zip(head.parameters(), self.start, strict=True):
                    parameter.lerp_(start, 1 - self.config.interpolate)
        if self.config.train_dim > self.config.embedding_dim:
            dim, rows = self.config.embedding_dim, self.data.rows
            return reduced_head(head, self.features.rows, dim, rows=rows, whiten=self.config.whiten)
        return head

    def _validate(self) -> None:
        if len(self.data.val_rows) == 0:
            return
        head = self.current_head()
        embeddings = head.embed(self.features.rows[self.data.val_rows])
        score, recall = validation_scores(embeddings, self.data.val_catalog)
        if np.isnan(score):
            return
        self.records.append({"step": self.step, "val/mmp@5": score, "val/r@1": recall})
        if self.best_score is None or score > self.best_score:
            self.best_score, self.validations_without_gain = score, 0
            self.best_head = {k: v.detach().cpu().clone() for k, v in head.state_dict().items()}
        else:
            self.validations_without_gain += 1
            self.stopped_early = 0 < self.config.patience <= self.validations_without_gain

    def trained(self) -> Trained:
        """What came out."""
        return Trained(
            head=self.result(),
            records=self.records,
            num_steps=self.step,
            num_class_parameters=sum(each.numel() for each in self.margin_head.parameters()),
            best_score=self.best_score,
        )

    def result(self) -> Head:
        """The head that the run is for."""
        head = self.current_head()
        if self.config.keep == "best" and self.best_head is not None:
            head.load_state_dict(self.best_head)
        return head.cpu().eval()

    def _save(self) -> None:
        if not distributed.is_first():
            return
        state = {
            "step": self.step,
            "head": self.head.state_dict(),
            "margin_head": self.margin_head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "records": self.records,
            "losses": self.losses,
            "best_score": self.best_score,
            "best_head": self.best_head,
            "validations_without_gain": self.validations_without_gain,
            "stopped_early": self.stopped_early,
        }
        with atomic_path(self.folder / "checkpoints" / "last.pt") as partial:
            # by way of memory: torch's own writer turns a full disk into an error without a number
            buffer = io.BytesIO()
            torch.save(state, buffer)
            partial.write_bytes(buffer.getbuffer())
        if self.config.keep_checkpoints:
            head = self.current_head()
            write_head(self.folder / "checkpoints" / f"head-{self.step:09d}.safetensors", head)
        write_records(self.folder, self.records)
        self.num_logged = write_tensorboard(self.folder, self.records, self.num_logged)

    def _resume(self) -> None:
        path = self.folder / "checkpoints" / "last.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.head.load_state_dict(state["head"])
        self.margin_head.load_state_dict(state["margin_head"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for name in (
            "step",
            "records",
            "losses",
            "best_score",
            "best_head",
            "validations_without_gain",
            "stopped_early",
        ):
            setattr(self, name, state[name])
        self.num_logged = len(self.records)


def _margin_options(config: TrainConfig) -> dict[str, Any]:
    """What the configuration says of the margin, under the names that the loss has for it."""
    options = dict(config.loss_options)
    if config.scale is not None:
        options["scale"] = config.scale
    if config.margin is not None:
        accepted = inspect.signature(LOSSES[config.loss]).parameters if config.loss in LOSSES else {}
        names = [name for name in ("margin_radians", "margin_max_radians") if name in accepted]
        options[names[0] if names else "margin"] = config.margin
    return options


def _finish(
    folder: Path, features: FeatureSet, data: TrainingData, trained: Trained, made_from: dict[str, Any]
) -> None:
    head = trained.head
    write_head(folder / "head.safetensors", head)
    write_records(folder, trained.records)
    write_plots(folder, trained.records)
    content = {
        # relative, so that a project folder can be moved as a whole
        "features": os.path.relpath(features.folder.resolve(), folder.resolve()),
        "backbone": features.backbone["name"],
        "num_backbone_parameters": features.manifest.content.get("num_backbone_parameters"),
        "width": head.width,
        "head": dataclasses.asdict(head.config),
        "num_classes": len(data.class_counts),
        "num_images": len(data.rows),
        "num_steps": trained.num_steps,
        "num_head_parameters": sum(parameter.numel() for parameter in head.parameters()),
        "num_class_parameters": trained.num_class_parameters,
        "best_score": trained.best_score,
        "notes": list(data.notes),
    }
    write_manifest(
        folder, Manifest(kind=KIND, format_version=FORMAT_VERSION, made_from=made_from, content=content)
    )
