"""The command `zeo-rs`."""

import argparse
import os
import sys
from importlib import import_module

from zeo_rs._zeo import __version__

#: Subcommand: (module, one line of help). Modules have `arguments(parser)` and `run(args)`, which answers the exit status.
COMMANDS = {
    "serve": ("zeo_rs.cli.serve", "run a server"),
    "status": ("zeo_rs.cli.status", "ask a server how it is"),
    "pack": ("zeo_rs.cli.pack", "pack a Data.fs that no server has open, or a server's storage"),
    "copy": ("zeo_rs.cli.copy", "copy every transaction, with blobs, from one storage to another"),
    "check": ("zeo_rs.cli.check", "verify a Data.fs and its blobs"),
    "cache-stats": ("zeo_rs.cli.cache_stats", "say what a client's cache file holds, or what a trace of a cache tells"),
    "cache-simul": ("zeo_rs.cli.cache_simul", "play a trace against caches of other sizes"),
    "dump": ("zeo_rs.cli.dump", "list the transactions and records of a Data.fs"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="zeo-rs", description="ZEO, the client-server storage of ZODB, in Rust.")
    parser.add_argument("--version", action="version", version=f"zeo-rs {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if argv is None else argv
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        # the modules of the other commands are not needed, and some are slow to import
        if arguments[:1] == [name]:
            import_module(module).arguments(command)
    args = parser.parse_args(arguments)
    status = 0
    try:
        status = import_module(COMMANDS[args.command][0]).run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever reads has seen enough
        discard_output()
    except OSError as error:
        # of the output, most likely: a full disk
        discard_output()
        return fail(error)
    return status


def discard_output():
    """Nothing more is written to stdout: Python must not complain about that at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(text, status=2):
    """Says what is wrong; answers the exit status."""
    print(f"zeo-rs: {text}", file=sys.stderr)
    return status
