"""--format hub with the hub's own client: uploaded as it is, and loaded again by its id."""

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from fake_hub import fake_hub
from line import run_python
from samething.embedder import Embedder
from samething.export import export
from samething.files import read_json
from samething.index import open_index
from scenes import photographs


@pytest.fixture(scope="module")
def finder(tiny):
    return export(tiny / "run", output=tiny / "finder", weights=tiny / "w.safetensors", format="hub").folder


CLIENT = """
import os, sys
address, folder, home, image, target = sys.argv[1:]
os.environ.update(HF_ENDPOINT=address, HF_HOME=home, HF_HUB_DISABLE_XET="1", HF_TOKEN="hf_none", NO_PROXY="*")
import numpy as np
from huggingface_hub import HfApi
from samething.embedder import Embedder
from samething.errors import ArtefactError
api = HfApi()
api.create_repo("someone/finder", exist_ok=True)
api.upload_folder(repo_id="someone/finder", folder_path=folder)
np.save(target, Embedder.load("someone/finder").embed([image]))
from samething.search import find, index
index(os.path.dirname(image), model="someone/finder", output=os.path.join(home, "index"))
print(find(image, index=os.path.join(home, "index"), k=1).matches[0].path)
try:
    Embedder.load("someone/else")
except ArtefactError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_hubs_client_uploads_it_and_the_embedder_loads_it_by_its_id(finder, tmp_path):
    image = tmp_path / "image.png"
    photographs()[0].save(image)
    with fake_hub() as hub:
        done = run_python("-c", CLIENT, hub.address, finder, tmp_path / "home", image,
                          tmp_path / "vectors.npy")  # fmt: skip
    assert done.returncode == 0, done.stderr
    uploaded = hub.repositories["someone/finder"]
    listed = read_json(finder / "manifest.json")["content"]["sha256"]
    # hidden files have no checksum of ours; the lock stays at home
    assert set(uploaded) == {*listed, "manifest.json", ".gitattributes", ".gitignore"}
    assert all(content == (finder / name).read_bytes() for name, content in uploaded.items())
    assert hub.lfs_paths == {"model.onnx", "model.safetensors"}
    assert set(hub.cards) == {uploaded["README.md"].decode()}  # the client asks whether the header is good
    expected = Embedder.load(finder).embed(photographs()[:1])
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), expected)
    # the model's files for torch were left on the hub
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert fetched == {"manifest.json", "config.json", "model.onnx"}
    assert "someone/else is no folder here" in done.stdout
    # an index noted the hub's id as a folder, and no search found its model again
    assert str(image) in done.stdout.split()
    (noted,) = open_index(tmp_path / "home" / "index").notes("models").values()
    assert noted == f"hub:someone/finder@{'c' * 40}"


def test_the_cards_header_is_what_the_hubs_library_reads(finder):
    text = (finder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    header = yaml.safe_load(text.split("---\n")[1])
    again = ModelCardData(**header)
    assert card.data.to_dict() == again.to_dict() == header
    assert header["library_name"] == "samething" and header["license"] and "onnx" in header["tags"]
    assert (card.data.license == "other") == (card.data.to_dict().get("license_name") is not None)
    assert card.text.lstrip().startswith("# finder")
