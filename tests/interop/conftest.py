"""The matrix: server kinds x encodings x client kinds, ZEO with ZEO included, which tests the tests."""

import itertools

import pytest
from peers import ENCODINGS, KINDS, Client, Server

SERVERS = list(itertools.product(KINDS, ENCODINGS))


@pytest.fixture(scope="module", params=SERVERS, ids=lambda p: f"{p[0]}-server-{p[1]}")
def server(request):
    kind, encoding = request.param
    # one encoding over TCP, the other over a unix socket, so that both are used with both kinds of servers
    with Server(kind, encoding, unix=encoding == "Z5") as server:
        yield server


@pytest.fixture(params=KINDS, ids=lambda p: f"{p}-client")
def client(request, server):
    with Client(request.param, server.address) as client:
        yield client


@pytest.fixture(params=list(itertools.product(KINDS, KINDS)), ids="-and-".join)
def clients(request, server):
    with Client(request.param[0], server.address) as one, Client(request.param[1], server.address) as two:
        yield one, two


@pytest.fixture
def key(request):
    """A name of its own for every test: the database lives as long as the server."""
    return request.node.name
