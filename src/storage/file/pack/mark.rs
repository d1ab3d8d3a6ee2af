//! Which records survive: the state at the pack time, what it reaches, and what later transactions need of it.
//!
//! Garbage collection keeps the records that can be reached from
//!
//! 1. the root object as of the pack time,
//! 2. every later record: the revisions that later back-pointers (undo) lead to, and the objects that later records
//!    refer to. ZODB follows some of the former and none of the latter, and so loses objects that were garbage at the
//!    pack time and are alive today.
//!
//! Objects are visited in waves, each in file order, so that a wave reads the file front to back; a wave of many
//! objects is shared by two threads. Memory: 4 to 8 bytes an object (the positions as of the pack time) and the waves
//! ([`Frontier`]: at most one byte an object).

use std::sync::{Mutex, PoisonError};

use rustc_hash::FxHashSet;

use super::super::file::StorageFile;
use super::super::format::{DATA_HEADER_LEN, FIRST_TXN, status};
use super::super::index::Index;
use super::super::pace::Pace;
use super::super::record_set::RecordSet;
use super::super::walk::{RecordAt, Walk};
use super::super::window::Window;
use super::frontier::Frontier;
use crate::ids::{Oid, Tid};
use crate::storage::{References, Result, StorageError};

/// Objects of a wave between two progress reports.
const BATCH: usize = 1 << 16;
/// A batch of fewer objects is not worth a second thread.
const SHARED: usize = 1 << 12;
const THREADS: usize = 2;
/// Objects of a wave closer than this are read together.
const NEAR: u64 = 32 << 10;
/// What a thread finds goes to the frontier in portions of about this size.
const PORTION: usize = 1 << 10;

/// The state as of the pack time.
pub(super) struct AtPackTime {
    /// Where transactions after the pack time begin.
    pub pack_pos: u64,
    /// Objects that exist, with their current records.
    pub current: Index,
    /// Everything before `pack_pos` came from an earlier pack.
    pub all_packed: bool,
    /// The transaction at `pack_pos` (else the last one before it) has been packed.
    pub packed_later: bool,
    /// Every transaction before `pack_pos` has records, and each of them its own data.
    pub plain: bool,
    pub records: u64,
}

/// What survives.
pub(super) struct Marked {
    pub kept: RecordSet,
    /// RecordSet records that back-pointers after the pack time lead to, ascending.
    pub targets: Vec<u64>,
}

/// Reads the file up to the pack time.
pub(super) fn index(
    file: &dyn StorageFile,
    name: &str,
    end: u64,
    stop: Tid,
    pace: &mut Pace<'_>,
) -> Result<AtPackTime> {
    pace.enter("index", end, 0)?;
    let mut at = AtPackTime {
        pack_pos: end,
        current: Index::new(),
        all_packed: true,
        packed_later: false,
        plain: true,
        records: 0,
    };
    let mut walk = Walk::new(file, name, FIRST_TXN, end, true);
    while let Some(txn) = walk.next_txn()? {
        at.packed_later = txn.header.status == status::PACKED;
        if txn.header.tid > stop {
            at.pack_pos = txn.pos;
            break;
        }
        at.all_packed &= txn.header.status == status::PACKED;
        if txn.header.status == status::UNDONE {
            at.plain = false;
            pace.advance(txn.header.tlen + 8, 0)?;
            continue;
        }
        let before = at.records;
        while let Some(record) = walk.next_record()? {
            if record.header.plen > 0 || record.back > 0 {
                at.current.insert(record.header.oid, record.pos);
            } else {
                at.current.remove(record.header.oid);
            }
            at.plain &= record.header.plen > 0;
            at.records += 1;
            pace.advance(DATA_HEADER_LEN as u64 + record.header.body_len(), 1)?;
        }
        at.plain &= at.records > before;
    }
    Ok(at)
}

/// Without garbage collection: everything current at the pack time, and what later back-pointers lead to.
pub(super) fn keep_all(
    file: &dyn StorageFile,
    name: &str,
    end: u64,
    at: &AtPackTime,
    pace: &mut Pace<'_>,
) -> Result<Marked> {
    let kept = RecordSet::below(at.pack_pos);
    at.current.for_each_from(Oid(0), &mut |_, pos| {
        kept.insert(pos);
        true
    });
    let mut targets = Vec::new();
    pace.enter("mark", end - at.pack_pos, 0)?;
    let mut walk = Walk::new(file, name, at.pack_pos, end, false);
    while let Some(txn) = walk.next_txn()? {
        let undone = txn.header.status == status::UNDONE;
        while let Some(record) = walk.next_record()?.filter(|_| !undone) {
            if record.back > 0 && record.back < at.pack_pos {
                kept.insert(record.back);
                targets.push(record.back);
            }
        }
        pace.advance(txn.header.tlen + 8, 0)?;
    }
    targets.sort_unstable();
    targets.dedup();
    Ok(Marked { kept, targets })
}

/// With garbage collection.
///
/// Errors: `Dangling` for a reference, in what the root reaches at the pack time, to an object that did not exist
/// then. References of later records to nothing are not pack's business: nothing can be lost by ignoring them.
pub(super) fn keep_reachable(
    file: &dyn StorageFile,
    name: &str,
    end: u64,
    at: &AtPackTime,
    references: &dyn References,
    pace: &mut Pace<'_>,
) -> Result<Marked> {
    let marker = Marker {
        file,
        name,
        at,
        references,
        kept: RecordSet::below(at.pack_pos),
        frontier: Mutex::new(Frontier::new(at.pack_pos, at.current.len())),
    };
    pace.enter("mark", 0, at.current.len())?;
    match at.current.get(Oid::ROOT) {
        Some(root) => {
            marker.kept.insert(root);
            marker.frontier().add(root);
            marker.spread(true, pace)?;
        }
        // Packed to a time before the database was made.
        None if at.current.is_empty() => {}
        None => return Err(StorageError::Dangling { oid: Oid::ROOT, referrer: Oid::ROOT }),
    }
    let targets = marker.later_roots(end, pace)?;
    marker.spread(false, pace)?;
    Ok(Marked { kept: marker.kept, targets })
}

struct Marker<'a> {
    file: &'a dyn StorageFile,
    name: &'a str,
    at: &'a AtPackTime,
    references: &'a dyn References,
    kept: RecordSet,
    /// Kept, but not visited yet. Locked for a portion of positions at a time.
    frontier: Mutex<Frontier>,
}

impl Marker<'_> {
    fn frontier(&self) -> std::sync::MutexGuard<'_, Frontier> {
        self.frontier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what the records of the frontier reach. Each record is visited once: by whoever set its bit.
    fn spread(&self, strict: bool, pace: &mut Pace<'_>) -> Result<()> {
        loop {
            let wave = self.frontier().next_wave(&self.at.current);
            if wave.is_empty() {
                return Ok(());
            }
            for batch in wave.chunks(BATCH) {
                if batch.len() < SHARED {
                    self.visit(batch, strict)?;
                } else {
                    std::thread::scope(|scope| {
                        let share = batch.len().div_ceil(THREADS);
                        let threads: Vec<_> = batch
                            .chunks(share)
                            .map(|share| scope.spawn(|| self.visit(share, strict)))
                            .collect();
                        // All of them are waited for, whatever one answers.
                        let answers: Vec<Result<()>> = threads
                            .into_iter()
                            .map(|thread| thread.join().unwrap_or_else(|_| died()))
                            .collect();
                        answers.into_iter().collect::<Result<()>>()
                    })?;
                }
                pace.advance(0, batch.len() as u64)?;
            }
        }
    }

    /// Adds what the records at `positions` (ascending) refer to, and was not kept before, to the frontier.
    fn visit(&self, positions: &[u64], strict: bool) -> Result<()> {
        let mut window = Window::new(self.file, self.name);
        let (mut oids, mut found) = (Vec::new(), Vec::new());
        for (i, &pos) in positions.iter().enumerate() {
            let near = positions.get(i + 1).is_some_and(|next| next - pos < NEAR);
            let Some((referrer, data)) = window.data(pos, near)? else { continue };
            oids.clear();
            self.references.references(data, &mut oids)?;
            for &oid in &oids {
                match self.at.current.get(oid) {
                    Some(pos) if self.kept.insert(pos) => found.push(pos),
                    None if strict => return Err(StorageError::Dangling { oid, referrer }),
                    _ => {}
                }
            }
            if found.len() >= PORTION {
                self.frontier().extend(&mut found);
            }
        }
        self.frontier().extend(&mut found);
        Ok(())
    }

    /// Reads what came after the pack time: what it needs goes to the frontier. Answers the targets of back-pointers.
    fn later_roots(&self, end: u64, pace: &mut Pace<'_>) -> Result<Vec<u64>> {
        let (mut targets, mut oids, mut found) = (FxHashSet::default(), Vec::new(), Vec::new());
        let mut walk = Walk::new(self.file, self.name, self.at.pack_pos, end, true);
        while let Some(txn) = walk.next_txn()? {
            if txn.header.status == status::UNDONE {
                continue;
            }
            while let Some(record) = walk.next_record()? {
                if record.back > 0 && record.back < self.at.pack_pos {
                    if targets.insert(record.back) && self.kept.insert(record.back) {
                        self.frontier().add_always(record.back);
                    }
                } else if record.header.plen > 0 {
                    oids.clear();
                    let data = walk.payload(&record)?;
                    later_references(self.references, self.name, &record, data, &mut oids)?;
                    let later = oids.iter().filter_map(|&oid| self.at.current.get(oid));
                    found.extend(later.filter(|&pos| self.kept.insert(pos)));
                    if found.len() >= PORTION {
                        self.frontier().extend(&mut found);
                    }
                }
                pace.advance(DATA_HEADER_LEN as u64 + record.header.body_len(), 0)?;
            }
        }
        self.frontier().extend(&mut found);
        let mut targets: Vec<u64> = targets.into_iter().collect();
        targets.sort_unstable();
        Ok(targets)
    }
}

/// References of a record written after the pack time. ZODB does not look at them at all, so one that cannot be read is
/// no reason not to pack: what only it refers to is as lost as there.
pub(super) fn later_references(
    references: &dyn References,
    name: &str,
    record: &RecordAt,
    data: &[u8],
    oids: &mut Vec<Oid>,
) -> Result<()> {
    match references.references(data, oids) {
        Err(StorageError::Invalid(what)) => {
            let (oid, pos) = (record.header.oid, record.pos);
            tracing::warn!(
                "{name}: the record of {oid} at {pos} cannot be read ({what}); its references do not count"
            );
            Ok(())
        }
        result => result,
    }
}

fn died<T>() -> Result<T> {
    Err(StorageError::Invalid("a thread of the pack died; the storage is as it was".into()))
}
