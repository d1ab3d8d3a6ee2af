"""zodbshootout's operations, with one and with two processes: ZEO, zeo-rs, RelStorage on PostgreSQL, ZODB's FileStorage in-process."""
import statistics

from . import data

OPERATIONS = {
    "add": "add {} objects", "store": "store {} raw pickles", "update": "update {} objects", "conflicts": "update {} conflicting objects",
    "cold": "read {} cold objects", "cold_prefetch": "read {} cold prefetched objects", "write_read": "write/read {} objects",
    "hot": "read {} hot objects", "steamin": "read {} steamin objects", "read_current": "readCurrent {} objects",
    "empty": "empty explicit commit", "tpc": "tpc", "new_oids": "allocate {} OIDs",
}


def run(bench):
    servers = bench.all(data.database(bench.data_dir, 20_000))
    objects, workers = bench.size(100, 1000), (1, 2)
    try:
        for client, server in bench.pairs() + bench.peers(servers):
            bench.run(client, servers[server], [("shootout.prepare", {"objects": objects, "workers": max(workers)})])
        for processes in workers:
            for operation, title in OPERATIONS.items():
                if not bench.chosen or operation in bench.chosen:
                    operate(bench, servers, operation, title.format(objects), objects, processes)
    finally:
        bench.discard(servers)


def operate(bench, servers, operation, title, objects, processes):
    def measure(client, server):
        jobs = [("shootout.operate", {"operation": operation, "objects": objects, "worker": number, "loops": bench.size(3, 10)})
                for number in range(processes)]
        return statistics.mean(report["ns"] for report in bench.run(client, servers[server], jobs)) / 1e6
    bench.alternate("zodbshootout", f"{title}, {processes} process{'es' * (processes > 1)}", "ms", measure,
                    bench.pairs() + bench.peers(servers, shared=processes > 1))
