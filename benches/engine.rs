//! The FileStorage engine without Python: loads by one and by four threads, beside commits, and commits.
//!
//! ```text
//! cargo bench --bench engine -- DIR [OBJECTS]
//! ```
//! Makes DIR/engine.fs with OBJECTS (a million if not given) objects of 250 bytes, and prints nanoseconds of wall time and
//! of CPU time for an operation; the file should be in the page cache. What the same costs through Python, and beside
//! ZODB's FileStorage: `scripts/bench --only filestorage`.

#![allow(clippy::print_stdout)] // a benchmark reports to the terminal

use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::{Loaded, NoResolution, Op, Result, StagedTxn, Storage, StorageError, VoteOutcome};

const RECORD: [u8; 250] = [b'd'; 250];
const PER_TXN: u64 = 10_000;
const LOADS: u64 = 200_000;
const ROUNDS: usize = 5;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let Some(dir) = args.first() else {
        // `cargo bench` without arguments runs every benchmark.
        return Ok(());
    };
    let objects = args.get(1).and_then(|text| text.parse().ok()).unwrap_or(1_000_000);
    let path = Path::new(dir).join("engine.fs");
    let storage = FileStorage::open(&path, FileStorageOptions { create: true, ..Default::default() })?;
    for first in (0..objects).step_by(PER_TXN as usize) {
        commit(&storage, first..objects.min(first + PER_TXN), Tid::ZERO)?;
    }
    for threads in [1, 4] {
        measure(&format!("load, {threads} threads"), threads * LOADS, || load(&storage, objects, threads));
    }
    beside_commits(&storage, objects)?;
    let mut next = objects + 1;
    for count in [1, 100, 10_000] {
        measure(&format!("commit of {count} objects"), 1, || {
            next += count;
            commit(&storage, next - count..next, Tid::ZERO).map(drop)
        });
    }
    storage.close()
}

/// The least of some rounds, for each of `operations`.
fn measure(what: &str, operations: u64, mut body: impl FnMut() -> Result<()>) {
    let (mut wall, mut cpu) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        let (start, used) = (Instant::now(), cpu_time());
        if let Err(error) = body() {
            println!("{what}: {error}");
            return;
        }
        wall = wall.min(start.elapsed().as_nanos() as f64);
        cpu = cpu.min((cpu_time() - used).as_nanos() as f64);
    }
    let each = operations as f64;
    println!("{what:<44} {:>12.0} ns {:>12.0} ns CPU", wall / each, cpu / each);
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn load(storage: &FileStorage, objects: u64, threads: u64) -> Result<()> {
    thread::scope(|scope| {
        let handles: Vec<_> =
            (0..threads).map(|number| scope.spawn(move || load_some(storage, objects, number))).collect();
        handles.into_iter().try_for_each(|handle| handle.join().unwrap_or(Err(StorageError::Closed)))
    })
}

fn load_some(storage: &FileStorage, objects: u64, seed: u64) -> Result<()> {
    let mut number = seed + 1;
    for _ in 0..LOADS {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        black_box(one(storage, Oid((number >> 33) % objects))?);
    }
    Ok(())
}

/// As the server and Python do it: another call where the page cache has not everything.
fn one(storage: &FileStorage, oid: Oid) -> Result<Option<Loaded>> {
    match storage.try_load_before(oid, Tid::MAX) {
        Err(StorageError::WouldBlock) => storage.load_before(oid, Tid::MAX),
        answer => answer,
    }
}

/// Four threads load for a second while one more commits an object of its own without pause.
fn beside_commits(storage: &FileStorage, objects: u64) -> Result<()> {
    let (done, commits, slowest) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let mut serial = Tid::ZERO;
    let start = Instant::now();
    let loads = thread::scope(|scope| -> Result<u64> {
        let reader = |seed: u64| {
            let (mut number, mut loads) = (seed + 1, 0);
            while !done.load(Ordering::Relaxed) {
                number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let begin = Instant::now();
                black_box(one(storage, Oid((number >> 33) % objects))?);
                slowest.fetch_max(begin.elapsed().as_nanos() as u64, Ordering::Relaxed);
                loads += 1;
            }
            Ok(loads)
        };
        let readers: Vec<_> = (0..4).map(|seed| scope.spawn(move || reader(seed))).collect();
        let result = (|| -> Result<()> {
            while start.elapsed() < Duration::from_secs(1) {
                serial = commit(storage, objects..objects + 1, serial)?;
                commits.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        let loads =
            readers.into_iter().map(|reader| reader.join().unwrap_or(Err(StorageError::Closed))).sum();
        result.and(loads)
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let (loads, commits) = (loads as f64 / seconds, commits.into_inner() as f64 / seconds);
    println!(
        "4 threads beside a committing one: {loads:.0} loads/s, {commits:.0} commits/s, slowest load {} us",
        slowest.into_inner() / 1000
    );
    Ok(())
}

fn commit(storage: &FileStorage, oids: impl Iterator<Item = u64>, serial: Tid) -> Result<Tid> {
    let store =
        |oid| Op::Store { oid: Oid(oid), serial, data: Bytes::from_static(&RECORD).into(), blob: None };
    let txn = StagedTxn { ops: oids.map(store).collect(), ..StagedTxn::default() };
    let mut committed = Tid::ZERO;
    if let VoteOutcome::Ready(voted) = storage.vote(txn, &NoResolution)? {
        storage.finish(vec![voted], &mut |done| committed = done.tid)?;
    }
    Ok(committed)
}
