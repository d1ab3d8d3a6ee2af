"""The operators' HTTP listener: metrics, health, status, and the page for people."""

import http.client
import json
import math
import pathlib
import re
import shutil
import socket
import subprocess
import time

import pytest
import ZODB
from rawpeer import Raw
from test_server import wait_until

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
    # It came over TCP, and the server need not have noticed yet that it left that.
    wait_until(lambda: len(json.loads(get(server, '/status.json')[2])['storages']['1']['clients']) == 1)
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


def until_waiting(peer):
    """Until a vote waits for locks; one look is a round trip."""
    deadline = time.monotonic() + 30
    while peer.call('server_status')['waiting'] != 1:
        assert time.monotonic() < deadline


# -- /metrics as Prometheus reads it

SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)')
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
#: what a family's samples may be called, by its type
SUFFIXES = {'counter': ('_total',), 'gauge': ('',), 'histogram': ('_bucket', '_sum', '_count')}


def parse(text):
    """`{family: (type, [(sample name, labels, value)])}` by the rules of the OpenMetrics text format; raises if one is broken."""
    assert text.endswith('# EOF\n')
    families, family, helped = {}, None, set()
    for line in text.splitlines()[:-1]:
        if line.startswith('#'):
            _, word, name, rest = line.split(' ', 3)
            if word == 'TYPE':
                assert name not in families, f'{name} comes twice'
                family = name
                families[name] = (rest, [])
            elif word == 'UNIT':
                assert name == family and name.endswith('_' + rest)
            else:
                assert word == 'HELP' and rest and name not in helped
                helped.add(name)
            continue
        name, labels, value = SAMPLE.fullmatch(line).groups()
        found = dict(LABEL.findall(labels or ''))
        assert LABEL.sub('', labels or '') == '', line
        kind, samples = families[family]
        assert name.removeprefix(family) in SUFFIXES[kind], f'{name} in {family}'
        samples.append((name, found, float(value)))
    assert helped == set(families)
    for family, (kind, samples) in families.items():
        assert samples, family
        if kind != 'histogram':
            continue
        for storage in {labels['storage'] for _, labels, _ in samples}:
            of_storage = [sample for sample in samples if sample[1]['storage'] == storage]
            buckets = [(float(labels['le']), value) for name, labels, value in of_storage if name.endswith('_bucket')]
            assert buckets == sorted(buckets) and buckets[-1][0] == math.inf, 'bounds and counts must rise'
            assert len({bound for bound, _ in buckets}) == len(buckets)
            (count,) = (value for name, _, value in of_storage if name.endswith('_count'))
            assert count == buckets[-1][1]
    return families


def test_metrics_are_what_prometheus_reads_and_the_page_documents(server):
    db = use(server, 'web 1')
    # a conflict, a vote that waits, an abort
    with Raw(server.address) as one, Raw(server.address) as two:
        for peer in (one, two):
            peer.cast('tpc_begin', 1, b'', b'', {}, None, ' ')
            peer.cast('storea', bytes(7) + b'\x09', bytes(8), b'x', 1)
        one.call('vote', 1)
        waiting = two.send('vote', 1)
        until_waiting(one)
        one.call('tpc_finish', 1)
        with pytest.raises(RuntimeError, match='ConflictError'):
            two.answer(waiting)
        one.cast('tpc_begin', 2, b'', b'', {}, None, ' ')
        one.call('tpc_abort', 2)
        db.pack()
        families = parse(get(server, '/metrics')[2])
    db.close()

    def value(name):
        return next(value for _, samples in families.values() for sample, _, value in samples if sample == name)

    assert value('zeo_commits_total') == 3 and value('zeo_conflicts_total') == 1 and value('zeo_aborts_total') == 1
    assert value('zeo_commit_group_size_count') == value('zeo_commit_groups_total') <= 3
    assert value('zeo_commit_group_size_sum') == 3
    assert value('zeo_sync_seconds_count') == value('zeo_finish_seconds_count')
    assert 0 < value('zeo_sync_seconds_sum') <= value('zeo_finish_seconds_sum')
    assert value('zeo_lock_wait_seconds_count') >= 4 and value('zeo_lock_wait_seconds_sum') > 0
    assert value('zeo_received_bytes_total') > 100 and value('zeo_sent_bytes_total') > 100
    assert value('zeo_page_cache_hits_total') + value('zeo_disk_loads_total') == value('zeo_loads_total') > 0
    assert value('zeo_connections') == 3 and value('zeo_waiting_votes') == 0
    assert value('zeo_invalidation_queue_transactions') >= 3 and value('zeo_unread_invalidation_bytes') == 0
    assert value('zeo_pack_running') == 0
    # the page names them all, and nothing else
    page = (pathlib.Path(__file__).parents[2] / 'docs' / 'operations.md').read_text()
    shown = {name + ('_total' if kind == 'counter' else '') for name, (kind, _) in families.items()}
    assert set(re.findall(r'`(zeo_[a-z_]+)`', page)) == shown


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


# -- the page in a browser


def browser():
    for name in ('chromium', 'chromium-browser', 'google-chrome'):
        if found := shutil.which(name):
            return found
    pytest.skip('there is no Chromium')


def in_browser(url, tmp_path, *options):
    """What a headless Chromium prints."""
    command = [browser(), '--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking']
    command += [f'--user-data-dir={tmp_path}/profile', '--virtual-time-budget=2000', '--window-size=1100,1300', *options, url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip('Chromium does not come to an end on this machine')
    return done.stdout


def test_the_page_in_a_browser(server, tmp_path):
    db = use(server, 'web <1> & co')
    with Raw(server.address) as one, Raw(server.address) as two:
        for peer in (one, two):
            peer.cast('set_client_label', f'batch {peer is two}')
            peer.cast('tpc_begin', 1, b'', b'', {}, None, ' ')
            peer.cast('storea', bytes(7) + b'\x09', bytes(8), b'x', 1)
        one.call('vote', 1)
        waiting = two.send('vote', 1)
        until_waiting(one)
        dom = in_browser('http://%s:%s/' % server.http_address, tmp_path, '--dump-dom')
        one.call('tpc_abort', 1)
        two.answer(waiting)
    db.close()
    # as the browser has understood it: tables of cells, text that is no markup
    rows = [re.findall(r'<td[^>]*>(.*?)</td>', row, re.S) for row in re.findall(r'<tr>(.*?)</tr>', dom, re.S)]
    states = {row[0].split('(')[-1]: row[1] for row in rows if len(row) == 4}
    assert states == {'batch False)': 'holds', 'batch True)': 'waits'}, dom
    labels = [row[1] for row in rows if len(row) == 5]
    assert sorted(labels) == ['batch False', 'batch True', 'web &lt;1&gt; &amp; co']
    facts = dict(re.findall(r'<dt>(.*?)</dt><dd>(.*?)</dd>', dom))
    assert facts['clients'] == '3' and facts['commits'] == '2' and facts['votes waiting'] == '1'
    assert {'loads / s', 'commits / s', 'bytes out / s', 'sync, p50 / p99'} <= set(facts)
