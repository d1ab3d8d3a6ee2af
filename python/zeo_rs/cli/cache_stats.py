"""`zeo-rs cache-stats FILE`: what a cache file holds, or what a trace of a cache tells. Exit status 0, or 2 if it is neither.

The file may be in use. Traces are written with `ClientStorage(cache_trace=…)` or the environment variable ZEO_CACHE_TRACE, by
this client and by ZEO's.
"""

import gzip
import json
import time

from persistent.TimeStamp import TimeStamp

from zeo_rs import _zeo
from zeo_rs.cli import fail, traces

#: What the codes of a trace mean, in the words of this project.
MEANINGS = {
    0x00: "cache opened",
    0x10: "invalidated, was not there",
    0x1A: "invalidated, of a version",
    0x1C: "invalidated, kept as an old revision",
    0x1E: "invalidated, forgotten",
    0x20: "load, not there",
    0x22: "load, found",
    0x24: "load of an old revision, not there",
    0x26: "load of an old revision, found",
    0x50: "stored, of a version",
    0x52: "stored",
    0x54: "stored, an old revision",
}


def arguments(parser):
    add = parser.add_argument
    add("path", metavar="FILE", help="as given to ClientStorage with cache=, or made by client=; or a trace, also in .gz")
    add("--json", action="store_true", help="one object")
    add("-i", "--interval", type=float, default=15, metavar="MINUTES", help="of the lines about a trace (15)")


def run(args):
    try:
        stats = _zeo.cache_file_stats(args.path)
        if stats is not None:
            return file_stats(stats, args.json)
        seen = _zeo.trace_stats(traces.read(args.path), max(1, int(args.interval * 60)))
    except (OSError, EOFError, gzip.zlib.error) as error:
        return fail(error)
    if seen is None:
        return fail(f"{args.path} is no cache file of zeo_rs, and no trace of a cache")
    return trace_stats(seen, args.json)


def file_stats(stats, as_json):
    last = stats.pop("last_tid")
    if as_json:
        print(json.dumps({**stats, "last_tid": last.hex()}))
        return 0
    print(f"last transaction    {last.hex()}  {TimeStamp(last)} UTC")
    print("objects             {objects}".format(**stats))
    print("revisions           {revisions}, {current} of them current".format(**stats))
    print("data                {data_bytes} bytes, the largest {largest}".format(**stats))
    print("in memory           {cache_bytes} bytes".format(**stats))
    print("files               {file_bytes} bytes of index, {values_bytes} of values".format(**stats))
    if stats["whole_bytes"] < stats["file_bytes"]:
        print("                    the last {} are no whole record".format(stats["file_bytes"] - stats["whole_bytes"]))
    print("written since the files were made anew: {stores} revisions, {invalidations} invalidations".format(**stats))
    return 0


def rate(hits, loads):
    return f"{100 * hits / loads:.1f}%" if loads else "-"


def trace_stats(seen, as_json):
    codes = seen["codes"]
    loads = sum(count for code, count in codes.items() if code & 0x70 == 0x20)
    hits = codes.get(0x22, 0) + codes.get(0x26, 0)
    if as_json:
        print(json.dumps({**seen, "codes": {f"{code:02x}": n for code, n in codes.items()}, "loads": loads, "hits": hits}))
        return 0
    print(f"{'':31} {'loads':>9} {'hits':>9} {'inval.':>9} {'stores':>9} {'hit rate':>9}")
    for start, end, n, found, invalidations, stores in seen["intervals"]:
        when = f"{clock(start)} - {clock(end)[6:]}"
        print(f"{when:31} {n:9} {found:9} {invalidations:9} {stores:9} {rate(found, n):>9}")
    print()
    print(f"records             {seen['records']}, {clock(seen['first'])} to {clock(seen['last'])}")
    print(f"objects loaded      {seen['objects']}")
    average = seen["data_bytes"] // seen["data_records"] if seen["data_records"] else 0
    print(f"with data           {seen['data_records']}, {average} bytes on average")
    print(f"hit rate            {rate(hits, loads)} of {loads} loads")
    for code, count in sorted(codes.items()):
        print(f"{count:>15}  {code:02x}  {MEANINGS[code]}")
    return 0


def clock(second):
    return time.strftime("%m-%d %H:%M:%S", time.localtime(second))
