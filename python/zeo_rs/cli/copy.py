"""`zeo-rs copy SOURCE DESTINATION`: every transaction, with its tid, and blobs. Exit status 0, 1 if it fails, 2 for bad arguments."""

from ZODB.utils import p64, u64, z64

from zeo_rs.cli import fail
from zeo_rs.cli.progress import Bar
from zeo_rs.copying import copy, keeps_blobs
from zeo_rs.uri import open_storage

STORAGE = "Data.fs, zeo://HOST:PORT?storage=NAME, zeo:///SOCKET, or FILE.conf#NAME; TLS: &ssl_certificate=PEM&ssl_key=PEM&ssl_authenticate=PEM"


def arguments(parser):
    add = parser.add_argument
    add("source", metavar="SOURCE", help=STORAGE)
    add("destination", metavar="DESTINATION", help="the same; a Data.fs is made")
    add("--source-blobs", metavar="DIRECTORY", help="blob directory of SOURCE, or where to keep blobs from its server")
    add("--destination-blobs", metavar="DIRECTORY", help="likewise of DESTINATION")
    add("-i", "--incremental", action="store_true", help="go on after DESTINATION's last transaction")
    add("-q", "--quiet", action="store_true", help="no summary, no progress")


def run(args):
    opened = []
    try:
        try:
            opened.append(open_storage(args.source, args.source_blobs, read_only=True))
            opened.append(open_storage(args.destination, args.destination_blobs, create=True))
            source, destination = opened
            start = beginning(source, destination, args.incremental)
        except ValueError as error:
            return fail(error)
        bar = Bar("copying", total(source, destination, start), args.quiet, watch=opened)
        with bar:
            done = copy(source, destination, start, bar.copied)
    except KeyboardInterrupt:
        return fail("interrupted: what was copied are whole transactions; --incremental goes on", 130)
    except Exception as error:
        return fail(error, 1)
    finally:
        for storage in opened:
            storage.close()
    if not args.quiet:
        print(f"{done.transactions} transactions, {done.records} records, {done.blobs} blobs, {done.bytes:,} bytes")
    return 0


def beginning(source, destination, incremental):
    """The first tid to copy; None: all. Raises `ValueError`."""
    last = destination.lastTransaction()
    if last in (None, z64):
        return None
    if not incremental:
        raise ValueError("the destination is not empty: --incremental copies what comes after its last transaction")
    if source.lastTransaction() < last:
        raise ValueError("the destination is newer than the source")
    # A copy of this source ends with one of its transactions.
    for transaction in source.iterator(last, last):
        if transaction.tid == last:
            return p64(u64(last) + 1)
    raise ValueError("the destination's last transaction is not in the source: it is no copy of it, or the source was packed")


def total(source, destination, start):
    """Bytes to copy, about; unknown if some are there already, or if blobs come on top."""
    if start is not None or keeps_blobs(source) and keeps_blobs(destination):
        return None
    return source.getSize()
