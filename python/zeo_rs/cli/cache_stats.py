"""`zeo-rs cache-stats FILE`: exit status 0, or 2 if it is no cache file. The file may be in use."""

import json

from persistent.TimeStamp import TimeStamp

from zeo_rs import _zeo
from zeo_rs.cli import fail


def arguments(parser):
    parser.add_argument("path", metavar="FILE", help="as given to ClientStorage with cache=, or made by client=")
    parser.add_argument("--json", action="store_true", help="one object")


def run(args):
    try:
        stats = _zeo.cache_file_stats(args.path)
    except OSError as error:
        return fail(error)
    if stats is None:
        return fail(f"{args.path} is no cache file of zeo_rs")
    last = stats.pop("last_tid")
    if args.json:
        print(json.dumps({**stats, "last_tid": last.hex()}))
        return 0
    print(f"last transaction    {last.hex()}  {TimeStamp(last)} UTC")
    print("objects             {objects}".format(**stats))
    print("revisions           {revisions}, {current} of them current".format(**stats))
    print("data                {data_bytes} bytes, the largest {largest}".format(**stats))
    print("in memory           {cache_bytes} bytes".format(**stats))
    print("file                {file_bytes} bytes".format(**stats))
    if stats["whole_bytes"] < stats["file_bytes"]:
        print("                    the last {} are no whole record".format(stats["file_bytes"] - stats["whole_bytes"]))
    print("written since the file was made anew: {stores} revisions, {invalidations} invalidations".format(**stats))
    return 0
