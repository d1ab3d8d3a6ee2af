"""`python -m zeo_rs.runzeo`: `zeo-rs serve` under the name and with the options of ZEO's runzeo."""

import argparse
import sys

from zeo_rs._zeo import __version__
from zeo_rs.cli import serve


def main(argv=None):
    parser = argparse.ArgumentParser(prog="runzeo", description="Run a server.")
    parser.add_argument("--version", action="version", version=f"zeo-rs {__version__}")
    serve.arguments(parser)
    return serve.run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
