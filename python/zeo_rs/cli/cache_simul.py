"""`zeo-rs cache-simul TRACE`: the hit rates that caches of other sizes would have had, ours and ZEO's.

Ours is the cache itself, with all its overhead counted; ZEO's is a model of its ring file. A trace that began with a full
cache tells too little about its beginning.
"""

import gzip
import json

from zeo_rs import _zeo
from zeo_rs.cli import fail, traces


def arguments(parser):
    add = parser.add_argument
    add("trace", metavar="TRACE", help="written with cache_trace= or ZEO_CACHE_TRACE, also in .gz")
    add("-s", "--size", action="append", metavar="SIZE", help="megabytes, or 512KB, 20MB, 1GB; repeated; 1 to 256 MB else")
    add("--json", action="store_true", help="one object a line")


def run(args):
    try:
        sizes = [traces.size(text) for text in args.size or ("1", "4", "20", "64", "256")]
        trace = traces.read(args.trace)
    except ValueError as error:
        return fail(error)
    except (OSError, EOFError, gzip.zlib.error) as error:
        return fail(error)
    if _zeo.trace_stats(trace, 1 << 30) is None:
        return fail(f"{args.trace} is no trace of a cache")
    if not args.json:
        print(f"{'cache size':>14} {'loads':>12} {'hits':>12} {'hit rate':>9} {'hits of ZEO':>12} {'hit rate':>9}")
    for size in sizes:
        ours, zeo = (_zeo.simulate_cache(trace, size, policy) for policy in (False, True))
        if args.json:
            print(json.dumps({"size": size, "ours": ours, "zeo": zeo}))
            continue
        print(
            f"{size:14,} {ours['loads']:12,} {ours['hits']:12,} {ours['hit_rate']:8.2f}%"
            f" {zeo['hits']:12,} {zeo['hit_rate']:8.2f}%"
        )
    return 0
