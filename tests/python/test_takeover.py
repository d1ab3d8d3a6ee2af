"""``zeo_rs.zeo``: afterwards ZEO's names are this project's, with or without ZEO installed."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


HIDE_ZEO = """
import sys
class _NoZEO:
    def find_spec(self, name, path=None, target=None):
        if name == 'ZEO' or name.startswith('ZEO.'):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, _NoZEO())
"""


def run(code, before=''):
    script = before + textwrap.dedent(code)
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize('before', ['', HIDE_ZEO], ids=['ZEO installed', 'ZEO not installed'])
def test_names(before):
    assert run("""
        import zeo_rs.zeo
        import ZEO, ZEO.ClientStorage, ZEO.Exceptions, ZEO.interfaces
        from ZEO.ClientStorage import ClientStorage
        import zeo_rs, zeo_rs.exceptions, zeo_rs.interfaces
        assert ClientStorage is zeo_rs.ClientStorage
        assert ZEO.ClientStorage.ClientStorage is zeo_rs.ClientStorage
        assert (ZEO.DB, ZEO.client, ZEO.connection, ZEO.server) == (
            zeo_rs.DB, zeo_rs.client, zeo_rs.connection, zeo_rs.server)
        assert ZEO.Exceptions.ClientDisconnected is zeo_rs.exceptions.ClientDisconnected
        assert ZEO.interfaces.StaleCache is zeo_rs.interfaces.StaleCache
        print('taken over')
    """, before) == 'taken over'


def test_other_modules_of_an_installed_zeo_stay_importable():
    assert run("""
        import zeo_rs.zeo
        import ZEO.shortrepr
        print(ZEO.shortrepr.__name__)
    """) == 'ZEO.shortrepr'


def test_an_earlier_import_of_zeo_is_patched_and_reported():
    assert run("""
        import logging, io
        import ZEO
        log = io.StringIO()
        logging.basicConfig(stream=log)
        import zeo_rs, zeo_rs.zeo
        assert ZEO.DB is zeo_rs.DB
        print('imported before' in log.getvalue())
    """) == 'True'


def test_zodbs_zeoclient_section_makes_our_storage():
    assert run("""
        import ZODB.config
        storage = ZODB.config.storageFromString('''
            %import zeo_rs.zeo
            <zeoclient>
              server 127.0.0.1:1
              wait false
              username nobody
              min-disconnect-poll 5
              drop-cache-rather-verify false
            </zeoclient>
        ''')
        print(type(storage).__module__)
        storage.close()
    """, HIDE_ZEO) == 'zeo_rs.clientstorage'


CERTIFICATES = Path(__file__).parents[1] / 'fixtures' / 'tls'

OPEN_SECTIONS = """
    import zeo_rs, ZODB.config, pkgutil
    plain, stop_plain = zeo_rs.server()
    ours = zeo_rs.TLS(T + 'leaf.pem', T + 'leaf.key', authenticate=T + 'ca.pem')
    secure, stop_secure = zeo_rs.server(ssl=ours)
    ssl = f'''<ssl>
        certificate {T}leaf.pem
        key {T}leaf.key
        authenticate {T}ca.pem
        server-hostname zeo.example.com
    </ssl>'''
    for imports in ('%import zeo_rs.zeo\\n%import ZEO', '%import ZEO\\n%import zeo_rs.zeo')[:orders]:
        for (host, port), section in ((plain, ''), (secure, ssl)):
            storage = ZODB.config.storageFromString(f'''{imports}
                <clientstorage>
                  server {host}:{port}
                  cache-size 5MB
                  blob-cache-size-check 20
                  wait-timeout 30
                  {section}
                </clientstorage>''')
            assert type(storage) is zeo_rs.ClientStorage and storage.is_connected()
            storage.ping()
            storage.close()
    stop_plain(); stop_secure()
    assert b'<component>' in pkgutil.get_data('ZEO', 'component.xml')
    import ZEO, importlib.util
    assert ZEO.__file__ and ZEO.__path__ and importlib.util.find_spec('ZEO').loader is not None
    print('opened')
"""


@pytest.mark.parametrize(
    'before, orders',
    [('', 1), ('import ZEO', 2), ('import zeo_rs.zeo', 2), (HIDE_ZEO, 1), (HIDE_ZEO + 'import zeo_rs.zeo', 2)],
    ids=['installed', 'imported before', 'taken over before', 'not installed', 'not installed, taken over before'],
)
def test_import_zeo_gives_its_sections(before, orders):
    """Unchanged `%import ZEO` configurations: `<clientstorage>` is ours, its `<ssl>` shows and checks certificates."""
    before = f'T = {str(CERTIFICATES) + "/"!r}\norders = {orders}\n{before}\n'
    assert run(OPEN_SECTIONS, before) == 'opened'


@pytest.mark.parametrize('before', ['', HIDE_ZEO], ids=['ZEO installed', 'ZEO not installed'])
def test_the_modules_have_zeos_names_and_no_others(before):
    names = run("""
        import zeo_rs.zeo, ZEO.ClientStorage, ZEO.Exceptions, ZEO.interfaces
        for module in ZEO.ClientStorage, ZEO.Exceptions, ZEO.interfaces:
            print(*(name for name in sorted(vars(module)) if not name.startswith('_')))
        from ZEO.ClientStorage import get_timestamp, tid2time
        first = get_timestamp()
        assert get_timestamp(first) > first
        assert tid2time(first.raw()) == str(first)
    """, before).splitlines()
    assert names == [
        'BlobCacheLayout ClientDisconnected ClientStorage ClientStorageTransactionInformation MB RecordIterator'
        ' TransactionIterator check_blob_size_script get_timestamp logger tid2time',
        'ClientDisconnected ClientStorageError ProtocolError ServerException UnrecognizedResult',
        'Closed IClientCache IServeable Serving StaleCache',
    ]
