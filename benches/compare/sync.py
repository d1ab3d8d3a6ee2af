"""Invalidations: fan-out to many clients, and coming back after 10 000 missed ones."""
import os
import shutil
import statistics

from . import data
from .harness import memory, run_on, throughput


def run(bench):
    objects = bench.size(20_000, 200_000)
    source = data.database(bench.data_dir, objects)
    first = data.first_leaf(objects)
    for step in bench.steps(fan_out, idle_connections, reconnect):
        servers = bench.both(source, queue=20_000)
        try:
            step(bench, servers, first)
        finally:
            bench.discard(servers)


def fan_out(bench, servers, first):
    count = bench.size(20, 100)
    for connections in (30, 300):
        def measure(client, server):
            workers = bench.workers(client, 1) + bench.workers("raw", 1)
            addr = servers[server].addr
            paced, heard = run_on(workers, addr, [
                ("sync.marked_commits", {"count": count, "pause": 0.02}),
                ("sync.subscribers", {"connections": connections, "commits": count})])
            delays = [heard["arrived"][tid] - begin for tid, begin in paced["started"].items()]
            hasty, heard = run_on(workers, addr, [
                ("sync.marked_commits", {"count": count, "pause": 0}),
                ("sync.subscribers", {"connections": connections, "commits": count})])
            return {"": statistics.median(delays) / 1e3, "commits": throughput([hasty])}
        bench.alternate("invalidations", f"commit until {connections} clients know of it", {"": "us", "commits": "1/s"},
                        measure, bench.pairs(), better={"commits": "higher"},
                        note="one-object commits; subscribers are raw sockets in one Python process, whose reading is included")


def idle_connections(bench, servers, first):
    count = bench.size(200, 1000)

    def measure(client, server):
        pid, seen = servers[server].pid, {}
        before = memory(pid)[0]
        run_on(bench.workers("raw", 1), servers[server].addr, [("sync.idle", {"connections": count})],
               during=lambda: seen.update(after=memory(pid)[0]))
        return (seen["after"] - before) / 1e6
    bench.alternate("invalidations", f"server memory of {count} idle connections", "MB", measure, bench.pairs(), rounds=1,
                    target="<= 50 MB of 1 000")


def reconnect(bench, servers, first):
    """A persistent cache is filled once, 10 000 objects are changed, and each round opens a copy of that cache."""
    cached, transactions, each = bench.size((2000, 100, 10), (20_000, 1000, 10))
    caches = {}
    for client, server in bench.pairs():
        var = bench.directory(f"cache-{client}")
        bench.run(client, servers[server], [("sync.fill", {"first": first, "count": cached, "var": var})])
        bench.run("zeo" if "zeo" in bench.options.kinds else client, servers[server], [
            ("sync.rewrite", {"first": first, "transactions": transactions, "each": each})])
        caches[client] = var

    def measure(client, server):
        var = os.path.join(bench.directory("reopened"), "cache")
        shutil.copytree(caches[client], var)
        report, = bench.run(client, servers[server], [("sync.reconnect", {
            "unchanged": first + transactions * each, "changed": first, "var": var})])
        return (report["end"] - report["begin"]) / 1e6
    bench.alternate("invalidations", f"open a cache of {cached} objects, {transactions * each} of them changed meanwhile",
                    "ms", measure, bench.pairs())
