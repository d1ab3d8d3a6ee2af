"""Command line of the benchmark; `scripts/bench --help` shows it."""
import argparse
import importlib
import os
import signal
import sys
import time
import traceback

from . import report
from .harness import KINDS, ROOT, Bench, Failed
from .limits import Limits
from .peers import PEERS

FAMILIES = ("loads", "commits", "sync", "blobs", "tails", "startup", "filestorage", "shootout")
ALL = KINDS + tuple(client for client, _ in PEERS)


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measures zeo-rs beside ZEO 6.2, A B A B ...")
    parser.add_argument("--only", action="append", metavar="NAME", default=[],
                        help=f"families ({', '.join(FAMILIES)}) or FAMILY.FUNCTION; may be given again")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement (default 5; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("--large", action="store_true", help="10 M objects, 1 GB blobs")
    parser.add_argument("--kinds", default=",".join(ALL), help="what is measured, zeo-rs and its peers (default %(default)s)")
    parser.add_argument("--data", default=os.path.join(ROOT, "target", "bench-data"),
                        help="where generated databases are kept and servers work (default %(default)s)")
    parser.add_argument("--out", help="where tables and plots are written (default docs/benchmarks, or target/bench-out"
                        " with --quick or --only)")
    parser.add_argument("--note", default="", help="a sentence about this run, for the head of the tables")
    parser.add_argument("--update", action="store_true", help="keep what results.json in DIR has and replace what is measured anew")
    options = parser.parse_args()
    options.kinds = options.kinds.split(",")
    if unknown := set(options.kinds) - set(ALL):
        parser.error(f"no kind {', '.join(unknown)}; there are {', '.join(ALL)}")
    for name in options.only:
        if name.split(".")[0] not in FAMILIES:
            parser.error(f"no family {name}; there are {', '.join(FAMILIES)}")
    if options.out is None:
        partial = options.quick or options.only
        options.out = os.path.join(ROOT, "target", "bench-out") if partial else os.path.join(ROOT, "docs", "benchmarks")
    os.makedirs(options.data, exist_ok=True)
    return options


def main():
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench, env = Bench(options), report.environment(options)
    started = time.monotonic()
    try:
        bench.limits = Limits(options.data)
        for name in FAMILIES:
            chosen = [n for n in options.only if n.split(".")[0] == name]
            if options.only and not chosen:
                continue
            print(f"{name}:", flush=True)
            bench.chosen = {n.split(".")[1] for n in chosen if "." in n} if name not in chosen else set()
            try:
                importlib.import_module(f"compare.{name}").run(bench)
            except Exception as exc:                          # what has been measured so far is worth writing
                if not isinstance(exc, Failed):
                    traceback.print_exc()
                bench.broken = True
                print(f"  {name} broken off: {exc}", flush=True)
    finally:
        bench.close()
        if bench.results:
            text = report.write(options.out, env, bench.results, options.update)
            print(f"\n{text}\n{time.monotonic() - started:.0f} s; written to {options.out}")
    sys.exit(1 if bench.broken else 0)


if __name__ == "__main__":
    main()
