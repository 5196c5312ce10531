"""The contract of the index against a real Milvus server, and what a killed server remembers.

The server opens its ports on all interfaces, so it lives in a network namespace of its own, and so do the
tests that ask it. That takes Linux, root and the package ``milvus``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from line import ENVIRONMENT, ROOT
from samething.errors import ArtefactError, InputError
from samething.index.milvus import MilvusPlace
from samething.search import index
from scenes import write_things

PORT = 29530

INSIDE = """
set -e
ip link set lo up
start() { "$SERVER" --data "$DATA" --proxy-port PORT > "$DATA.log" 2>&1 & server=$!; }
wait_for() {
  for i in $(seq 120); do
    "$PYTHON" -c 'import socket; socket.create_connection(("127.0.0.1", PORT), 1)' 2>/dev/null && break
    sleep 1
  done
  sleep 2
}
start; wait_for
set +e
"$PYTHON" -m pytest -q -p no:cacheprovider tests/test_index.py -k "milvus and not lite"
contract=$?
"$PYTHON" -c "$BEFORE" || contract=1
pkill -9 -P $server; kill -9 $server; wait $server 2>/dev/null
start; wait_for
"$PYTHON" -c "$AFTER" || contract=1
pkill -9 -P $server; kill -9 $server
exit $contract
""".replace("PORT", str(PORT))

BEFORE = f"""
import numpy as np
from samething.index import create_index
vectors = np.eye(64, dtype=np.float32)
index = create_index("milvus://127.0.0.1:{PORT}/killed", dim=64, model_fingerprint="f", model_name="m")
for start in range(0, 64, 8):
    index.add(vectors[start : start + 8], [{{"id": f"r{{row}}"}} for row in range(start, start + 8)])
index.delete(["r63"])
"""
AFTER = f"""
import time
from samething.errors import ArtefactError
from samething.index import open_index
for attempt in range(60):
    try:
        index = open_index("milvus://127.0.0.1:{PORT}/killed")
        found = index.verify()
        break
    except ArtefactError:
        time.sleep(1)
assert (found.num_rows, found.problems) == (63, ()), found
"""


@pytest.mark.slow
def test_a_real_server_keeps_the_contract_and_what_it_acknowledged(tmp_path: Path) -> None:
    server = Path(sys.executable).with_name("milvus-server")
    if not server.exists() or not shutil.which("unshare") or os.geteuid() != 0:
        pytest.skip("needs Linux, root and: pip install milvus==2.3.5")
    (tmp_path / "data").mkdir()
    done = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--kill-child", "bash", "-c", INSIDE],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={
            **os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHON": sys.executable, "SERVER": str(server),
            "DATA": str(tmp_path / "data"), "SAMETHING_TEST_MILVUS": f"127.0.0.1:{PORT}",
            "BEFORE": BEFORE, "AFTER": AFTER,
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("location", "uri", "collection"),
    [
        ("milvus://box/things", "http://box:19530", "things"),
        ("milvus://u:p%40@box:1/db/things?index=hnsw&ef=64&tls=1", "https://box:1", "things"),
        ("milvus-lite:///tmp/a.db/things", "/tmp/a.db", "things"),
        ("milvus-lite://a b.db/things", "a b.db", "things"),
    ],
)
def test_places(location: str, uri: str, collection: str) -> None:
    place = MilvusPlace.of(location)
    assert (place.uri, place.collection) == (uri, collection)


def test_a_password_is_never_shown() -> None:
    with pytest.raises(InputError) as error:
        MilvusPlace.of("milvus://me:secret@box/a-b")
    assert "secret" not in str(error.value)
    place = MilvusPlace.of("milvus://me:p%40ss@box/db/a?index=hnsw&ef=64")
    assert (place.token, place.database, place.index, place.ef) == ("me:p@ss", "db", "hnsw", 64)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ArtefactError, match="no Milvus at"):
        MilvusPlace.of("milvus://127.0.0.1:9/a").connect()


LOADER = """
import os, signal, sys
from pathlib import Path
from samething.index import MilvusIndex
from samething.search import index, storing
storing._ROWS_A_WRITE = 4
num_batches, amend = 0, MilvusIndex.amend
def killed_after_two(self, *arguments, **options):
    global num_batches
    amend(self, *arguments, **options)
    num_batches += 1
    if num_batches == 2:
        os.kill(os.getpid(), signal.SIGKILL)
MilvusIndex.amend = killed_after_two
index(Path(sys.argv[1]), model=sys.argv[2], output=sys.argv[3])
"""


def test_an_interrupted_load_goes_on_after_what_was_acknowledged(line: Path, tmp_path: Path) -> None:
    images = write_things(tmp_path / "images", num_things=4)
    location = f"milvus-lite://{tmp_path}/lite.db/things"
    arguments = [sys.executable, "-c", LOADER, str(images), str(line / "model"), location]
    killed = subprocess.run(
        arguments, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -9, killed.stderr[-2000:]
    resumed = index(images, model=line / "model", output=location)
    plain = index(images, model=line / "model", output=tmp_path / "plain")
    assert plain.num_added == 16 and (resumed.num_added, resumed.num_kept) == (8, 8)
    paths = {row["id"]: row["path"] for batch in plain.index.items(["path"]) for row in batch.to_pylist()}
    ids = sorted(paths)
    assert sorted(row["id"] for batch in resumed.index.items([]) for row in batch.to_pylist()) == ids
    expected = plain.embedder.embed([paths[name] for name in ids])  # kept as they are, not in codes
    np.testing.assert_allclose(resumed.index.vectors(ids), expected, atol=1e-5)
    assert resumed.index.verify().problems == ()
