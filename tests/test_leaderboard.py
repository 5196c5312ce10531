"""Published results stand beside own ones of the same protocol, and of no other."""

import json

import numpy as np
import pytest

from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError
from samething.evaluation import compare_embeddings, evaluate_embeddings
from samething.files import write_json
from samething.leaderboard import BOARDS, leaderboard
from scenes import printed


def images(folder, domains=("cars", "toys"), copies=2):
    rows = [
        {
            "image": f"{n}.jpg",
            "label": f"l{n % 4}",
            "domain": domains[n % len(domains)],
            "role": "query+index",
        }
        for n in range(4 * len(domains) * copies)
    ]
    return Catalog.from_rows(rows, root=folder)


def embeddings(catalog):
    return np.random.default_rng(0).standard_normal((len(catalog), 8)).astype(np.float32)


@pytest.fixture
def results(tmp_path):
    """One file a protocol: several names by most, one embedding by uned's second."""
    catalog = images(tmp_path)
    rows = embeddings(catalog)
    files = {}
    for protocol in ("default", "guiec", "uned", "ilias", "metric-learning"):
        files[protocol] = tmp_path / f"{protocol}.json"
        compared = compare_embeddings(
            {"run": rows, "half": rows[:, :4]}, catalog, protocol=protocol, num_resamples=20
        )
        files[protocol].write_text(json.dumps(compared.to_json()))
    files["alone"] = tmp_path / "alone.json"
    alone = evaluate_embeddings(rows, catalog, protocol="uned", num_resamples=20)
    write_json(files["alone"], alone.to_json())
    return files


def test_own_results_are_under_their_protocol_only(results, tmp_path):
    board = leaderboard(*results.values(), json=tmp_path / "b.json")
    content = json.loads((tmp_path / "b.json").read_text())
    assert content == json.loads(json.dumps(board.to_json()))
    for protocol, names in (("guiec", 2), ("uned", 3), ("ilias", 2)):
        own = content["protocols"][protocol]["own"]
        assert len(own) == names
        assert {row["file"] for row in own} <= {str(results[protocol]), str(results["alone"])}
    assert len(content["not_listed"]) == 4  # two names of the default protocol, two of metric-learning
    assert all("default" in line or "metric-learning" in line for line in content["not_listed"])


def test_own_numbers_are_the_benchmarks_number(results):
    board = leaderboard(*results.values())
    source = {name: json.loads(file.read_text()) for name, file in results.items()}
    by = {name: {row.system: row for row in rows} for name, rows in board.own.items()}
    assert by["guiec"]["run"].score == source["guiec"]["run"]["composite"]["mmp@5"]
    assert list(by["guiec"]["run"].interval) == source["guiec"]["run"]["composite"]["intervals"]["mmp@5"]
    assert by["uned"]["run"].score == source["uned"]["run"]["rounded"]["merged"]["mean"]["r@1"]
    assert by["ilias"]["half"].score == source["ilias"]["half"]["merged"]["mean"]["map@1000"]
    assert by["ilias"]["half"].dimension == 4
    assert by["uned"]["alone"].interval is None and by["uned"]["alone"].dimension is None
    assert not any(row.is_of_the_benchmark for rows in board.own.values() for row in rows)


def test_the_benchmarks_queries_are_known_by_their_numbers(tmp_path):
    counts = BOARDS["uned"].query_counts
    merged = {d: {"num_queries": n, "num_queries_without_positive": 0, "r@1": 0.5} for d, n in counts.items()}
    merged["mean"] = {"num_queries": sum(counts.values()), "num_queries_without_positive": 0, "r@1": 0.5}
    (tmp_path / "r.json").write_text(json.dumps({"protocol": "uned", "merged": merged}))
    assert leaderboard(tmp_path / "r.json").own["uned"][0].is_of_the_benchmark
    merged["sop"] = {**merged["sop"], "num_queries": 60_000}
    (tmp_path / "r.json").write_text(json.dumps({"protocol": "uned", "merged": merged}))
    assert not leaderboard(tmp_path / "r.json").own["uned"][0].is_of_the_benchmark


def test_every_published_number_is_shown_with_its_source():
    text = " ".join(printed(leaderboard()).split())
    for board in BOARDS.values():
        for row in board.published:
            assert row.system in text and f"{100 * row.score:.1f}" in text and row.source in text
    assert "SigLIP2-L@512 adapted, 512-d 37.3" in text and "the paper's system" in text


def test_one_protocol_is_shown_and_what_is_not_is_named(results):
    board = leaderboard(*results.values(), protocol=("ilias",))
    text = printed(board)
    assert "SigLIP2" in text and "TIPS" not in text and "1st place" not in text
    assert "run of " in text and "belongs to uned, which is not shown" in text


def test_domains_the_challenge_does_not_know_give_no_number(tmp_path):
    catalog = images(tmp_path, domains=("weather",))
    file = tmp_path / "r.json"
    measured = compare_embeddings({"x": embeddings(catalog)}, catalog, protocol="guiec", num_resamples=5)
    file.write_text(json.dumps(measured.to_json()))
    board = leaderboard(file)
    assert board.own["guiec"] == [] and "has no mmp@5 of guiec" in board.not_listed[0]


@pytest.mark.parametrize(
    "content", [[], {}, {"x": 1}, {"merged": {}}, {"merged": {"mean": 3}}, {"a": {"b": {}}}]
)
def test_files_of_something_else_are_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="holds no results"):
        leaderboard(tmp_path / "r.json")
    with pytest.raises(ArtefactError):
        leaderboard(tmp_path / "gone.json")
