"""``zeo_rs.aio`` against our server; the example is the one of docs/asyncio.md."""

import asyncio
import pathlib
import re
import threading

import pytest
import transaction
import ZODB
from ZODB.POSException import POSKeyError
from ZODB.utils import p64, z64

import zeo_rs
import zeo_rs.aio
from zeo_rs import _zeo


@pytest.fixture
def addr(tmp_path):
    server = _zeo.Server([('127.0.0.1', 0)], [('1', ('filestorage', str(tmp_path / 'Data.fs'), {}))])
    db = ZODB.DB(zeo_rs.ClientStorage(server.address))
    with db.transaction() as connection:
        root = connection.root()
        for i in range(300):
            root[i] = connection.root().__class__({'n': i})
    db.close()
    yield server.address
    server.stop()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def test_loads_one_and_many(addr):
    async def main():
        async with await zeo_rs.aio.connect(addr) as storage:
            data, tid, end_tid = await storage.load(z64)
            assert end_tid is None and tid == await storage.last_transaction() and data
            assert await storage.load(z64, tid) != (data, tid, None)
            with pytest.raises(POSKeyError):
                await storage.load(p64(10_000))
            found = await storage.load_many([p64(i) for i in range(302)])
            assert sorted(found) == [p64(i) for i in range(301)]
            assert found[z64] == (data, tid, None)

    run(main())


def test_loads_overlap(addr):
    async def main():
        async with await zeo_rs.aio.connect(addr) as storage:
            loads = await asyncio.gather(*(storage.load(p64(i)) for i in range(301)))
            assert len(loads) == 301 and all(loads)

    run(main())


def test_history_iteration_status(addr):
    async def main():
        async with await zeo_rs.aio.connect(addr) as storage:
            (entry,) = await storage.history(z64)
            assert entry['tid'] == storage.storage.lastTransaction()
            records = [len(records) async for _, records in storage.iterate()]
            assert records == [1, 301]
            assert (await storage.status())['commits'] == 2

    run(main())


def test_invalidations_come_in_order(addr):
    async def main():
        async with await zeo_rs.aio.connect(addr) as storage:
            news = storage.invalidations()
            db = await asyncio.to_thread(lambda: ZODB.DB(zeo_rs.ClientStorage(addr)))

            def commit(n):
                with db.transaction() as connection:
                    connection.root()['n'] = n
                return db.storage.lastTransaction()

            tids = [await asyncio.to_thread(commit, n) for n in range(3)]
            seen = [await anext(news) for _ in range(3)]  # nobody had asked when they came
            assert [news.tid for news in seen] == tids
            assert all(news.oids == [z64] for news in seen)
            await news.aclose()
            assert storage.storage._watchers == ()
            dropped = storage.invalidations()
            assert len(storage.storage._watchers) == 1
            del dropped
            assert storage.storage._watchers == ()
            await asyncio.to_thread(db.close)

    run(main())


def test_pack_tells_its_progress_and_its_end(addr):
    async def main():
        async with await zeo_rs.aio.connect(addr) as storage:
            return [progress.phase async for progress in storage.pack()]

    assert run(main())[-1] == 'done'


@pytest.mark.parametrize('how', ['closed', 'its own storage closed', 'closed before'])
def test_invalidations_end_with_the_storage(addr, how):
    async def main():
        storage = await zeo_rs.aio.connect(addr)
        if how == 'closed before':
            await storage.close()
        news = storage.invalidations()
        waiting = [asyncio.ensure_future(anext(news, 'ended')) for _ in range(2)]
        await asyncio.sleep(0)  # they begin to wait
        if how == 'closed':
            await storage.close()
        else:
            await asyncio.to_thread(storage.storage.close)
        async with asyncio.timeout(60):
            assert [await one for one in waiting] == ['ended', 'ended']
            assert [one async for one in news] == []

    run(main())


def test_who_is_cancelled_does_not_wait_for_the_pack(addr):
    async def main():
        storage = zeo_rs.ClientStorage(addr)
        started, go_on = threading.Event(), threading.Event()

        def pack(before):
            started.set()
            assert go_on.wait(60)

        storage.pack = pack

        async def watch(shared):
            async for _ in shared.pack():
                pass

        async with zeo_rs.aio.AsyncStorage(storage) as shared:
            packing = asyncio.ensure_future(watch(shared))
            assert await asyncio.to_thread(started.wait, 60)
            packing.cancel()
            done, _ = await asyncio.wait([packing], timeout=60)
            assert done and packing.cancelled(), 'it waits for the pack'
            go_on.set()
        del storage.pack
        await asyncio.to_thread(storage.close)

    run(main())


def test_shares_a_synchronous_storage(addr):
    storage = zeo_rs.ClientStorage(addr)

    async def main():
        async with zeo_rs.aio.AsyncStorage(storage) as shared:
            return await shared.load(z64)

    assert run(main()) == storage.loadBefore(z64, b'\x7f' + b'\xff' * 7)
    storage.close()


def test_the_example_of_the_documentation(addr, capsys):
    page = pathlib.Path(__file__).parents[2] / 'docs' / 'asyncio.md'
    (example,) = re.findall(r'```python\n(.*?)```', page.read_text(), re.S)
    exec(compile(example, str(page), 'exec'), {'ADDRESS': addr})
    assert 'objects' in capsys.readouterr().out
    transaction.abort()
