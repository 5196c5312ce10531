import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch

from samething.checksums import write_sealed
from samething.cli import build_app
from samething.errors import ArtefactError, FingerprintError, InputError
from samething.evaluation import evaluate, evaluate_embeddings
from samething.features.row_reader import RowReader
from samething.files import read_manifest, write_manifest
from samething.heads import HeadConfig, fitted_head
from samething.losses import LOSSES
from samething.losses.matrix_products import bfloat16_slowdown
from samething.training import RECIPES, TrainConfig, train
from samething.training.config import REMOVED, paper
from samething.training.data import TrainingData
from samething.training.loop import HeadTrainer
from samething.training.on_card import Recorded, RowsOnDevice
from samething.training.optimisers import Schedule, build_optimiser
from samething.training.run import Run
from samething.training.validation import validation_scores
from scenes import feature_folder

QUICK = {"recipe": "demo", "epochs": 6.0, "batch_size": 16, "embedding_dim": 8, "validate_every": 2.0}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return feature_folder(tmp_path_factory.mktemp("with space é") / "features")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.head.state_dict()


def same_weights(one: Run, two: Run) -> bool:
    return all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())


def test_a_trained_head_is_ahead_of_pca_on_unseen_classes(features, tmp_path):
    run = train(features.folder, output=tmp_path / "run", **{**QUICK, "epochs": 30.0})
    pca = fitted_head(
        HeadConfig(kind="pca", embedding_dim=8), features.rows[features.catalog.has_role("train")]
    )
    scores = [
        evaluate_embeddings(head.embed(features.rows), features.catalog, num_resamples=10).value("mmp@5")
        for head in (run.head, pca)
    ]
    assert scores[0] > scores[1] + 0.05
    losses = [record["loss"] for record in run.records if "loss" in record]
    assert losses[-1] < losses[0] / 2


def test_run_folder_holds_what_is_promised(features, tmp_path):
    run = train(features.folder, output=tmp_path / "run", **QUICK)
    names = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert {
        "config.json", "manifest.json", "metrics.jsonl", "head.safetensors", "checkpoints/last.pt",
        "plots/loss.svg", "plots/learning_rate.svg", "plots/val_mmp_at_5.svg",
    } <= names  # fmt: skip
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.records
    assert run.manifest.content["num_head_parameters"] == 48 * 8 + 8
    assert run.manifest.content["num_class_parameters"] == 12 * 2 * 8  # classes × centres × dimensions
    again = train(features.folder, output=tmp_path / "run", **QUICK)
    assert again.was_finished and same_weights(run, again)


def test_tensorboard_log_has_every_record(features, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted(features, tmp_path / "run", QUICK, after=2)
    run = train(features.folder, output=tmp_path / "run", **QUICK)
    log = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for name in ("loss", "learning_rate", "val/mmp@5"):
        logged = {event.step: event.value for event in log.Scalars(name)}
        assert logged == pytest.approx({r["step"]: r[name] for r in run.records if name in r})


def test_same_seed_same_run(features, tmp_path):
    one, two = (train(features.folder, output=tmp_path / name, **QUICK) for name in "ab")
    other = train(features.folder, output=tmp_path / "c", seed=1, **QUICK)
    assert same_weights(one, two) and one.records == two.records
    assert not same_weights(one, other)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"optimiser": "sgd", "learning_rate": 0.1}, marks=pytest.mark.slow),
        {"optimiser": "adam", "gradient_clip": 1.0},
        pytest.param({"head": "batchnorm-linear", "standardise": False}, marks=pytest.mark.slow),
        pytest.param({"head": "mlp", "hidden_dim": 32}, marks=pytest.mark.slow),
        pytest.param({"whiten": 0.5}, marks=pytest.mark.slow),
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.slow),
        {"precision": "bfloat16", "num_centers": 3},
        {"matryoshka_dims": (2, 4)},
        pytest.param({"class_sample_ratio": 0.5}, marks=pytest.mark.slow),
        pytest.param({"sampling": "class-balanced"}, marks=pytest.mark.slow),
        pytest.param({"sampling": "block-shuffled"}, marks=pytest.mark.slow),
        pytest.param(
            {"sampling": "domain-round-robin", "warmup_unit": "steps", "warmup": 3.0}, marks=pytest.mark.slow
        ),
        pytest.param({"schedule": "constant"}, marks=pytest.mark.slow),
        pytest.param({"loss": "adaface", "loss_options": {"h": 0.4}}, marks=pytest.mark.slow),
        pytest.param({"loss": "adacos", "loss_options": {"dynamic": True}}, marks=pytest.mark.slow),
        {"loss": "dynm-arcface"},
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()),
)
def test_every_option_trains_and_resumes_to_the_same_weights(features, tmp_path, options):
    settings = {**QUICK, **options}
    whole = train(features.folder, output=tmp_path / "whole", **settings)
    assert all(math.isfinite(record.get("loss", 0)) for record in whole.records)
    assert whole.records[-1]["val/mmp@5"] > 0.1
    interrupted(features, tmp_path / "part", settings, after=2)
    part = train(features.folder, output=tmp_path / "part", **settings)
    assert same_weights(whole, part) and whole.records == part.records


@pytest.mark.parametrize("options", [{}, {"optimiser": "adam", "sampling": "domain-balanced"}])
def test_rows_on_a_device_train_to_the_weights_that_the_reader_gives(
    features, tmp_path, monkeypatch, options
):
    """A card gathers batches from its own memory; the same lines on a CPU give the same weights, resumed too.

    The size of the batch leaves a last one that is smaller."""
    settings = {**QUICK, "batch_size": 20, **options}
    read = train(features.folder, output=tmp_path / "read", **settings)
    gathered = []

    def on_this_device(*what):
        gathered.append(RowsOnDevice(*what))
        return gathered[-1]

    monkeypatch.setattr(RowsOnDevice, "if_they_fit", on_this_device)
    monkeypatch.setattr(RowReader, "rows", None)  # nothing is read batch by batch any more
    interrupted(features, tmp_path / "part", settings, after=2)
    part = train(features.folder, output=tmp_path / "part", **settings)
    assert len(gathered) == 2
    assert same_weights(read, part) and read.records == part.records


@pytest.mark.parametrize("loss", [*LOSSES, "adacos, dynamic"])
def test_nothing_in_a_step_on_a_card_waits_for_a_number(features, tmp_path, loss):
    """A step that looks at a number cannot be recorded as a CUDA graph: each looked at labels, at lengths of
    rows and at the loss. Tensors without content ("meta") stand for a card: who asks them for a number fails.
    """
    name, _, dynamic = loss.partition(", ")
    options = {"loss": name, "num_centers": 3, "loss_options": {"dynamic": True} if dynamic else {}}
    trainer = HeadTrainer(
        features, TrainingData.of(features), TrainConfig(embedding_dim=8, **options), tmp_path
    )
    meta = torch.device("meta")
    trainer.head.to(meta)
    trainer.margin_head.to(meta)
    trainer.margin_head.checks = False  # as on a card
    trainer.fused_step = None
    trainer.optimiser = torch.optim.SGD([*trainer.head.parameters(), *trainer.margin_head.parameters()])
    places = torch.empty(16, dtype=torch.int64, device=meta)
    trainer.on_device = RowsOnDevice(features, trainer.data, meta)
    taken = trainer._step(places, None, torch.empty(16, trainer.head.width, device=meta), 1.0)
    assert taken.is_meta and trainer.margin_head.weight.grad.is_meta
    trainer.margin_head.checks = True
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        trainer._step(places, None, None, 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card can record it")
def test_a_step_that_cannot_be_recorded_is_taken_plainly_and_said(capsys):
    recorded = Recorded(lambda number: number * 2)
    recorded._num_plain = 3  # it would be recorded now
    assert [float(recorded(torch.tensor(value))) for value in (1.0, 4.0)] == [2.0, 8.0]
    assert capsys.readouterr().err.count("cannot be recorded as a CUDA graph") == 1


@pytest.mark.parametrize("slower", [13.0, 0.4])
def test_a_slow_precision_is_said(features, tmp_path, monkeypatch, capsys, slower):
    """A step took 2,066 ms instead of 162, without a word."""
    assert bfloat16_slowdown() > 0
    monkeypatch.setattr("samething.training.trainer.bfloat16_slowdown", lambda: slower)
    train(features.folder, output=tmp_path / "run", **{**QUICK, "epochs": 1.0, "precision": "bfloat16"})
    assert ("takes 13.0 times as long as float32" in capsys.readouterr().err) == (slower > 1)


def test_checkpoints_between_validations(features, tmp_path):
    """Five steps per epoch: a checkpoint after every third step, and at each validation."""
    settings = {**QUICK, "checkpoint_every": 0.6, "keep_checkpoints": True, "keep": "last", "epochs": 4.0}
    whole = train(features.folder, output=tmp_path / "whole", **settings)
    interrupted(features, tmp_path / "part", settings, after=1)
    part = train(features.folder, output=tmp_path / "part", **settings)
    assert same_weights(whole, part) and whole.records == part.records
    heads, again = (
        {int(path.stem[5:]): safetensors.torch.load_file(path) for path in sorted(folder.glob("*/head-*"))}
        for folder in (whole.folder, part.folder)
    )
    assert list(heads) == list(again) == [3, 6, 9, 10, 12, 15, 18, 20]
    assert all(torch.equal(value, heads[20][name]) for name, value in weights(whole).items())
    assert not torch.equal(heads[3]["projection.weight"], heads[6]["projection.weight"])


@pytest.mark.slow
def test_losses_since_the_last_record_survive_a_checkpoint(tmp_path):
    """With 45 steps per epoch a record is the mean of two; a checkpoint may fall between them."""
    found = feature_folder(tmp_path / "features", num_classes=60, per_class=6)
    settings = {**QUICK, "batch_size": 4, "epochs": 2.0, "checkpoint_every": 7 / 45}
    whole = train(found.folder, output=tmp_path / "whole", **settings)
    interrupted(found, tmp_path / "part", settings, after=1)
    assert train(found.folder, output=tmp_path / "part", **settings).records == whole.records


def test_progress_counts_images(features, tmp_path, capsys):
    train(features.folder, output=tmp_path / "run", **QUICK)
    shown = capsys.readouterr().err
    # 12 training classes of 6 images, 6 epochs
    assert "432/432 images" in shown and "/s" in shown and "loss" in shown and "best mMP@5" in shown


def interrupted(features, folder, settings, *, after):
    """Stop a run with an exception right after a checkpoint, as a full stop by the user would."""
    from samething.training import loop

    class StopError(Exception):
        pass

    original, saved = loop.HeadTrainer._save, []

    def save_then_stop(self):
        original(self)
        saved.append(self.step)
        if len(saved) == after:
            raise StopError

    loop.HeadTrainer._save = save_then_stop
    try:
        with pytest.raises(StopError):
            train(features.folder, output=folder, **settings)
    finally:
        loop.HeadTrainer._save = original
    with pytest.raises(ArtefactError, match="not a finished run"):
        Run.open(folder)


TRAIN = """
import sys
from pathlib import Path
from samething.training import train
settings = {"recipe": "demo", "epochs": 80.0, "batch_size": 16, "embedding_dim": 8, "validate_every": 1.0}
train(Path(sys.argv[1]), output=Path(sys.argv[2]), **settings)
"""


def killed_and_resumed(features, folder, *, num_kills, seed):
    """Start the same run again and again, kill -9 at random moments, and let the last one end."""
    rng, command = random.Random(seed), [sys.executable, "-c", TRAIN, str(features.folder), str(folder)]
    killed = 0
    while killed < num_kills:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            # moments count from the first sign of work, or imports would take every bullet
            if (folder / "config.json").exists():
                time.sleep(rng.uniform(0, 1.2))
                break
            time.sleep(0.02)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=300)
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [2, 10])
def test_kill_at_random_moments_and_resume(features, tmp_path, num_kills):
    settings = {"recipe": "demo", "epochs": 80.0, "batch_size": 16, "embedding_dim": 8, "validate_every": 1.0}
    whole = train(features.folder, output=tmp_path / "whole", **settings)
    assert killed_and_resumed(features, tmp_path / "killed", num_kills=num_kills, seed=num_kills) > 0
    killed = Run.open(tmp_path / "killed")
    assert same_weights(whole, killed) and whole.records == killed.records
    assert whole.best_score == killed.best_score


@pytest.mark.slow
def test_one_and_two_processes_agree(features, tmp_path):
    settings = ", ".join(f"{name}={value!r}" for name, value in {**QUICK, "head": "batchnorm-linear"}.items())
    script = tmp_path / "job.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\nfrom samething.training import train\n"
        f"train(Path(sys.argv[1]), output=Path(sys.argv[2]), {settings})\n"
    )
    for number in (1, 2):
        subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}",
                str(script), str(features.folder), str(tmp_path / str(number)),
            ],
            check=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    one, two = (Run.open(tmp_path / name) for name in "12")
    assert [r["step"] for r in one.records] == [r["step"] for r in two.records]
    for name in ("loss", "val/mmp@5"):
        ours, theirs = ([r[name] for r in run.records if name in r] for run in (one, two))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-3, atol=1e-4)


def test_early_stopping_and_best(features, tmp_path):
    run = train(features.folder, output=tmp_path / "run", **{**QUICK, "epochs": 200.0}, patience=2)
    scores = [record["val/mmp@5"] for record in run.records if "val/mmp@5" in record]
    assert run.manifest.content["num_steps"] < 200 * 5
    assert max(scores) == run.best_score == scores[-3]
    embeddings = run.head.embed(features.rows[features.catalog.has_role("val")])
    assert validation_scores(embeddings, features.catalog.take(features.catalog.has_role("val")))[0] == max(
        scores
    )


def test_iterations_instead_of_epochs(features, tmp_path):
    run = train(features.folder, output=tmp_path / "run", iterations=7, **QUICK)
    assert run.manifest.content["num_steps"] == 7


def test_validation_equals_the_evaluation_of_the_val_images(features):
    rng = np.random.default_rng(0)
    rows = features.catalog.has_role("val")
    embeddings = rng.normal(size=(rows.sum(), 5)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    catalog = features.catalog.take(rows)
    result = evaluate_embeddings(embeddings, catalog, role="val", num_resamples=2)
    score, recall = validation_scores(embeddings, catalog)
    np.testing.assert_allclose([score, recall], [result.value("mmp@5"), result.value("r@1")], atol=1e-12)


# ---- recipes, schedules, optimisers


def test_the_papers_recipe_to_the_letter():
    config = paper()
    assert (config.loss, config.num_centers, config.scale, config.margin) == ("arcface", 3, 30.0, 0.5)
    assert (config.optimiser, config.learning_rate, config.final_learning_rate) == ("adam", 2e-2, 1e-3)
    assert (config.weight_decay, config.batch_size, config.epochs, config.seed) == (1e-4, 128, 10, 42)
    assert (config.dropout, config.embedding_dim, config.head, config.bias) == (0.2, 64, "linear", True)
    assert (config.warmup, config.warmup_unit) == (1.0, "epochs")
    assert not config.standardise and config.keep == "last" and config.schedule == "cosine"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    config = RECIPES[name]()
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_learning_rates_against_torchs_schedulers():
    """As the paper's authors have them: a cosine over all steps, times a linear warm-up. The cosine began
    after the warm-up, and rates were up to 17 % higher in the middle of the recipe paper."""
    schedule = Schedule(highest=0.5, final=0.01, course="cosine", num_steps=100, warmup_steps=20)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=100, eta_min=0.01)
    expected = []
    for step in range(100):
        expected.append(cosine.get_last_lr()[0] * min(1.0, (step + 1) / 20))
        optimiser.step()
        cosine.step()
    ours = [schedule.rate(step) for step in range(100)]
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    constant = Schedule(highest=0.5, final=0.01, course="constant", num_steps=9, warmup_steps=4)
    assert [constant.rate(step) for step in range(9)] == [0.125, 0.25, 0.375, *[0.5] * 6]


@pytest.mark.parametrize("kind", ["linear", "batchnorm-linear", "mlp"])
def test_dropout_does_not_shift_what_the_head_sees(kind, features, tmp_path):
    """Numbers were dropped before the mean was subtracted, and before the batch was normalised: a constant
    shift of what enters the linear map, and a spread, that evaluation never has."""
    trainer = HeadTrainer(
        features, TrainingData.of(features), TrainConfig(head=kind, embedding_dim=8, dropout=0.5), tmp_path
    )
    head = trainer.head
    linear = next(layer for layer in head.modules() if isinstance(layer, torch.nn.Linear))
    seen = []
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    rows = torch.from_numpy(np.asarray(features.rows[trainer.data.rows], np.float32))
    with torch.no_grad():
        trainer.head(rows, trainer._dropout(len(rows)))
        trainer.head(rows, None)
    dropped, whole = seen
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], rtol=1e-5, atol=1e-6)


def test_warmup_units(features, tmp_path):
    def steps(**options):
        config = TrainConfig(batch_size=16, embedding_dim=8, **options)
        return HeadTrainer(features, TrainingData.of(features), config, tmp_path).schedule.warmup_steps

    assert steps(warmup=2.0) == 10
    assert steps(warmup=7.0, warmup_unit="steps") == 7


@pytest.mark.parametrize(("name", "coupled"), [("adam", True), ("adamw", False)])
def test_weight_decay_is_coupled_or_not(name, coupled):
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    config = TrainConfig(optimiser=name, weight_decay=0.5, learning_rate=0.01)
    optimiser = build_optimiser(config, [weight])
    weight.grad = torch.zeros(1)
    optimiser.step()
    # with a gradient of zero, L2 makes Adam take a whole step of lr; decoupled decay shrinks by lr × decay
    assert abs(float(weight.detach()) - (1 - 0.01 if coupled else 1 - 0.005)) < 1e-6


@pytest.mark.parametrize(
    "words, expected",
    [
        (["dynm-arcface", "--loss-options.schedule", "inverse_root"], {"schedule": "inverse_root"}),
        (["adacos", "--loss-options.dynamic", "true"], {"dynamic": True}),
        (["adaface", "--loss-options.h", "0.25"], {"h": 0.25}),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_options_of_a_loss_on_the_command_line(features, tmp_path, words, expected):
    command = ["train", str(features.folder), "-o", str(tmp_path / "run"), "--epochs", "1", "--loss", *words]
    run = build_app(command="train")([*command, "--embedding-dim", "8"])
    assert run.config.loss_options == expected
    assert TrainConfig.from_json(run.config.to_json()) == run.config


# ---- what can go wrong


def test_features_that_moved(tmp_path):
    old, other = feature_folder(tmp_path / "old"), feature_folder(tmp_path / "other", num_classes=28)
    run = train(old.folder, output=tmp_path / "run", **QUICK)
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ArtefactError, match=r"are not at .*old"):
        run.features()
    with pytest.raises(ArtefactError, match=r"are not at .*other, .*old"):
        run.features(other.folder)
    assert run.features(other.folder, tmp_path / "new").folder == tmp_path / "new"
    comparison = evaluate(run.folder, features=[other.folder, tmp_path / "new"])
    assert "run" in comparison.results
    other.folder.rename(tmp_path / "old")
    with pytest.raises(ArtefactError, match="holds other features"):
        run.features()


def test_another_configuration_in_the_same_folder_is_refused(features, tmp_path):
    train(features.folder, output=tmp_path / "run", **QUICK)
    with pytest.raises(FingerprintError, match=r"config\.dropout is 0\.2"):
        train(features.folder, output=tmp_path / "run", dropout=0.3, **QUICK)
    fresh = train(features.folder, output=tmp_path / "run", dropout=0.3, resume=False, **QUICK)
    assert fresh.config.dropout == 0.3 and not fresh.was_finished


def test_a_folder_of_an_older_version_is_still_known(features, tmp_path):
    """Options that came later have defaults that do what was done before; those that went are passed over."""
    run = train(features.folder, output=tmp_path / "run", **QUICK)
    path = run.folder / "config.json"
    record = json.loads(path.read_text())
    del record["config"]["hidden_dim"]
    record["config"] |= REMOVED
    path.write_text(json.dumps(record))
    assert train(features.folder, output=tmp_path / "run", **QUICK).was_finished
    with pytest.raises(FingerprintError, match="hidden_dim"):
        train(features.folder, output=tmp_path / "run", hidden_dim=9, **QUICK)
    manifest = read_manifest(run.folder, kind="run", format_version=1)
    manifest.made_from["config"] |= {**REMOVED, "members": 2, "train_dim": 12}
    manifest.made_from["config"] |= {"warmup_unit": "images", "warmup": 48.0}
    manifest.content["head"]["initialise"] = "random"
    write_manifest(run.folder, manifest)
    old = Run.open(run.folder)
    assert same_weights(old, run) and (old.config.warmup, old.config.warmup_unit) == (3.0, "steps")
    record["config"]["members"] = 2
    path.write_text(json.dumps(record))
    with pytest.raises(FingerprintError, match="members"):
        train(features.folder, output=tmp_path / "run", **QUICK)


def test_a_checkpoint_of_another_version_is_refused(features, tmp_path):
    interrupted(features, tmp_path / "run", QUICK, after=1)
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    del state["version"]
    torch.save(state, buffer := io.BytesIO())
    write_sealed(path, buffer.getbuffer())
    with pytest.raises(ArtefactError, match="another version"):
        train(features.folder, output=tmp_path / "run", **QUICK)


def test_a_file_changes_the_recipe_and_options_change_the_file(features, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'epochs = 2\nmatryoshka_dims = [2, 4]\nhead = "mlp"\nstart = "random"\n[loss_options]\nscale = 20\n'
    )
    command = ["train", str(features.folder), "-o", str(tmp_path / "run"), "--config", str(file)]
    run = build_app(command="train")([*command, "--embedding-dim", "8", "--epochs", "1"])
    config = run.config
    assert (config.epochs, config.matryoshka_dims, config.head, config.embedding_dim) == (
        1.0,
        (2, 4),
        "mlp",
        8,
    )
    assert config.loss_options == {"scale": 20.0}
    for text, message in (
        ("epoch = 2", "unknown option epoch"),
        ('epochs = "two"', "--epochs two"),
        ("num_centers = 1.5", r"--num-centers 1\.5"),
        ("epochs = ", "run.toml: "),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            train(features.folder, output=tmp_path / "other", config=file)
    with pytest.raises(InputError, match="unknown option epoch") as caught:
        train(features.folder, output=tmp_path / "other", epoch=2)
    assert caught.value.next_step == "perhaps epochs was meant"


def test_singles_are_left_out_and_said(tmp_path):
    found = feature_folder(tmp_path / "f", num_classes=40, per_class=1)
    with pytest.raises(InputError, match="0 classes with at least two"):
        train(found.folder, output=tmp_path / "run", **QUICK)


def test_wrong_options(features, tmp_path):
    with pytest.raises(InputError, match=r"--dropout 1\.5"):
        train(features.folder, output=tmp_path / "run", dropout=1.5)
    with pytest.raises(InputError, match="recipe 'best'"):
        train(features.folder, output=tmp_path / "run", recipe="best")
    with pytest.raises(InputError, match="unknown option lr"):
        train(features.folder, output=tmp_path / "run", lr=1.0)
    with pytest.raises(InputError, match="loss 'arkface'"):
        train(features.folder, output=tmp_path / "run", loss="arkface", **QUICK)
    with pytest.raises(InputError, match="--optimiser lion"):
        train(features.folder, output=tmp_path / "run2", optimiser="lion")


def test_a_loss_that_blows_up_says_so(features, tmp_path):
    with pytest.raises(InputError, match=r"the loss is|has length"):
        train(
            features.folder, output=tmp_path / "run", optimiser="sgd", learning_rate=1e12, momentum=0.0,
            **{**QUICK, "warmup": 0.0, "schedule": "constant"},
        )  # fmt: skip


def test_a_folder_of_something_else_is_not_taken(features, tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"letters\.txt"):
        train(features.folder, output=tmp_path, **QUICK)
    with pytest.raises(ArtefactError, match="does not exist"):
        train(tmp_path / "nowhere", output=tmp_path / "run", **QUICK)


def test_starting_over_needs_a_run_to_start_over(features, tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(ArtefactError, match=r"letters\.txt"):
        train(features.folder, output=tmp_path, resume=False, **QUICK)
