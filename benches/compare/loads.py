"""Loads: cold with 1-16 processes and 1-8 threads, cache hits, prefetch, an application; CPU and memory they cost.

Of the rows that do not say otherwise, every object comes from the server: our clients share no cache (`shared-cache-size 0`).
"""
import statistics

from . import data
from .harness import cpu_seconds, memory, run_on, throughput


def run(bench):
    objects = bench.size(20_000, 200_000)
    source = data.database(bench.data_dir, objects)
    first = data.first_leaf(objects)
    servers = bench.all(source, shared_cache=False)
    try:
        for step in bench.steps(cold_one, cold_processes, cold_threads, hits, prefetch, application, client_memory):
            step(bench, servers, first)
    finally:
        bench.discard(servers)
    for step in bench.steps(cold_unix, shared):
        step(bench, source, first)


def cold_one(bench, servers, first):
    """One client, one thread; with the CPU that server and client spend on a load."""
    count = bench.size(2000, 8000)

    def measure(client, server):
        worker = bench.workers(client, 1)[0].pid
        clocks = servers[server].cpu, lambda: cpu_seconds(worker)
        job = [("loads.cold", {"first": first, "count": count})]
        before = []
        reports = bench.run(client, servers[server], job, during=lambda: before.extend(clock() for clock in clocks))
        spent = [clock() - b for clock, b in zip(clocks, before)]
        report = reports[0]
        return {"": (report["end"] - report["begin"]) / report["count"] / 1e3,
                "server CPU": spent[0] / report["count"] * 1e6, "client CPU": spent[1] / report["count"] * 1e6}
    bench.alternate("loads", "cold load, 1 process", "us", measure, bench.pairs(mixed=True) + bench.peers(servers),
                    limit={"": lambda: bench.limits.roundtrip() * 1e6,
                           "server CPU": lambda: bench.limits.peer_cpu(1) * 1e6},
                    target={"": ">= 8x; <= 3x limit"}, note="CPU includes closing the client; its limit: the echo process of the round trips")


def _apart(first, count, processes):
    """Jobs that load different objects."""
    return [("loads.cold", {"first": first + i * count, "count": count, "seed": i}) for i in range(processes)]


def _rate(bench, client, server, jobs):
    """Loads a second of all jobs together, and the server's CPU time for each."""
    before = []
    reports = bench.run(client, server, jobs, during=lambda: before.append(server.cpu()))
    total = sum(r["count"] for r in reports)
    return {"": throughput(reports), "server CPU": (server.cpu() - before[0]) / total * 1e6}


def cold_processes(bench, servers, first):
    for processes in (1, 4, 8, 16):
        count = bench.size(1000, 4000)

        def measure(client, server):
            return _rate(bench, client, servers[server], _apart(first, count, processes))
        bench.alternate("loads", f"cold loads, {processes} process{'es' * (processes > 1)}", {"": "1/s", "server CPU": "us/load"}, measure,
                        bench.pairs(mixed=processes == 8) + bench.peers(servers, shared=processes > 1), better={"": "higher"},
                        limit={"": lambda: bench.limits.roundtrips_per_second(processes),
                               "server CPU": lambda: bench.limits.peer_cpu(processes) * 1e6},
                        target={"": ">= 10x", "server CPU": "<= 1/10"} if processes == 8 else "")


def cold_threads(bench, servers, first):
    count = bench.size(2000, 16000)
    for threads in (8,):
        def measure(client, server):
            return throughput(bench.run(client, servers[server],
                                        [("loads.cold", {"first": first, "count": count, "threads": threads})]))
        bench.alternate("loads", f"cold loads, 1 process with {threads} threads", "1/s", measure,
                        bench.pairs() + bench.peers(servers), better="higher", limit=lambda: bench.limits.roundtrips_per_second(threads), target=">= 10x")


def cold_unix(bench, source, first):
    """Both told to use a Unix socket, which zeo-rs does by itself on one machine."""
    servers = bench.both(source, unix=True, shared_cache=False)
    try:
        for name, processes, threads in (("8 processes", 8, 1), ("1 process with 8 threads", 1, 8)):
            count = bench.size(1000, 4000 if processes > 1 else 16000)

            def measure(client, server):
                jobs = [("loads.cold", {"first": first + i * count, "count": count, "seed": i, "threads": threads}) for i in range(processes)]
                return throughput(bench.run(client, servers[server], jobs))
            bench.alternate("loads", f"cold loads, {name}, Unix socket configured", "1/s", measure, bench.pairs(), better="higher")
    finally:
        bench.discard(servers)


def shared(bench, source, first):
    """As zeo-rs comes: clients of one machine find what another one has loaded."""
    servers = bench.both(source)
    try:
        loaded_together(bench, servers, first)
        loaded_before(bench, servers, first)
    finally:
        bench.discard(servers)


def loaded_together(bench, servers, first):
    """A site starts: all processes load the same objects, each in its own order, and nobody has loaded them before."""
    count, processes = bench.size(500, 8000), 8
    fresh = {}

    def measure(client, server):
        start = fresh[client, server] = fresh.get((client, server), first - count) + count
        return _rate(bench, client, servers[server], [("loads.cold", {"first": start, "count": count, "seed": i}) for i in range(processes)])
    bench.alternate("loads", f"{processes} processes load the same objects for the first time", {"": "1/s", "server CPU": "us/load"}, measure,
                    bench.pairs(), better={"": "higher"}, target={"": ">= 10x", "server CPU": "<= 1/10"})


def loaded_before(bench, servers, first):
    count = bench.size(1000, 4000)
    for client, server in bench.pairs():
        bench.run(client, servers[server], [("loads.cold", {"first": first, "count": 8 * count})])
    for processes in (1, 8):
        def measure(client, server):
            return _rate(bench, client, servers[server], _apart(first, count, processes))
        bench.alternate("loads", f"{processes} process{'es' * (processes > 1)} loading what another client has loaded",
                        {"": "1/s", "server CPU": "us/load"}, measure, bench.pairs(), better={"": "higher"})


def hits(bench, servers, first):
    count = bench.size(100_000, 1_000_000)
    for threads in (1, 4):
        def measure(client, server):
            report, = bench.run(client, servers[server], [("loads.hits", {
                "first": first, "objects": 2000, "count": count, "threads": threads})])
            return report["ns"]
        bench.alternate("loads", f"cache hit, {threads} thread{'s' * (threads > 1)}", "ns", measure, bench.pairs() + bench.peers(servers, shared=True),
                        limit=lambda: bench.limits.memcpy() * 1e9, target=">= 5x; <= 600 ns" if threads == 1 else "")


def prefetch(bench, servers, first):
    def measure(client, server):
        report, = bench.run(client, servers[server], [("loads.prefetch", {"first": first, "count": 10_000})])
        return (report["end"] - report["begin"]) / 1e6
    bench.alternate("loads", "prefetch 10 000, then load them", "ms", measure, bench.pairs(mixed=True),
                    limit=lambda: bench.limits.stream(10_000 * 300) * 1e3, target=">= 8x")


def application(bench, servers, first):
    def measure(client, server):
        report, = bench.run(client, servers[server], [("application.read", {"pages": 5, "count": 1000})])
        unpickle.append(report["unpickle_ns"] / 1e6)
        return (report["end"] - report["begin"]) / 1e6
    unpickle = []
    bench.alternate("loads", "application reads 1 000 cold objects", "ms", measure,
                    bench.pairs(mixed=True) + bench.peers(servers),
                    target=">= 4x")
    if unpickle:
        result = bench.results[-1]
        result["limit"] = statistics.median(unpickle) + statistics.median(bench.limits.roundtrip() for _ in range(3)) * 1e6
        result["note"] = f"limit: {statistics.median(unpickle):.1f} ms of unpickling and 1 000 round trips"


def client_memory(bench, servers, first):
    """Private memory that a client takes for 20 000 cached objects, and the server's after serving them."""
    count = bench.size(5000, 20_000)

    def measure(client, server):
        worker = bench.fresh_worker(client)
        try:
            seen = {}
            job = [("latency.hold", {"first": first, "count": count})]
            run_on([worker], servers[server].addr, job,
                   during=lambda: seen.update(client=memory(worker.pid)[0]))
            return {"": seen["client"] / 1e6, "server": memory(servers[server].pid)[0] / 1e6}
        finally:
            worker.close()
    bench.alternate("loads", f"memory of a process with {count} cached objects", "MB", measure, bench.pairs(), rounds=1)
