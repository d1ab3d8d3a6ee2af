"""`zeo-rs status ADDRESS`: what a server says of its storages, without being its client."""

import json
import socket
import struct
import sys
import time

from zeo_rs.cli import fail
from zeo_rs.config import client_address

#: An answer is a few hundred bytes a storage; more is no answer of a server.
MAX_FRAME = 16 << 20


def arguments(parser):
    add = parser.add_argument
    add("address", help="PORT, HOST:PORT, [IPV6]:PORT, or a path")
    add("--json", action="store_true", help="as the server sends it")
    add("--watch", type=float, metavar="SECONDS", help="again and again")
    add("--timeout", type=float, default=10, metavar="SECONDS")


def run(args):
    try:
        address = client_address(args.address)
    except ValueError as error:
        return fail(error)
    while True:
        try:
            status = ask(address, args.timeout)
        except (OSError, ValueError) as error:
            return fail(f"no status from {args.address}: {error}", 1)
        if args.json:
            print(json.dumps(status))
        else:
            show(status)
        sys.stdout.flush()
        if not args.watch:
            return 0
        time.sleep(args.watch)


def ask(address, timeout):
    """The decoded status of the server at `address`. Raises `OSError`, `ValueError`."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        sock.connect(address)
    else:
        sock = socket.create_connection(address, timeout)
    with sock, sock.makefile("rb") as stream:
        greeting = frame(stream)
        if len(greeting) > 8:
            raise ValueError("not a ZEO server")
        sock.sendall(b"\0\0\0\x04ruok")
        return json.loads(frame(stream))


def frame(stream):
    header = stream.read(4)
    if len(header) < 4:
        raise ValueError("the connection was closed (a server with TLS cannot be asked this way)")
    (length,) = struct.unpack(">I", header)
    if length > MAX_FRAME:
        raise ValueError("not a ZEO server, or one with TLS")
    body = stream.read(length)
    if len(body) < length:
        raise ValueError("the connection was closed within the answer")
    return body


def show(status):
    for name, fields in status.items():
        print(f"storage {name}")
        # a list of a server of ours; ZEO's have none
        locks = fields.pop("locks", [])
        width = max(map(len, fields), default=0)
        for key, value in fields.items():
            print(f"  {key:<{width}}  {value}")
        for lock in locks:
            what = "the whole storage" if lock["objects"] is None else f"{lock['objects']} objects"
            verb = "waits for" if lock["waiting"] else "holds"
            print(f"  {lock['client']} {verb} {what} for {lock['seconds']:.1f} s")
