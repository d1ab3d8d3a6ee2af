"""Commits: one, a hundred, ten thousand objects; 1-32 committers apart and in each other's way; conflicts."""
import statistics

from . import data
from .harness import throughput


def run(bench):
    objects = bench.size(20_000, 200_000)
    source = data.database(bench.data_dir, objects)
    first = data.first_leaf(objects)
    servers = bench.all(source)
    try:
        for step in bench.steps(one, bulk, committers, contended, conflicts):
            step(bench, servers, first)
    finally:
        bench.discard(servers)


def one(bench, servers, first):
    count = bench.size(100, 300)

    def measure(client, server):
        before = []
        report, = bench.run(client, servers[server], [("commits.one", {"count": count})],
                            during=lambda: before.append(servers[server].cpu()))
        times = report["times"]
        return {"": statistics.median(times) / 1e3, "p99": times[int(len(times) * 0.99)] / 1e3,
                "server CPU": (servers[server].cpu() - before[0]) / count * 1e6}
    limits = bench.limits
    bench.alternate("commits", "one-object commit", "us", measure, bench.pairs(mixed=True) + bench.peers(servers),
                    limit={"": lambda: (2 * limits.roundtrip() + limits.sync()) * 1e6},
                    target={"": ">= 3x; <= 1.5x limit"}, note="limit: two round trips and one fdatasync")


def bulk(bench, servers, first):
    for objects in (100, 10_000):
        def measure(client, server):
            report, = bench.run(client, servers[server], [("commits.bulk", {"objects": objects})])
            return (report["end"] - report["begin"]) / 1e6
        limits, size = bench.limits, objects * 300
        bench.alternate("commits", f"commit of {objects} objects", "ms", measure, bench.pairs(mixed=True) + bench.peers(servers),
                        limit=lambda: (limits.stream(size) + limits.roundtrip() + limits.sync(size)) * 1e3,
                        target=">= 6x" if objects == 10_000 else "",
                        note="limit: the bytes over loopback, one round trip, one write with fdatasync")


def committers(bench, servers, first):
    for processes in (1, 4, 8, 16, 32):
        count = bench.size(20, 100)

        def measure(client, server):
            jobs = [("commits.one", {"count": count})] * processes
            return throughput(bench.run(client, servers[server], jobs))
        bench.alternate("commits", f"{processes} committer{'s' * (processes > 1)}, disjoint", "1/s", measure,
                        bench.pairs(mixed=processes == 16) + bench.peers(servers, shared=processes > 1), better="higher", target=">= 15x" if processes == 16 else "",
                        limit=(lambda: 1 / bench.limits.sync()) if processes == 1 else None,
                        note="limit: one fdatasync after the other" if processes == 1 else "")


def contended(bench, servers, first):
    for processes in (2, 8, 32):
        count = bench.size(5, 20)

        def measure(client, server):
            jobs = [("commits.contended", {"oid": first, "count": count})] * processes
            reports = bench.run(client, servers[server], jobs)
            return {"": throughput(reports),
                    "conflicts per commit": sum(r["conflicts"] for r in reports) / sum(r["count"] for r in reports)}
        bench.alternate("commits", f"{processes} committers, same object", {"": "1/s"}, measure,
                        bench.pairs() + bench.peers(servers, shared=True), better={"": "higher"})


def conflicts(bench, servers, first):
    def measure(client, server):
        report, = bench.run(client, servers[server],
                            [("commits.conflicts", {"oid": first + 1, "count": bench.size(50, 200)})])
        return (report["end"] - report["begin"]) / report["count"] / 1e3
    bench.alternate("commits", "conflict, from tpc_begin to the error", "us", measure, bench.pairs(),
                    limit=lambda: bench.limits.roundtrip() * 1e6, note="limit: one round trip")
