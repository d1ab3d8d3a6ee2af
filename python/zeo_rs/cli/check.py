"""`zeo-rs check DATA.FS`: exit status 0 = whole, 1 = errors found (with --strict also warnings), 2 = cannot be checked."""

import json

from zeo_rs import _zeo
from zeo_rs.cli import fail
from zeo_rs.cli.progress import Progress


def arguments(parser):
    add = parser.add_argument
    add("path", metavar="DATA.FS")
    add("--blob-dir", metavar="DIRECTORY", help="also check that every blob has its file")
    add("--no-references", action="store_true", help="do not look into the records")
    add("--strict", action="store_true", help="warnings, too, make the exit status 1: for a file that nobody writes to")
    add("--json", action="store_true", help="one object a line: the faults, then the summary")
    add("-q", "--quiet", action="store_true", help="no summary, no progress")


def run(args):
    progress = Progress(args.quiet or args.json)

    def fault(found):
        progress.end()
        if args.json:
            print(json.dumps({k: v.hex() if isinstance(v, bytes) else v for k, v in found.items()}))
        else:
            print(found["text"])

    try:
        seen = _zeo.check_file(args.path, fault, args.blob_dir, not args.no_references, progress)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:
        progress.end()
        return fail(error)
    progress.end()
    if args.json:
        print(json.dumps({k: v.hex() if isinstance(v, bytes) else v for k, v in seen.items()}))
    elif not args.quiet:
        print(
            "{transactions} transactions, {records} records, {objects} objects, {blobs} blobs:"
            " {errors} errors, {warnings} warnings".format(**seen)
        )
    return 1 if seen["errors"] or args.strict and seen["warnings"] else 0
