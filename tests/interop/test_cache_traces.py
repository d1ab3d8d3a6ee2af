"""Traces of caches: recorded from a running application with either client, played against our cache and ZEO's."""

import contextlib
import functools
import gzip
import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import ZEO.cache
import ZEO.scripts.cache_stats
from peers import Server
from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64, z64

from zeo_rs import _zeo
from zeo_rs.cli import main
from zeo_rs.clientstorage import ClientStorage

TRACES = sorted((Path(__file__).parents[1] / "fixtures" / "traces").glob("*.gz"))
KB = 1 << 10
SIZES = (128 * KB, 256 * KB, 512 * KB, 1024 * KB)
HEAD = struct.Struct(">IIH8s8s")


def by_name(path):
    return path.name.split(".")[0]


def content(path):
    return gzip.decompress(path.read_bytes())


def records(trace):
    at = 0
    while at < len(trace):
        _, what, length, tid, end = HEAD.unpack_from(trace, at)
        at += HEAD.size
        yield what & 0x7E, what >> 8, trace[at : at + length], tid, end
        at += length


@functools.cache
def play_with_zeo(trace, size):
    """Hits of ZEO's real cache."""
    cache, hits = ZEO.cache.ClientCache(None, size), 0
    cache._trace = lambda *args, **kw: None
    with contextlib.closing(cache):
        for code, length, oid, tid, _end in records(trace):
            if code in (0x20, 0x22):
                if cache.load(oid) is not None:
                    hits += 1
                elif code == 0x22:
                    cache.store(oid, tid, None, b"x" * length)
            elif code == 0x52 and cache.load(oid) is None:
                cache.store(oid, tid, None, b"x" * length)
            elif code & 0x70 == 0x10:
                cache.invalidate(oid, tid if tid != z64 else None)
    return hits


def test_there_are_traces_of_both_clients():
    assert {by_name(path) for path in TRACES} == {"crawl-rust", "crawl-zeo", "site-rust", "site-zeo"}


@pytest.mark.parametrize("path", TRACES, ids=by_name)
def test_more_hits_than_zeo_at_every_size(path):
    trace = content(path)
    loads = sum(code & 0x70 == 0x20 for code, *_ in records(trace))
    for size in SIZES:
        ours = _zeo.simulate_cache(trace, size, False)
        assert ours["loads"] == loads
        assert ours["hits"] > play_with_zeo(trace, size), size
    # where all but the last objects fit, ours pays for counting all of its overhead (160 bytes an object, ZEO counts 43)
    almost = 1536 * KB
    assert _zeo.simulate_cache(trace, almost, False)["hits"] > 0.999 * play_with_zeo(trace, almost)
    enough = 16 << 20
    assert _zeo.simulate_cache(trace, enough, False)["hits"] == _zeo.simulate_cache(trace, enough, True)["hits"]


@pytest.mark.parametrize("path", TRACES, ids=by_name)
def test_the_model_of_zeos_cache_is_its_cache(path):
    trace = content(path)
    for size in SIZES:
        model, real = _zeo.simulate_cache(trace, size, True), play_with_zeo(trace, size)
        assert abs(model["hits"] - real) < 0.01 * model["loads"], (size, model, real)


@pytest.mark.parametrize("path", TRACES, ids=by_name)
def test_zeos_cache_stats_and_ours_agree(path, capsys):
    assert not ZEO.scripts.cache_stats.main([str(path)])
    theirs = capsys.readouterr().out
    assert main(["cache-stats", str(path)]) == 0
    ours = capsys.readouterr().out
    assert main(["cache-stats", "--json", str(path)]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert f"Hit rate:   {100 * seen['hits'] / seen['loads']:.1f}%" in theirs
    assert f"Read {seen['records']:,} trace records" in theirs
    for code, count in seen["codes"].items():
        assert f"{count:>13,}  {code} " in theirs
        assert f"{count:>15}  {code} " in ours


def test_cache_simul(capsys):
    path = next(path for path in TRACES if by_name(path) == "crawl-rust")
    assert main(["cache-simul", str(path), "-s", "512KB", "-s", "1"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3 and table[1].split()[0] == "524,288" and table[2].split()[0] == "1,048,576"
    assert main(["cache-simul", str(path), "-s", "512KB", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["ours"]["hits"] > one["zeo"]["hits"] > 1000
    assert main(["cache-simul", str(path), "-s", "nothing"]) == 2
    assert main(["cache-simul", str(Path(__file__))]) == 2
    assert main(["cache-stats", str(Path(__file__))]) == 2
    assert "no trace" in capsys.readouterr().err


def commit(storage, oid, serial, data):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.store(oid, serial, data, "", txn)
    storage.tpc_vote(txn)
    return storage.tpc_finish(txn)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_every_use_is_traced(how, tmp_path, monkeypatch):
    options = {"cache": str(tmp_path / "cache")}
    trace = tmp_path / "cache.trace"
    if how == "argument":
        options = {"cache_trace": str(trace)}
    else:
        monkeypatch.setenv("ZEO_CACHE_TRACE", "1")
    one, two = p64(1), p64(2)
    with Server("rust", blobs=False) as server:
        with contextlib.closing(ClientStorage(server.address)) as other:
            old = commit(other, one, z64, b"one")
            commit(other, two, z64, b"two" * 100)
            with contextlib.closing(ClientStorage(server.address, **options)) as storage:
                before = p64(2**63)
                for oid in (one, two, one):
                    storage.loadBefore(oid, before)
                new = commit(storage, one, old, b"newer")
                storage.loadBefore(one, before)
                storage.loadBefore(one, new)
    seen = [(code, oid, length, tid, end) for code, length, oid, tid, end in records(trace.read_bytes())]
    two_tid = seen[4][3]
    assert seen == [
        (0x00, b"", 0, z64, z64),
        (0x20, one, 0, z64, z64),
        (0x52, one, 3, old, z64),
        (0x20, two, 0, z64, z64),
        (0x52, two, 300, two_tid, z64),
        (0x22, one, 3, old, z64),
        (0x1C, one, 0, new, z64),
        (0x52, one, 5, new, z64),
        (0x22, one, 5, new, z64),
        (0x26, one, 3, old, new),
    ]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["cache-stats", str(trace)]) == 0
    assert "60.0% of 5 loads" in out.getvalue()


def test_a_cut_trace_is_read_up_to_there(tmp_path):
    trace = content(TRACES[0])
    whole = _zeo.trace_stats(trace, 60)
    for cut in (len(trace) - 1, len(trace) // 2, 30, 26):
        seen = _zeo.trace_stats(trace[:cut], 60)
        assert 0 < seen["records"] < whole["records"]
    for not_one in (b"", b"\0" * 100, b"ZEC3" + bytes(100), b"hello" * 20):
        assert _zeo.trace_stats(not_one, 60) is None


def test_a_cache_object_is_refused_and_says_what_to_pass():
    with contextlib.closing(ZEO.cache.ClientCache(None, 1 << 20)) as cache:
        with pytest.raises(TypeError, match="pass the path of a file .* cache_size"):
            ClientStorage(("127.0.0.1", 1), cache=cache, wait=False)


def test_the_commands_run_as_programs(tmp_path):
    for command in ("cache-stats", "cache-simul"):
        done = subprocess.run(
            [sys.executable, "-m", "zeo_rs.cli", command, str(TRACES[0])], capture_output=True, check=True, timeout=60
        )
        assert done.stdout
