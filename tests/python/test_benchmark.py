"""The benchmark's arithmetic, its generated database, and one real measurement with ZEO on both sides."""
import importlib
import json
import os
import re
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "benches"))

from compare import data, report  # noqa: E402
from compare.harness import throughput  # noqa: E402


def result(better, zeo, rs, limit=None, unit="us"):
    return {"family": "f", "name": "n", "unit": unit, "better": better, "values": {"zeo/zeo": zeo, "rs/rs": rs},
            "errors": {}, "limit": limit, "target": "", "note": ""}


def test_ratio_above_one_is_better_in_both_directions():
    assert report.ratio(result("lower", [100, 90, 300], [10, 9, 30])) == 10
    assert report.ratio(result("higher", [10], [100], unit="1/s")) == 10
    assert report.ratio(result("lower", [100], [400])) == 0.25


def test_nothing_is_invented_where_a_side_failed():
    failed = result("lower", [100], [])
    assert report.ratio(failed) is None and report.distance(failed) is None
    failed["errors"] = {"rs/rs": "no such server"}
    del failed["values"]["rs/rs"]
    env = dict.fromkeys(("date", "commit", "cpu", "memory_gb", "kernel", "python"), "") | {"packages": {}, "load_before": 0}
    text = report.markdown(env, [failed, result("lower", [1], [1])])
    assert "failed" in text and "no such server" in text


def test_distance_from_the_limit():
    assert report.distance(result("lower", [100], [30], limit=10)) == 3
    assert report.distance(result("higher", [1], [50], limit=100, unit="1/s")) == 2


def test_an_update_replaces_by_name_and_keeps_families_together():
    def named(family, name, value):
        return dict(result("lower", [value], []), family=family, name=name)
    old = [named("a", "x", 1), named("b", "y", 2)]
    got = report.merged(old, [named("a", "z", 3), named("b", "y", 4)])
    assert [(r["family"], r["name"], r["values"]["zeo/zeo"]) for r in got] == [("a", "x", [1]), ("a", "z", [3]), ("b", "y", [4])]


def test_cell_shows_median_and_half_the_range():
    assert report.cell([90, 100, 130]) == "100 ±20%"
    assert report.cell([]) == "–"


def test_throughput_counts_from_first_start_to_last_end():
    reports = [{"begin": 0, "end": 10**9, "count": 10}, {"begin": 10**9, "end": 2 * 10**9, "count": 30}]
    assert throughput(reports) == 20


def test_generated_database_is_whole(tmp_path):
    from ZODB import DB
    from ZODB.FileStorage import FileStorage
    storage = FileStorage(data.database(str(tmp_path), 2500), read_only=True)
    db = DB(storage)
    with db.transaction() as connection:
        pages = connection.root()
        leaves = [leaf for page in pages.values() for leaf in page.values()]
        assert len(pages) == 3 and len(leaves) == 2500
        assert all(100 <= len(leaf["body"]) < 200 for leaf in leaves)
        sizes = {len(storage.load(leaf._p_oid)[0]) for leaf in leaves}
        assert 120 < min(sizes) and max(sizes) < 320
    assert len(storage) == 1 + 3 + 2500 + 250                 # with the garbage that pack has to find
    db.close()


@pytest.mark.timeout(300)
def test_a_whole_measurement_against_zeo(tmp_path):
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, "-m", "compare", "--quick", "--rounds", "1", "--kinds", "zeo", "--only", "loads.cold_one",
                    "--only", "commits.one", "--data", str(tmp_path), "--out", str(tmp_path / "out")],
                   env=dict(os.environ, PYTHONPATH=os.path.join(ROOT, "benches")), check=True, timeout=240)
    with open(tmp_path / "out" / "results.json") as f:
        results = json.load(f)["results"]
    assert not any(r["errors"] for r in results)
    load = next(r for r in results if r["name"] == "cold load, 1 process")
    assert load["values"]["zeo/zeo"][0] > load["limit"] > 1
    assert (tmp_path / "out" / "results.md").exists()


def test_every_job_that_a_family_names_exists():
    directory = os.path.join(ROOT, "benches", "compare")
    named = set()
    for name in os.listdir(directory):
        if name.endswith(".py"):
            with open(os.path.join(directory, name)) as f:
                named |= set(re.findall(r'\("((?:application|blobs|commits|latency|loads|sync)\.\w+)"', f.read()))
    assert len(named) > 10
    for name in named:
        family, function = name.split(".")
        assert callable(getattr(importlib.import_module(f"compare.jobs.{family}"), function)), name
