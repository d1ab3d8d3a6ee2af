"""`zeo-rs dump DATA.FS`: the lines of ZODB's fsdump."""

import os
import sys

from zeo_rs import _zeo
from zeo_rs.cli import fail


def arguments(parser):
    parser.add_argument("path", metavar="DATA.FS")


def run(args):
    out = sys.stdout
    try:
        _zeo.dump_file(args.path, out.write)
        out.flush()
    except BrokenPipeError:
        # whoever reads has seen enough; Python must not complain about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        out.flush()
        return fail(error, 1)
    return 0
