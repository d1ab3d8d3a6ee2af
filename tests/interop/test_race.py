"""ZODB's race tests over real servers: ours with ZEO's client, ZEO's with our client, ours with ours.

Many clients load, change and reconnect side by side and check an invariant that a lost or late invalidation breaks. Few
rounds here; `test_zeo_suite.py` runs all of them when it is asked for the whole suite.
"""

import itertools

import pytest
import zeo_suite
import ZEO._forker
import ZEO.ClientStorage
from ZODB.tests import racetest
from ZODB.tests.StorageTestBase import StorageTestBase
from zeo_suite import KINDS

COMBINATIONS = [
    combination for combination in itertools.product(KINDS, KINDS, (False, True)) if "rust" in combination[:2]
]
#: Rounds of ZODB's own runs, and of ours.
ROUNDS = {500: 100, 100: 25, 12: 2}
DATABASE = "<filestorage>\n  path Data.fs\n</filestorage>"


class Races(racetest.RaceTests, StorageTestBase):
    __test__ = False
    client = None  # class of the clients
    address = None

    def runTest(self):
        """Not run as a test case of its own."""

    def _new_storage_client(self):
        return self.client(self.address, wait_timeout=60)


@pytest.fixture(params=COMBINATIONS, ids=lambda c: f"{c[0]}-server-{c[1]}-client-{'M5' if c[2] else 'Z5'}")
def races(request, tmp_path, monkeypatch):
    server, client, msgpack = request.param
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(racetest, "range", lambda n: range(ROUNDS.get(n, n)), raising=False)
    with zeo_suite.patched(server, client, msgpack):
        address, stop = ZEO._forker.start_zeo_server(DATABASE)
        races = Races()
        races.address, races.client = address, ZEO.ClientStorage.ClientStorage
        try:
            races._storage = races._new_storage_client()
            try:
                yield races
            finally:
                races._storage.close()
        finally:
            stop()


def test_load_and_open_beside_own_invalidations(races):
    races.test_race_loadopen_vs_local_invalidate()


def test_load_beside_invalidations_of_others(races):
    races.test_race_load_vs_external_invalidate()


def test_invalidations_beside_reconnects(races):
    races.test_race_external_invalidate_vs_disconnect()
