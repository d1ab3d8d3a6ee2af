"""The operators' HTTP listener: metrics, health, status, and the page for people."""

import http.client
import json
import socket

import pytest
import ZODB

import zeo_rs
from zeo_rs import _zeo


@pytest.fixture
def server(tmp_path):
    server = _zeo.Server(
        [('127.0.0.1', 0)],
        [('1', ('filestorage', str(tmp_path / 'Data.fs'), {}))],
        {'http': ('127.0.0.1', 0)},
    )
    yield server
    server.stop()


def get(server, path, method='GET'):
    connection = http.client.HTTPConnection(*server.http_address, timeout=60)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.getheader('Content-Type'), answer.read().decode()
    finally:
        connection.close()


def use(server, label):
    db = ZODB.DB(zeo_rs.ClientStorage(server.address, client_label=label))
    with db.transaction() as connection:
        connection.root()['x'] = 1
    return db


def test_metrics_count_what_was_done(server):
    db = use(server, 'web 1')
    try:
        status, content_type, text = get(server, '/metrics')
    finally:
        db.close()
    assert status == 200 and content_type.startswith('application/openmetrics-text')
    values = dict(line.rsplit(' ', 1) for line in text.splitlines() if not line.startswith('#'))
    assert values['zeo_commits_total{storage="1"}'] == '2'  # the root, then x
    assert values['zeo_connections{storage="1"}'] == '1.0'
    assert float(values['zeo_loads_total{storage="1"}']) >= 1
    assert values['zeo_load_seconds_count{storage="1"}'] == values['zeo_loads_total{storage="1"}']
    assert values['zeo_load_seconds_bucket{le="+Inf",storage="1"}'] == values['zeo_load_seconds_count{storage="1"}']
    assert text.endswith('# EOF\n')


def test_status_shows_clients_as_they_call_themselves(server):
    db = use(server, '<b>web & co</b>')
    try:
        status = json.loads(get(server, '/status.json')[2])
        page = get(server, '/')[2]
    finally:
        db.close()
    (client,) = status['storages']['1']['clients']
    assert client['label'] == '<b>web & co</b>' and client['read_only'] is False
    assert status['storages']['1']['commits'] == 2
    assert '&lt;b&gt;web &amp; co&lt;/b&gt;' in page and '<b>web' not in page


def test_health_and_unknown_requests(server):
    assert get(server, '/healthz')[::2] == (200, 'ok\n')
    assert get(server, '/readyz')[::2] == (200, 'ready\n')
    assert get(server, '/metrics/../../etc/passwd')[0] == 404
    assert get(server, '/', method='POST')[0] == 405


def test_nonsense_and_silence_hurt_nobody(server):
    silent = [socket.create_connection(server.http_address, timeout=60) for _ in range(20)]
    with socket.create_connection(server.http_address, timeout=60) as s:
        s.sendall(b'\x16\x03\x01' + b'\xff' * 64_000)
        s.recv(1000)
    assert get(server, '/healthz')[0] == 200
    for s in silent:
        s.close()
