"""Fine-tuning beyond the head: what learns, what stays, resuming, and that the run is like any other."""

import functools
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from samething.backbones import load_backbone
from samething.embedder import Embedder
from samething.errors import FingerprintError, InputError
from samething.evaluation import evaluate
from samething.export import export
from samething.export.quality import prepared_images
from samething.features import features
from samething.training import FinetuneConfig, train
from samething.training.finetune import Finetuner
from samething.training.run import Run
from samething.training.unfreezing import chosen_layers, unfreeze
from tiny import make_tiny

TUNE = {"unfreeze": "all", "tune_epochs": 2.0, "tune_batch_size": 16, "backbone_rate": 0.5}
HEAD = {"recipe": "demo", "epochs": 3.0, "embedding_dim": 16, "keep": "last"}


@pytest.fixture(scope="module", params=[pytest.param("vit", marks=pytest.mark.slow), "conv"])
def tiny(request, tmp_path_factory):
    folder = make_tiny(tmp_path_factory.mktemp(request.param), request.param)
    with pytest.MonkeyPatch.context() as patch:
        # the fastest runtime may compute in bfloat16; torch's features can be compared closely
        patch.setattr("samething.features.features", functools.partial(features, runtime="torch"))
        tuned(folder, "tuned")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("only vit"))


def tuned(folder, name, head=None, **tune):
    return train(
        folder / "f",
        output=folder / name,
        weights=folder / "w.safetensors",
        **{**HEAD, **(head or {}), **TUNE, **tune},
    )


def states(folder, name):
    before = safetensors.torch.load_file(folder / "w.safetensors")
    return before, safetensors.torch.load_file(folder / name / "backbone.safetensors")


def test_backbone_and_head_learn_and_the_run_is_like_any_other(tiny):
    before, after = states(tiny, "tuned")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert changed and not changed & statistics
    run = Run.open(tiny / "tuned")
    assert run.manifest.content["finetune"]["stage"] == "lp-ft"
    losses = [record["loss"] for record in run.records if "loss" in record]
    assert np.isfinite(losses).all()
    # its features are those of the tuned backbone
    described = run.features()
    assert described.manifest.content["runtime"] == "torch"
    backbone = load_backbone(described.backbone["name"], weights=tiny / "tuned" / "backbone.safetensors")
    pixels = prepared_images(described.catalog, backbone.preprocessing, 4)
    assert described.catalog.fingerprint == Run.open(tiny / "run").features().catalog.fingerprint
    with torch.inference_mode():
        expected = backbone(torch.from_numpy(pixels)).numpy()
    found = np.asarray(described.rows[:: len(described.rows) // 4][:4], np.float32)
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2e-3)  # they are kept as float16
    comparison = evaluate(tiny / "run", tiny / "tuned").to_json()
    assert {"run", "tuned"} <= set(comparison)
    made = export(tiny / "tuned", output=tiny / "model")
    assert made.largest_difference < 1e-4 and "fine-tuned" in (tiny / "model" / "README.md").read_text()
    vectors = Embedder.load(tiny / "model").embed(described.catalog.paths)
    assert (vectors * run.head.embed(described.rows)).sum(axis=1).min() > 0.999
    again = tuned(tiny, "tuned")
    assert again.was_finished


@pytest.mark.slow
def test_a_locked_head_stays_while_the_backbone_learns(vit):
    tuned(vit, "locked", stage="locked-head")
    start = safetensors.torch.load_file(vit / "locked" / "head-start.safetensors")
    end = safetensors.torch.load_file(vit / "locked" / "head.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in start)
    before, after = states(vit, "locked")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_lora_is_merged_into_the_weights_it_adapts(vit):
    run = tuned(vit, "lora", lora_rank=2, unfreeze="2")
    before, after = states(vit, "lora")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(name.endswith("weight") and before[name].dim() > 1 for name in changed)
    layers = chosen_layers(load_backbone("timm:test_vit", weights=vit / "w.safetensors").network, 2)
    assert changed <= set(layers)
    rank = torch.linalg.matrix_rank((after[min(changed)] - before[min(changed)]).double(), atol=1e-7)
    assert rank <= 2
    assert run.manifest.content["num_tuned_parameters"] < 50_000


@pytest.mark.slow
def test_gradient_checkpointing_and_bfloat16(vit):
    plain = tuned(vit, "plain", tune_epochs=0.5)
    checkpointed = tuned(vit, "checkpointed", tune_epochs=0.5, gradient_checkpointing=True)
    losses = [[r["loss"] for r in run.records if "loss" in r] for run in (plain, checkpointed)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    low = tuned(vit, "bfloat16", head={"precision": "bfloat16", "whiten": 0.5}, tune_epochs=0.5)
    assert np.isfinite([r["loss"] for r in low.records if "loss" in r]).all()


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.slow  # head training, which shares the loop, is killed in tests/test_training.py
def test_a_killed_run_ends_like_an_undisturbed_one(vit, monkeypatch):
    undisturbed = tuned(vit, "undisturbed", tune_validate_every=0.5)
    step, calls = Finetuner._train_step, []

    def killed(self, labels, pixels):
        calls.append(1)
        if len(calls) == 4:
            raise KilledError
        return step(self, labels, pixels)

    monkeypatch.setattr(Finetuner, "_train_step", killed)
    with pytest.raises(KilledError):
        tuned(vit, "resumed", tune_validate_every=0.5)
    assert not (vit / "resumed" / "manifest.json").exists()
    monkeypatch.setattr(Finetuner, "_train_step", step)
    resumed = tuned(vit, "resumed", tune_validate_every=0.5)
    assert (vit / "resumed" / "backbone.safetensors").read_bytes() == (
        vit / "undisturbed" / "backbone.safetensors"
    ).read_bytes()
    assert resumed.records == undisturbed.records
    with pytest.raises(FingerprintError):
        tuned(vit, "resumed", layer_decay=0.5)
    shutil.rmtree(vit / "undisturbed")


def test_later_layers_learn_faster():
    network = load_network()
    unfrozen = unfreeze(network, FinetuneConfig(unfreeze="3", layer_decay=0.5), seed=0)
    shares = [share for share, _ in unfrozen.groups]
    assert shares == [1.0, 0.5, 0.25]
    layers = chosen_layers(network, 3)
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in network.named_parameters() if name in layers}
    assert 0 < len(learning) < len(list(network.parameters()))
    deepest = next(name for name in layers if layers[name] == 2)
    assert any(parameter is dict(network.named_parameters())[deepest] for parameter in unfrozen.groups[2][1])


def load_network():
    import timm

    return timm.create_model("test_vit", num_classes=0).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unfreeze": "some"}, "--unfreeze some"),
        ({"unfreeze": "0"}, "--unfreeze 0"),
        ({"lora_rank": 4}, "--lora-rank without --unfreeze"),
        ({"unfreeze": "all", "layer_decay": 0.0}, "--layer-decay"),
        ({"unfreeze": "all", "tune_batch_size": 1}, "--tune-batch-size"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**options)
