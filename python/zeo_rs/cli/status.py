"""`zeo-rs status ADDRESS`: what a server says of its storages, without being its client."""

import contextlib
import functools
import json
import os
import socket
import struct
import sys
import time

from zeo_rs.cli import fail, ssl_options
from zeo_rs.config import client_address

#: An answer is a few hundred bytes a storage; more is no answer of a server.
MAX_FRAME = 16 << 20


def arguments(parser):
    add = parser.add_argument
    add("address", help="PORT, HOST:PORT, [IPV6]:PORT, or a path")
    add("--json", action="store_true", help="as the server sends it")
    add("--watch", type=float, metavar="SECONDS", help="again and again")
    add("--timeout", type=float, default=10, metavar="SECONDS")
    ssl_options.arguments(parser)


def run(args):
    try:
        address = client_address(args.address)
        with_tls = ssl_options.given(args)
    except ValueError as error:
        return fail(error)
    if args.watch is not None and not 0 < args.watch < float("inf"):
        return fail("--watch: give a number of seconds, more than 0")
    wrap = functools.partial(ssl_options.wrap, args=args) if with_tls else None
    try:
        if args.watch is None:
            return look(args, address, wrap)
        return watch(args, address, wrap)
    except KeyboardInterrupt:
        return 130 if args.watch is None else 0
    except BrokenPipeError:
        # its reader (`head`) has seen enough; nothing may be written at the exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def watch(args, address, wrap):
    """Until it is interrupted; a server that restarts is waited for."""
    while True:
        if not args.json:
            print(time.strftime("-- %Y-%m-%d %H:%M:%S", time.localtime()))
        look(args, address, wrap)
        time.sleep(args.watch)


def look(args, address, wrap):
    """Shows the status once; answers the exit status."""
    try:
        status = ask(address, args.timeout, wrap)
    except BrokenPipeError as error:
        return fail(f"no status from {args.address}: the connection was closed ({error})", 1)
    except (OSError, ValueError) as error:
        return fail(f"no status from {args.address}: {error}", 1)
    if args.json:
        print(json.dumps(status))
    else:
        show(status)
    sys.stdout.flush()
    return 0


def ask(address, timeout, wrap=None):
    """The decoded status of the server at `address`. `wrap(socket, host)` puts TLS on. Raises `OSError`, `ValueError`."""
    if isinstance(address, str):
        sock, host = socket.socket(socket.AF_UNIX), None
    else:
        sock, host = socket.create_connection(address, timeout), address[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(sock)
        if host is None:
            sock.settimeout(timeout)
            sock.connect(address)
        if wrap is not None:
            sock = stack.enter_context(wrap(sock, host))
        stream = stack.enter_context(sock.makefile("rb"))
        greeting = frame(stream)
        if len(greeting) > 8:
            raise ValueError("not a ZEO server")
        sock.sendall(b"\0\0\0\x04ruok")
        return json.loads(frame(stream))


def frame(stream):
    header = stream.read(4)
    if len(header) < 4:
        raise ValueError("the connection was closed (does the server speak TLS? give --ssl-certificate and --ssl-authenticate)")
    (length,) = struct.unpack(">I", header)
    if length > MAX_FRAME:
        raise ValueError("not a ZEO server, or one with TLS (give --ssl-certificate and --ssl-authenticate)")
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
            what = "the whole storage" if lock["objects"] is None else _objects(lock["objects"])
            verb = "waits for" if lock["waiting"] else "holds"
            print(f"  {lock['client']} {verb} {what} for {lock['seconds']:.1f} s")


def _objects(count):
    return "1 object" if count == 1 else f"{count} objects"
