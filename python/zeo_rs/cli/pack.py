"""`zeo-rs pack`: a data file that nobody has open, or a storage of a running server."""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor, wait

from zeo_rs.cli import fail, ssl_options
from zeo_rs.cli.progress import Progress
from zeo_rs.config import client_address


#: Seconds between two looks at a server's progress.
LOOK_EVERY = 0.5


def arguments(parser):
    add = parser.add_argument
    add("target", metavar="DATA.FS|ADDRESS", help="a file; or the address of a server, with --server")
    add("--server", action="store_true", help="TARGET is a server's address; it packs, this command waits")
    add("--storage", default="1", metavar="NAME", help="which storage of the server")
    add("-d", "--days", type=days, default=0, help="keep what was current so many days ago")
    add("--no-gc", action="store_true", help="keep objects that nothing refers to")
    add("--no-keep-old", action="store_true", help="do not keep the previous file as DATA.FS.old")
    add("--blob-dir", metavar="DIRECTORY")
    add("--throttle", type=throttle, metavar="BYTES", help="read and write at most so much a second")
    ssl_options.arguments(parser)
    add("-q", "--quiet", action="store_true", help="no summary, no progress")


def days(text):
    """Days before now. A pack to a time to come would drop what is not there yet, one to a time before tids means nothing."""
    number = float(text)
    if not 0 <= number <= time.time() / 86400 + 25567:
        raise argparse.ArgumentTypeError(f"{text}: give a number of days, 0 or more, that does not go back before the year 1900")
    return number


def throttle(text):
    number = int(text)
    if not 0 < number < 2**64:
        raise argparse.ArgumentTypeError(f"{text}: give bytes a second, 1 or more")
    return number


def run(args):
    try:
        return pack_server(args) if args.server else pack_file(args)
    except KeyboardInterrupt:
        return fail("interrupted: the file is as it was", 130)
    except Exception as error:
        return fail(error, 1)


def pack_server(args):
    from zeo_rs import ClientStorage

    storage = ClientStorage(client_address(args.target), storage=args.storage, **ssl_options.for_storage(args))
    progress = Progress(args.quiet)
    pool = ThreadPoolExecutor(1)
    try:
        packed = pool.submit(storage.pack, time.time() - args.days * 86400, wait=True)
        while not wait([packed], LOOK_EVERY).done:
            # ZEO's own servers do not tell
            at = (storage.server_status() or {}).get("pack")
            if at:
                progress(at)
        packed.result()
    except KeyboardInterrupt:
        return fail("interrupted: the server goes on packing", 130)
    finally:
        progress.end()
        storage.close()  # ends the waiting, if it has not ended
        pool.shutdown()
    return 0


def pack_file(args):
    from ZODB.serialize import referencesf

    from zeo_rs import FileStorage

    if not os.path.exists(args.target):
        return fail(f"no such file: {args.target} (the address of a server needs --server)")
    before = os.path.getsize(args.target)
    progress = Progress(args.quiet)
    storage = FileStorage(args.target, blob_dir=args.blob_dir, pack_keep_old=not args.no_keep_old)
    try:
        storage.pack(
            time.time() - args.days * 86400,
            referencesf,
            gc=not args.no_gc,
            progress=progress,
            throttle=args.throttle,
        )
    finally:
        progress.end()
        storage.close()
    if not args.quiet:
        print(f"{before:,} bytes before, {os.path.getsize(args.target):,} after")
    return 0
