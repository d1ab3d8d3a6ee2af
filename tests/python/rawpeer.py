"""A client of single messages, for what no well-behaved client does. Speaks `M5`."""

import socket
import struct

import msgpack

PATIENCE = 30


class Raw:
    def __init__(self, address, register=True, wrap=None):
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(address)
        if wrap is not None:
            self.socket = wrap(self.socket)
        self.stream = self.socket.makefile("rb")
        self.last_id = 0
        self.greeting = self.frame()
        self.send_frame(b"M5")
        if register:
            self.call("register", "1", False)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        self.stream.close()
        self.socket.close()

    def frame(self):
        header = self.stream.read(4)
        if len(header) < 4:
            raise EOFError("closed by the server")
        (length,) = struct.unpack(">I", header)
        return self.stream.read(length)

    def send_frame(self, body):
        self.socket.sendall(struct.pack(">I", len(body)) + body)

    def cast(self, method, *arguments):
        """A call without an answer."""
        self.send_frame(msgpack.packb((0, True, method, arguments), use_bin_type=True))

    def cast_all(self, calls):
        bodies = [msgpack.packb((0, True, method, arguments), use_bin_type=True) for method, *arguments in calls]
        self.socket.sendall(b"".join(struct.pack(">I", len(body)) + body for body in bodies))

    def send(self, method, *arguments):
        self.last_id += 1
        self.send_frame(msgpack.packb((self.last_id, False, method, arguments), use_bin_type=True))
        return self.last_id

    def call(self, method, *arguments):
        """Its answer; an error as `RuntimeError` of its class and text."""
        return self.answer(self.send(method, *arguments))

    def answer(self, wanted):
        while True:
            number, flag, _, value = msgpack.unpackb(self.frame(), raw=False, strict_map_key=False)
            if number != wanted:
                continue
            if flag == 2:
                raise RuntimeError(repr(value))
            return value

    def until_closed(self):
        """Reads what comes until the server closes."""
        try:
            while True:
                self.frame()
        except (EOFError, ConnectionError):
            pass
