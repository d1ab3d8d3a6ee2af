"""``zeo_rs.zeo``: afterwards ZEO's names are this project's, with or without ZEO installed."""

import subprocess
import sys
import textwrap

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
