"""What computes a model: the fastest that agrees, kept; what was asked for, or why not. Cards are played."""

import json
import threading
import time

import numpy as np
import onnxruntime
import pytest
from fastapi.testclient import TestClient

from line import run_python, samething
from samething.checksums import damages
from samething.embedder import Embedder, devices
from samething.errors import InputError, MissingExtraError
from samething.files import read_json
from samething.search import Searcher, find, index, rebuild
from samething.sessions import PROVIDERS, OpenVinoSession, devices_here, open_session
from samething.web import create_app, serve
from scenes import photographs, write_things
from test_graph_repositories import SETTINGS, encoder

SECONDS = {"CPUExecutionProvider": 1.0, "CUDAExecutionProvider": 0.1, "CoreMLExecutionProvider": 0.5}


class Machine:
    """onnxruntime as it would be on another machine: further providers, each with its own time and faults."""

    def __init__(self, patch):
        self.providers = ["CPUExecutionProvider"]
        self.broken: set[str] = set()  # cannot be opened
        self.absent: set[str] = set()  # opened without its libraries: onnxruntime takes the CPU in silence
        self.wrong: set[str] = set()  # computes something else
        self.opened: list[str] = []
        self.calls: list[str] = []
        self.real = onnxruntime.InferenceSession
        patch.setattr(onnxruntime, "get_available_providers", lambda: self.providers)
        patch.setattr(onnxruntime, "InferenceSession", self.session)
        patch.setattr(onnxruntime, "preload_dlls", lambda: None)
        patch.setitem(__import__("sys").modules, "openvino", None)  # not installed
        patch.setattr(devices, "seconds_of", lambda call, *, turns: self.seconds_in_turns([call])[0])
        patch.setattr(devices, "seconds_in_turns", self.seconds_in_turns)
        patch.setattr(devices, "_PAYS_FROM_S", 0.0)

    def seconds_in_turns(self, calls, *, turns=1):
        return [(call(), SECONDS[self.calls[-1]])[1] for call in calls]

    def session(self, graph, options, *, providers, enable_fallback):
        names = [one if isinstance(one, str) else one[0] for one in providers]
        assert names[-1] == "CPUExecutionProvider" and not enable_fallback
        if names[0] in self.broken:
            raise RuntimeError("no driver\nand more")
        self.opened.append(names[0])
        real = self.real(graph, options, providers=["CPUExecutionProvider"])
        return Played(self, "CPUExecutionProvider" if names[0] in self.absent else names[0], real)


class Played:
    """A session of a provider that is not here, computed by the CPU."""

    def __init__(self, machine, provider, real):
        self.machine, self.provider, self.real = machine, provider, real
        self.get_inputs, self.get_outputs = real.get_inputs, real.get_outputs

    def get_providers(self):
        return [self.provider]

    def run(self, names, given):
        self.machine.calls.append(self.provider)
        found = self.real.run(names, given)
        return [one[:, ::-1] for one in found] if self.provider in self.machine.wrong else found


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(devices.VARIABLE, raising=False)
    return Machine(monkeypatch)


@pytest.fixture
def model(tmp_path):
    """A small model that needs no training: a repository's image encoder of 32 pixels."""
    folder = tmp_path / "a model é"
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    (folder / "model.onnx").write_bytes(encoder("image_embeds"))
    return folder


def kept(model):
    return [read_json(path) for path in sorted((model / ".devices").glob("*.json"))]


# ---- the choice


def test_the_fastest_that_agrees_is_taken_and_kept(machine, model, capfd):
    machine.providers += ["CUDAExecutionProvider", "CoreMLExecutionProvider"]
    machine.wrong = {"CUDAExecutionProvider"}  # ten times as fast, and wrong
    plain = Embedder.load(model)
    assert (plain.device, plain.is_forced) == ("cpu", False)
    chosen = plain.fastest(photographs())
    assert chosen.device == "coreml" and chosen.fingerprint == plain.fingerprint
    assert "coreml computes: " in capfd.readouterr().err
    np.testing.assert_array_equal(chosen.embed(photographs()), plain.embed(photographs()))
    assert machine.calls[-2:] == ["CoreMLExecutionProvider", "CPUExecutionProvider"]
    (record,) = kept(model)
    assert (
        record["name"] == "coreml" and record["images_per_s"]["coreml"] == 2 * record["images_per_s"]["cpu"]
    )
    assert "cosine" in record["left_out"]["cuda"] and "cuda" not in record["images_per_s"]
    # the next time nothing is measured: the CPU opens with the model, then the one that was chosen
    machine.opened.clear()
    machine.calls.clear()
    assert Embedder.load(model).fastest(photographs()).device == "coreml"
    assert machine.opened == ["CPUExecutionProvider", "CoreMLExecutionProvider"]
    assert machine.calls == ["CPUExecutionProvider"]  # which asks a repository for the length of its vectors


@pytest.mark.parametrize("fault", ["broken", "absent", "wrong"])
def test_a_device_that_does_not_work_is_left_out_with_the_reason(machine, model, fault):
    machine.providers.append("CUDAExecutionProvider")
    getattr(machine, fault).add("CUDAExecutionProvider")
    assert Embedder.load(model).fastest().device == "cpu"
    (record,) = kept(model)
    said = {"broken": "no driver", "absent": "cannot start", "wrong": "cosine"}[fault]
    assert said in record["left_out"]["cuda"] and record["name"] == "cpu"
    with pytest.raises(InputError, match=said) as error:
        Embedder.load(model, device="cuda")
    assert error.value.next_step


def test_what_was_chosen_is_measured_again_where_something_else_decides(machine, model, monkeypatch):
    machine.providers.append("CoreMLExecutionProvider")
    assert Embedder.load(model).fastest().device == "coreml"
    machine.providers.append("CUDAExecutionProvider")  # another package was installed
    assert Embedder.load(model).fastest().device == "cuda"
    monkeypatch.setattr(onnxruntime, "__version__", "99.0")
    machine.wrong = {"CUDAExecutionProvider"}
    assert Embedder.load(model).fastest().device == "coreml"
    assert len(kept(model)) == 3
    machine.broken = {"CoreMLExecutionProvider"}  # chosen, and gone since: the job goes on
    assert Embedder.load(model).fastest().device == "cpu"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"name": "cuda"}', '{"name": "bla", "images_per_s": {}}']
)
def test_a_kept_choice_that_is_damaged_is_measured_again(machine, model, content):
    machine.providers.append("CoreMLExecutionProvider")
    Embedder.load(model).fastest()
    (path,) = (model / ".devices").iterdir()
    path.write_text(content)
    assert Embedder.load(model).fastest().device == "coreml"
    assert read_json(path)["name"] == "coreml"


def test_few_images_are_not_worth_a_look(machine, model, monkeypatch):
    """A search asks with one image: it must not wait for devices to be opened and measured."""
    machine.providers.append("CoreMLExecutionProvider")
    embedder = Embedder.load(model)
    opened = len(machine.opened)
    assert embedder.fastest(num_images=devices.LEAST_IMAGES - 1) is embedder
    monkeypatch.setattr(devices, "_PAYS_FROM_S", 1000.0)  # an image takes the CPU one second here
    assert embedder.fastest(num_images=999) is embedder
    assert len(machine.opened) == opened and not (model / ".devices").exists()
    assert embedder.fastest(num_images=1001).device == "coreml"
    monkeypatch.setattr(devices, "devices_here", lambda: ["cpu"])
    assert Embedder.load(model).fastest().device == "cpu"


def test_a_folder_that_cannot_be_written_and_the_hubs_cache(machine, model, tmp_path):
    machine.providers.append("CoreMLExecutionProvider")
    (model / ".devices").write_text("in the way")
    assert Embedder.load(model).fastest().device == "coreml"
    (path,) = (tmp_path / "cache" / "samething" / "devices").iterdir()
    assert read_json(path)["name"] == "coreml"
    machine.wrong = {"CoreMLExecutionProvider"}  # it is not looked at again
    assert Embedder.load(model).fastest().device == "coreml"
    path.unlink()
    snapshot = tmp_path / "hub" / "models--someone--finder" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    (model / ".devices").unlink()
    model.rename(snapshot)
    Embedder.load(snapshot).fastest()
    assert path.parent.is_dir() and not (snapshot / ".devices").exists()
    assert len(list(path.parent.iterdir())) == 1


KEEPER = """
import sys
from pathlib import Path
from samething.embedder.devices import Choice
number, folder = int(sys.argv[1]), Path(sys.argv[2])
choice = Choice(folder, "a model", 2)
for turn in range(60):
    record = {"name": "cpu", "images_per_s": {"cpu": 1.0 + number}, "padding": "x" * 50_000 * number}
    choice.keep(record)
    assert choice.kept()["images_per_s"]["cpu"] in (1.0, 2.0), turn
"""


def test_several_processes_keep_one_choice(tmp_path):
    """Each finds a whole record at any time, whoever wrote it last."""
    done = []
    threads = [
        threading.Thread(target=lambda own=number: done.append(run_python("-c", KEEPER, own, tmp_path)))
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert len(list((tmp_path / ".devices").iterdir())) == 1  # and nothing unfinished


# ---- what is asked for


def test_a_device_by_argument_and_by_the_environment(machine, model, monkeypatch):
    machine.providers += ["CUDAExecutionProvider", "CoreMLExecutionProvider"]
    asked = Embedder.load(model, device="coreml")
    assert asked.device == "coreml" and asked.fastest() is asked
    monkeypatch.setenv(devices.VARIABLE, "coreml")
    assert Embedder.load(model).device == "coreml"
    assert Embedder.load(model, device="cuda").device == "cuda"
    free = Embedder.load(model, device="auto")
    assert free.device == "cpu" and free.fastest().device == "cuda"
    monkeypatch.setenv(devices.VARIABLE, "abacus")
    with pytest.raises(InputError, match="'abacus'"):
        Embedder.load(model)


def test_a_device_that_is_not_here(machine, model):
    with pytest.raises(InputError, match="device cuda") as error:
        Embedder.load(model, device="cuda")
    assert error.value.expected.endswith("here: cpu") and "samething[gpu]" in error.value.next_step
    with pytest.raises(MissingExtraError, match="openvino") as missing:
        Embedder.load(model, device="openvino")
    assert "samething[openvino]" in missing.value.next_step
    with pytest.raises(InputError, match="device directml"):
        Embedder.load(model, device="directml")


@pytest.mark.parametrize("device", ["tensorrt", "directml", "openvino"])
def test_every_provider_is_asked_for_in_its_own_way(machine, model, tmp_path, device):
    asked = []
    machine.providers.append(PROVIDERS[device])
    machine.session, played = None, machine.session

    def session(graph, options, *, providers, enable_fallback):
        asked.append((options, providers))
        return played(graph, options, providers=providers, enable_fallback=enable_fallback)

    onnxruntime.InferenceSession = session  # the fixture puts it back
    open_session(model / "model.onnx", device, num_threads=1)
    ((options, providers),) = asked
    if device == "tensorrt":
        assert [one if isinstance(one, str) else one[0] for one in providers] == [
            "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider",
        ]  # fmt: skip
        assert providers[0][1]["trt_engine_cache_path"] == str(tmp_path / "cache" / "samething" / "tensorrt")
    else:
        assert providers == [PROVIDERS[device], "CPUExecutionProvider"]
    assert options.enable_mem_pattern == (device != "directml")


# ---- in jobs


def test_an_index_of_many_images_is_made_by_the_fastest(machine, model, tmp_path, monkeypatch, capfd):
    machine.providers.append("CoreMLExecutionProvider")
    monkeypatch.setattr(devices, "LEAST_IMAGES", 4)
    monkeypatch.setattr("samething.embedder.LEAST_IMAGES", 4)
    images = write_things(tmp_path / "images", num_things=2)
    made = index(images, model=model, output=tmp_path / "index")
    assert made.num_added == 8 and machine.calls[-1] == "CoreMLExecutionProvider"
    assert "coreml computes" in capfd.readouterr().err
    image = sorted(images.rglob("*.jpg"))[0]
    machine.calls.clear()
    assert find(image, index=tmp_path / "index", k=1).matches[0].score > 0.999
    assert set(machine.calls) == {"CPUExecutionProvider"}  # a question starts soonest there
    plain = index(images, model=model, output=tmp_path / "plain", device="cpu")
    ids = [row["id"] for batch in plain.index.items() for row in batch.to_pylist()]
    np.testing.assert_allclose(plain.index.vectors(ids), made.index.vectors(ids), atol=1e-6)


def test_a_server_goes_over_to_the_fastest(machine, model, tmp_path):
    images = write_things(tmp_path / "images", num_things=2)
    index(images, model=model, output=tmp_path / "index")
    machine.providers.append("CoreMLExecutionProvider")
    app = create_app(Searcher.open(tmp_path / "index"))
    with TestClient(app, base_url="http://localhost") as client:
        content = sorted(images.rglob("*.jpg"))[0].read_bytes()

        def best():
            return client.post("/search", files={"image": content}).json()["matches"][0]

        before = best()
        assert app.app.state.service.searcher.embedder.device == "cpu"
        app.app.state.service.seek_fastest()
        deadline = time.monotonic() + 60
        while app.app.state.service.searcher.embedder.device == "cpu" and time.monotonic() < deadline:
            time.sleep(0.01)
        machine.calls.clear()
        assert best() == before and machine.calls == ["CoreMLExecutionProvider"]


def test_what_is_asked_for_outlives_a_rebuild(machine, model, tmp_path):
    """A server whose index was rebuilt with another model went back to the CPU."""
    machine.providers.append("CoreMLExecutionProvider")
    images = write_things(tmp_path / "images", num_things=1)
    made = index(images, model=model, output=tmp_path / "index", device="coreml")
    assert made.embedder.device == "coreml"
    served = Searcher.open(tmp_path / "index", device="coreml")
    again = tmp_path / "another"
    again.mkdir()
    (again / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, "resample": 2}))
    (again / "model.onnx").write_bytes(encoder("image_embeds"))
    rebuild(tmp_path / "index", model=again)
    current = served.current()
    assert current.embedder.fingerprint != served.embedder.fingerprint
    assert (current.embedder.device, current.embedder.is_forced) == ("coreml", True)


def test_a_server_of_a_device_that_is_not_here(line):
    with pytest.raises(InputError, match="device cuda"):
        serve(line / "index", port=0, device="cuda")
    done = samething("index", line / "my-images", "--model", line / "model", "--device", "abacus")
    assert done.returncode == 2 and "abacus" in done.stderr + done.stdout


# ---- OpenVINO, which is here


def test_openvino_gives_the_cpus_vectors(line, model):
    for folder in (line / "model", model):
        plain, other = Embedder.load(folder), Embedder.load(folder, device="openvino")
        assert isinstance(getattr(other.session, "_session", other.session), OpenVinoSession)
        ours = other.embed(photographs())
        np.testing.assert_allclose(ours, plain.embed(photographs()), atol=1e-4)
        before = ours.copy()
        other.embed(photographs()[::-1])  # a result is the caller's own
        np.testing.assert_array_equal(ours, before)


def test_threads_share_openvino(model):
    """One request is one thread's: where eight shared it, 19 of 400 calls gave another thread's vectors."""
    session = open_session(model / "model.onnx", "openvino", num_threads=1)
    images = np.random.default_rng(0).normal(size=(8, 4, 3, 32, 32)).astype(np.float32)
    expected = [session.run(None, {"pixel_values": each})[0] for each in images]
    wrong = []

    def work(number):
        for _ in range(50):
            found = session.run(["image_embeds"], {"pixel_values": images[number]})[0]
            if not np.array_equal(found, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_real_choice_on_this_machine(line_copy, monkeypatch):
    """Nothing played: whatever is taken agrees, and the model folder stays whole."""
    monkeypatch.setattr(devices, "_PAYS_FROM_S", 0.0)
    monkeypatch.setattr("samething.embedder.SAMPLE", 2)
    plain = Embedder.load(line_copy / "model")
    chosen = plain.fastest(sorted((line_copy / "my-images").rglob("*.jpg")))
    (record,) = kept(line_copy / "model")
    assert record["name"] == chosen.device
    assert {*record["images_per_s"], *record["left_out"]} == {*devices_here()}
    np.testing.assert_allclose(chosen.embed(photographs()), plain.embed(photographs()), atol=1e-3)
    assert damages(line_copy / "model")[1] == []
    assert Embedder.load(line_copy / "model").fingerprint == plain.fingerprint


def test_drawn_images_tell_bfloat16_from_float32():
    """Noise alone would not: images without structure all look alike to a network."""
    sample = devices.drawn_images((48, 32), 3)
    assert [image.shape for image in sample] == [(3, 48, 32)] * 3
    flat = np.stack(sample).reshape(3, -1).astype(float)
    assert abs(np.corrcoef(flat)[np.triu_indices(3, 1)]).max() < 0.5
    neighbours = np.corrcoef(sample[0][:, 1:].ravel(), sample[0][:, :-1].ravel())[0, 1]
    assert neighbours > 0.7  # as in photographs, and unlike noise
