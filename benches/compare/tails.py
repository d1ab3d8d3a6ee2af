"""Latencies of single loads while another client keeps the server busy. Exact percentiles of all samples.

The column "other server" is what the machine itself does to a load: the same work of the same client, but on another
server process, while the server that is loaded from has nothing else to do.
"""
import shutil

from . import data
from .harness import run_on

OTHER = ", other server"
ENOUGH, PACKS = 2000, 10
WORK = ("idle", "during a commit of 100 MB", "during a blob upload", "during pack")


def run(bench):
    objects = bench.size(20_000, 200_000)
    source = data.database(bench.data_dir, objects)
    first = data.first_leaf(objects)
    seconds = bench.size(2, 6)
    megabytes = bench.size(10, 100)
    rounds = min(3, bench.rounds)

    def activity(work):
        return {
            WORK[1]: ("latency.commit_bytes", {"megabytes": megabytes, "seconds": seconds}),
            WORK[2]: ("blobs.upload", {"size": bench.size(16, 256, 1024) << 20, "seconds": seconds}),
            WORK[3]: ("latency.pack", {}),
        }[work]

    for work in WORK:
        if bench.chosen and work.split()[-1] not in bench.chosen:
            continue

        def samples(client, server):
            kind = server.removesuffix(OTHER)
            target = worked = bench.server(kind, source)
            if server != kind:
                worked = bench.server(kind, source)
            directory = bench.directory("tails")
            try:
                sampler = ("latency.sample", {"first": first, "objects": objects, "seconds": seconds})
                if work == WORK[0]:
                    report, = run_on(bench.workers(client, 1), target.addr, [sampler])
                    return [duration for _, duration in report["samples"]]
                name, arguments = activity(work)
                ends = {"stop": f"{directory}/stop"}
                sampler[1].update(ends, seconds=120)
                arguments = dict(arguments, **ends)
                if name == "blobs.upload":
                    arguments["directory"] = directory
                report, other = run_on(bench.workers(client, 2), (target.addr, worked.addr), [sampler, (name, arguments)],
                                       timeout=300)
                return [duration for begin, duration in report["samples"]
                        if any(a <= begin + duration and begin <= b for a, b in other["intervals"])]
            finally:
                bench.discard({target, worked})
                shutil.rmtree(directory, ignore_errors=True)

        def measure(client, server):
            times = samples(client, server)
            # A pack may be over after a few hundred loads, of which the 99th percentile says little.
            for _ in range(PACKS if work == WORK[3] else 0):
                if len(times) >= ENOUGH:
                    break
                times += samples(client, server)
            times.sort()
            if not times:
                return {"samples": 0}
            at = {name: times[min(len(times) - 1, int(len(times) * part))] / 1e3
                  for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))}
            return {**at, "max": times[-1] / 1e3, "samples": len(times)}
        idle = work == WORK[0]
        pairs = bench.pairs()
        if not idle and "rs" in bench.options.kinds:
            pairs.append(("rs", "rs" + OTHER))
        bench.alternate("tails", f"load {work}", {**dict.fromkeys(("p50", "p99", "p99.9", "max"), "us"), "samples": ""},
                        measure, pairs, rounds=rounds, limit={"p50": lambda: bench.limits.roundtrip() * 1e6} if idle else None,
                        target={} if idle else {"p99": "<= 3x idle p99"})
