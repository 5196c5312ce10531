"""Features by a cluster of several machines, one of which is killed in the middle: Ray for real, on loopback.

In a network namespace of its own, because Ray listens on every interface and takes the host's address.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import samething
from samething.catalog import Catalog
from samething.errors import MissingExtraError
from samething.features import FeatureSet, features
from samething.files import file_sha256
from scenes import write_things
from test_backbones import TINY, save_tiny

SOURCE = str(Path(samething.__file__).parent.parent)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([SOURCE, str(Path(__file__).parent)]),
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
}

needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode != 0,
    reason="no right to make a network namespace",
)


def job(folder: Path, *, num_things: int) -> tuple[Path, Path]:
    """A catalog with an image that is there twice and one that is damaged, and weights."""
    images = write_things(folder / "images", num_things=num_things, num_views=4)
    first = sorted(images.rglob("*.jpg"))[0]
    shutil.copy(first, images / "copy.jpg")
    (images / "damaged.jpg").write_bytes(first.read_bytes()[:400])
    rows = [
        {"image": str(path.relative_to(images)), "label": path.parent.name, "sha256": file_sha256(path)}
        for path in sorted(images.rglob("*.jpg"))
    ]
    save_tiny(folder / "tiny.pth")
    return Catalog.from_rows(rows, root=images).write(folder / "catalog.parquet"), folder / "tiny.pth"


def run_in_namespace(script: str, *arguments: object, timeout: float = 400) -> str:
    """Run a script with nothing but a loopback device around it; returns what it printed."""
    command = ["unshare", "-n", "-p", "-f", "--kill-child", "--mount-proc", "sh", "-c"]
    done = subprocess.run(
        [*command, 'ip link set lo up; exec "$@"', "sh", sys.executable, "-c", script, *map(str, arguments)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return done.stdout


KILLS = r"""
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path
from samething.features import features
catalog, output, weights, backbone, what = sys.argv[1:]
ray = str(Path(sys.executable).parent / "ray")
temporary = "/tmp/ray-" + str(os.stat(catalog).st_ino)

def start(*options):
    done = subprocess.run([ray, "start", "--num-cpus=1", "--object-store-memory=100000000", *options],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

def processes(word):
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if word in command and int(entry.name) != os.getpid():
                yield int(entry.name)

client = ["--ray-client-server-port=10001"] if what == "client" else []
start("--head", "--node-ip-address=127.0.0.1", "--port=6379", "--include-dashboard=false",
      f"--temp-dir={temporary}", *client)
known = set(processes("raylet/raylet"))
for _ in range(2 if what != "client" else 0):
    start("--address=127.0.0.1:6379", "--node-ip-address=127.0.0.1")
others = sorted(set(processes("raylet/raylet")) - known)
killed = []

def kill():
    # a worker, and then a whole machine, as soon as results come
    while len(list(Path(output).glob("data-*/blocks/*.npz"))) < 3:
        time.sleep(0.05)
    workers = sorted(processes("ray::MapWorker"))
    os.kill(workers[-1], signal.SIGKILL)
    killed.append("worker")
    while len(list(Path(output).glob("data-*/blocks/*.npz"))) < 8:
        time.sleep(0.05)
    os.kill(others[0], signal.SIGKILL)
    killed.append("machine")

thread = threading.Thread(target=kill, daemon=True)
if what == "kill":
    thread.start()
address = "ray://127.0.0.1:10001" if what == "client" else "127.0.0.1:6379"
result = features(Path(catalog), output=Path(output), weights=Path(weights), backbone=backbone, batch_size=4,
                  runtime="torch", cluster=address)
print(json.dumps({"killed": killed, "machines": 1 + len(others), "computed": result.num_computed}))
subprocess.run([ray, "stop", "--force"], capture_output=True)
"""


def check_whole(output: Path, catalog: Path, weights: Path, tmp_path: Path) -> None:
    """The folder holds what one process would have computed: every image once, the same numbers."""
    alone = features(
        catalog, output=tmp_path / "alone", weights=weights, backbone=f"timm:{TINY}", batch_size=4,
        num_workers=0, runtime="torch",
    )  # fmt: skip
    result = FeatureSet.open(output)
    images = result.catalog.strings("image").tolist()
    assert len(images) == len(set(images)) == len(result.rows) == len(alone.rows)
    assert images == alone.catalog.strings("image").tolist()
    assert result.unreadable == alone.unreadable
    assert [bad.image for bad in result.unreadable] == ["damaged.jpg"]
    np.testing.assert_allclose(result.rows, alone.rows, rtol=2e-3, atol=2e-3)
    assert result.manifest.fingerprint == alone.manifest.fingerprint


@pytest.mark.slow
@needs_namespaces
def test_a_killed_worker_and_a_killed_machine_lose_nothing(tmp_path):
    catalog, weights = job(tmp_path, num_things=75)
    output = tmp_path / "features"
    printed = run_in_namespace(KILLS, catalog, output, weights, f"timm:{TINY}", "kill")
    said = json.loads(printed.strip().splitlines()[-1])
    assert said == {"killed": ["worker", "machine"], "machines": 3, "computed": 300}
    check_whole(output, catalog, weights, tmp_path)


@pytest.mark.slow
@needs_namespaces
def test_through_a_client_connection(tmp_path):
    catalog, weights = job(tmp_path, num_things=4)
    run_in_namespace(KILLS, catalog, tmp_path / "features", weights, f"timm:{TINY}", "client")
    check_whole(tmp_path / "features", catalog, weights, tmp_path)


LOCAL = """
import sys
from pathlib import Path
from samething.features import features
catalog, output, weights, backbone = sys.argv[1:]
features(Path(catalog), output=Path(output), weights=Path(weights), backbone=backbone, batch_size=4,
         runtime="torch", cluster="local")
"""


@pytest.mark.slow
@needs_namespaces
def test_local(tmp_path):
    catalog, weights = job(tmp_path, num_things=4)
    run_in_namespace(LOCAL, catalog, tmp_path / "features", weights, f"timm:{TINY}")
    check_whole(tmp_path / "features", catalog, weights, tmp_path)


@pytest.mark.slow
def test_without_a_cluster_ray_is_not_imported(tmp_path):
    catalog, weights = job(tmp_path, num_things=2)
    code = LOCAL.replace(', cluster="local"', "") + "\nassert 'ray' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code, catalog, tmp_path / "features", weights, f"timm:{TINY}"],
        env=ENVIRONMENT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip


def test_without_ray_the_error_names_the_extra(tmp_path, monkeypatch):
    catalog, weights = job(tmp_path, num_things=1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'samething[cluster]'")):
        features(
            catalog, output=tmp_path / "features", weights=weights, backbone=f"timm:{TINY}", cluster="local"
        )
