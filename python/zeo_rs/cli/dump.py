"""`zeo-rs dump DATA.FS`: the lines of ZODB's fsdump."""

import sys

from zeo_rs import _zeo
from zeo_rs.cli import discard_output, fail


def arguments(parser):
    parser.add_argument("path", metavar="DATA.FS")


def run(args):
    out = sys.stdout
    try:
        _zeo.dump_file(args.path, out.write)
        out.flush()
    except BrokenPipeError:
        # whoever reads has seen enough
        discard_output()
    except Exception as error:
        return fail(error, 1)
    return 0
