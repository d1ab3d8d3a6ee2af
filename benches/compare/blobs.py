"""Blobs: a large one up and down, many small ones; memory that they take on both sides."""
import os
import shutil
import time

from . import data
from .harness import forget_peak, memory, use_memory
from .jobs.blobs import write


def run(bench):
    source = data.database(bench.data_dir, bench.size(20_000, 200_000))
    servers = bench.both(source)
    try:
        for step in bench.steps(large, small):
            step(bench, servers)
    finally:
        bench.discard(servers)


def copy_seconds(bench, size):
    """`cp` of a file of that size, on the disk of the databases."""
    directory = bench.directory("cp")
    source = os.path.join(directory, "a")
    write(source, size)
    use_memory(directory, 2 * size)
    start = time.perf_counter()
    shutil.copyfile(source, source + ".copy")
    elapsed = time.perf_counter() - start
    shutil.rmtree(directory)
    return elapsed


def large(bench, servers):
    size = bench.size(16 << 20, 256 << 20, 1 << 30)
    stored = {}

    def up(client, server):
        pid, directory = servers[server].pid, bench.directory("up")
        use_memory(directory, 4 * size)
        forget_peak(pid)
        before = memory(pid)[0]
        report, = bench.run(client, servers[server], [("blobs.upload", {"size": size, "directory": directory})])
        shutil.rmtree(directory)
        stored[server] = {"oid": report["oid"], "tid": report["tid"]}
        return {"": (report["end"] - report["begin"]) / 1e6, "client memory": report["memory"] / 1e6,
                "server memory": (memory(pid)[1] - before) / 1e6}

    def down(client, server):
        pid = servers[server].pid
        use_memory(bench.work_dir, 3 * size)
        forget_peak(pid)
        before = memory(pid)[0]
        report, = bench.run(client, servers[server], [("blobs.download", {
            **stored[server], "directory": bench.directory("down"), "size": size})])
        return {"": (report["end"] - report["begin"]) / 1e6, "client memory": report["memory"] / 1e6,
                "server memory": (memory(pid)[1] - before) / 1e6}
    units = {"": "ms", "client memory": "MB", "server memory": "MB"}
    for way, measure in (("up", up), ("down", down)):
        bench.alternate("blobs", f"blob of {size >> 20} MiB {way}", units, measure, bench.pairs(mixed=True), limit={"": lambda: copy_seconds(bench, size) * 1e3},
                        target={"": ">= 1.5x; <= 2x limit"}, note="limit: cp of the same bytes; memory: growth at the peak",
                        rounds=min(3, bench.rounds))


def small(bench, servers):
    count = bench.size(50, 300)

    def measure(client, server):
        report, = bench.run(client, servers[server], [("blobs.small", {
            "size": 20_000, "count": count, "directory": bench.directory("small")})])
        return (report["end"] - report["begin"]) / report["count"] / 1e3
    bench.alternate("blobs", "download of a 20 kB blob", "us", measure, bench.pairs(),
                    limit=lambda: bench.limits.roundtrip(60, 20_100) * 1e6, note="limit: one round trip with the bytes")
