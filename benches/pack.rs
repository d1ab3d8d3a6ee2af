//! Pack of a large database, beside ZODB's own on the same file:
//!
//! ```text
//! cargo bench --bench pack -- DIR [OBJECTS]
//! python benches/pack_zodb.py DIR
//! ```
//! The file has a tree of objects of about 130 bytes, 16 references each, 1000 a transaction; the first half of them is
//! stored a second time before the pack time, so there is a third to drop. Prints seconds, and the peak of memory.

use std::path::Path;
use std::time::Instant;

use zeo_rs::ids::{Oid, Tid};
use zeo_rs::storage::file::{FileStorage, FileStorageOptions};
use zeo_rs::storage::transform::RecordReferences;
use zeo_rs::storage::{
    NoResolution, Op, PackOptions, StagedTxn, Storage, StorageError, VoteOutcome, WholeStorageLock,
};

const FAN_OUT: u64 = 16;
const PER_TXN: u64 = 1000;
const START: f64 = 1_700_000_000.0;

struct Alone;

impl WholeStorageLock for Alone {
    fn with_whole_storage(&self, body: &mut dyn FnMut()) {
        let start = Instant::now();
        body();
        report("  of it, with commits stopped", start);
    }
}

fn main() -> Result<(), StorageError> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let Some(dir) = args.first() else {
        // `cargo bench` without arguments runs every benchmark.
        return Ok(());
    };
    let objects = args.get(1).and_then(|text| text.parse().ok()).unwrap_or(1_000_000);
    let source = Path::new(dir).join("source.fs");
    if !source.exists() {
        let start = Instant::now();
        make(&source, objects)?;
        report("made the file", start);
    }
    for gc in [true, false] {
        let path = Path::new(dir).join("Data.fs");
        for suffix in ["", ".index", ".old", ".oid"] {
            let _ = std::fs::remove_file(format!("{}{suffix}", path.display()));
        }
        let copied = std::fs::copy(&source, &path);
        copied.map_err(|e| StorageError::io("cannot copy the file", e))?;
        let start = Instant::now();
        let storage = FileStorage::open(&path, FileStorageOptions::default())?;
        report("opened without index", start);
        let start = Instant::now();
        let mut phase = ("", start);
        let mut progress = |p: &zeo_rs::storage::PackProgress| {
            if p.phase != phase.0 {
                if !phase.0.is_empty() {
                    report(&format!("  {}", phase.0), phase.1);
                }
                phase = (p.phase, Instant::now());
            }
            true
        };
        let options = PackOptions {
            time: START * 2.0,
            gc: Some(gc),
            references: &RecordReferences,
            progress: &mut progress,
            throttle: None,
        };
        storage.pack(options, &Alone)?;
        report(if gc { "pack gc" } else { "pack nogc" }, start);
        storage.close()?;
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default();
    show(peak);
    Ok(())
}

fn make(path: &Path, objects: u64) -> Result<(), StorageError> {
    let storage = FileStorage::open(path, FileStorageOptions::default())?;
    let mut number = 0;
    for (round, limit) in [(0u32, objects), (1, objects / 2)] {
        for first in (0..limit).step_by(PER_TXN as usize) {
            let store = |oid| {
                let serial = if round == 0 { Ok(Tid::ZERO) } else { storage.current_tid(Oid(oid)) };
                Ok(Op::Store {
                    oid: Oid(oid),
                    serial: serial?,
                    data: record(oid, objects, round).into(),
                    blob: None,
                })
            };
            let ops = (first..limit.min(first + PER_TXN)).map(store).collect::<Result<_, StorageError>>()?;
            let txn =
                StagedTxn { tid: Tid::from_unix(START + f64::from(number)), ops, ..StagedTxn::default() };
            number += 1;
            if let VoteOutcome::Ready(voted) = storage.vote(txn, &NoResolution)? {
                storage.finish(vec![voted], &mut |_| {})?;
            }
        }
    }
    storage.close()
}

/// As ZODB's pickler writes it: inner nodes have references, leaves text.
fn record(oid: u64, objects: u64, round: u32) -> bytes::Bytes {
    let mut out =
        b"\x80\x03cpersistent.list\nPersistentList\nq\x00.\x80\x03}q\x01X\x04\0\0\0dataq\x02](J".to_vec();
    out.extend_from_slice(&round.to_le_bytes());
    let children = (oid * FAN_OUT + 1)..=(oid * FAN_OUT + FAN_OUT);
    for (i, child) in children.take_while(|child| *child < objects).enumerate() {
        out.extend_from_slice(b"C\x08");
        out.extend_from_slice(&child.to_be_bytes());
        out.extend_from_slice(&[b'q', i as u8 + 3, b'h', 0, 0x86, b'q', i as u8 + 40, b'Q']);
    }
    if oid * FAN_OUT + 1 >= objects {
        out.extend_from_slice(b"X\x40\0\0\0");
        out.extend_from_slice(&[b'x'; 64]);
    }
    out.extend_from_slice(b"es.");
    out.into()
}

fn report(what: &str, start: Instant) {
    show(&format!("{:8.3} s  {what}", start.elapsed().as_secs_f64()));
}

#[allow(clippy::print_stdout)]
fn show(line: &str) {
    println!("{line}");
}
