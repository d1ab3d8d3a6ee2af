//! [`Copier`]: writes the packed file. First the records kept of the time before the pack time, then every later
//! transaction, while commits go on appending them.
//!
//! Byte for byte what ZODB's packer writes wherever that is right. It finds the target of a back-pointer in the
//! output by transaction and object, which is ambiguous; here positions are mapped: kept targets exactly, and
//! everything after the pack time by its distance to the nearest place where the copy changed length.

use std::sync::Arc;

use rustc_hash::FxHashSet;

use super::super::file::StorageFile;
use super::super::format::{DATA_HEADER_LEN, DataHeader, FIRST_TXN, MAGIC, TxnHeader, status};
use super::super::index::Index;
use super::super::pace::Pace;
use super::super::samples::Samples;
use super::super::walk::{RecordAt, TxnAt, Walk};
use super::super::window::Window;
use super::mark::{Marked, later_references};
use super::output::Output;
use crate::ids::{Oid, Tid};
use crate::storage::{References, Result};

/// Called with each record that does not survive: oid, tid, data.
pub(super) type Dropped<'a> = &'a mut dyn FnMut(Oid, Tid, &[u8]) -> Result<()>;

pub(super) struct Copier<'a> {
    pub out: Output,
    pub index: Index,
    pub samples: Samples,
    file: &'a Arc<dyn StorageFile>,
    name: &'a str,
    pack_pos: u64,
    marked: &'a Marked,
    /// Where kept targets of later back-pointers went, ascending.
    moved: Vec<(u64, u64)>,
    /// From this old position on, records are at that new position (0: not copied), ascending.
    shifts: Vec<(u64, u64)>,
    window: Window<'a>,
}

/// Finds objects that are needed by transactions committed after marking, and were dropped.
pub(super) struct Missing<'a> {
    pub references: &'a dyn References,
    /// The storage's own index.
    pub live: &'a Index,
    /// Transactions before this position were looked at when marking.
    pub marked_end: u64,
}

impl<'a> Copier<'a> {
    /// `out` must be empty.
    pub(super) fn new(
        mut out: Output,
        file: &'a Arc<dyn StorageFile>,
        name: &'a str,
        pack_pos: u64,
        marked: &'a Marked,
    ) -> Result<Self> {
        out.write(&MAGIC)?;
        let window = Window::new(&**file, name);
        let (moved, shifts) = (Vec::new(), Vec::new());
        Ok(Self {
            out,
            index: Index::new(),
            samples: Samples::default(),
            file,
            name,
            pack_pos,
            marked,
            moved,
            shifts,
            window,
        })
    }

    /// Copies what is kept of the time before the pack time. `is_newest`: nothing has been committed after it.
    pub(super) fn copy_kept(
        &mut self,
        is_newest: bool,
        mut dropped: Option<Dropped<'_>>,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let mut walk = Walk::new(&**self.file, self.name, FIRST_TXN, self.pack_pos, true);
        let mut newest_dropped = None;
        while let Some(txn) = walk.next_txn()? {
            let start = self.out.pos();
            newest_dropped = Some(txn);
            if txn.header.status == status::UNDONE {
                pace.advance(txn.header.tlen + 8, 0)?;
                continue;
            }
            let (mut gone, mut stays) = (Vec::new(), FxHashSet::default());
            while let Some(record) = walk.next_record()? {
                if self.marked.kept.contains(record.pos) {
                    if self.out.pos() == start {
                        self.begin(&mut walk, &txn, status::PACKED)?;
                    }
                    self.copy_resolved(&mut walk, &record, start)?;
                    stays.extend(dropped.is_some().then_some(record.header.oid));
                } else if dropped.is_some() {
                    gone.push(record);
                }
                pace.advance(DATA_HEADER_LEN as u64 + record.header.body_len(), 1)?;
            }
            if self.out.pos() > start {
                self.finish(start)?;
                newest_dropped = None;
            }
            if let Some(dropped) = dropped.as_mut() {
                // A second record of the object in this transaction has the same tid, so it is the same revision.
                for record in gone.iter().filter(|record| !stays.contains(&record.header.oid)) {
                    if let Some((_, data)) = self.window.data(record.pos, true)? {
                        dropped(record.header.oid, record.header.tid, data)?;
                    }
                }
            }
        }
        // The header of the newest transaction of all stays even without records: `lastTransaction()` must not go back
        // when the storage is opened again, or clients would have caches from the future.
        if let Some(mut txn) = newest_dropped.filter(|_| is_newest) {
            if self.out.pos() == FIRST_TXN {
                // ZODB cannot open a file of nothing but empty transactions with an index, unless it is very short.
                txn.header = TxnHeader { user_len: 0, description_len: 0, extension_len: 0, ..txn.header };
            }
            let start = self.out.pos();
            self.begin(&mut walk, &txn, status::PACKED)?;
            self.finish(start)?;
        }
        Ok(())
    }

    /// Copies the transactions `from..to` after the pack time whole. Answers an object that is missing, if one is.
    pub(super) fn copy_rest(
        &mut self,
        from: u64,
        to: u64,
        missing: Option<&Missing<'_>>,
        pace: &mut Pace<'_>,
    ) -> Result<Option<Oid>> {
        let mut walk = Walk::new(&**self.file, self.name, from, to, false);
        let (mut written, mut suspects, mut oids) = (Vec::new(), Vec::new(), Vec::new());
        while let Some(txn) = walk.next_txn()? {
            if txn.header.status == status::UNDONE {
                self.shifts.push((txn.pos, 0));
                pace.advance(txn.header.tlen + 8, 0)?;
                continue;
            }
            let missing = missing.filter(|missing| txn.pos >= missing.marked_end);
            let start = self.out.pos();
            self.begin(&mut walk, &txn, txn.header.status)?;
            while let Some(record) = walk.next_record()? {
                let here = self.out.pos();
                self.note_shift(record.pos, here);
                written.push((record.header.oid, here));
                let prev = self.index.get(record.header.oid).unwrap_or(0);
                oids.clear();
                if record.header.plen > 0 {
                    if let Some(missing) = missing {
                        let data = walk.payload(&record)?;
                        later_references(missing.references, self.name, &record, data, &mut oids)?;
                    }
                    self.write_header(&record, prev, start, record.header.plen)?;
                    walk.payload_pieces(&record, &mut |piece| self.out.write(piece))?;
                } else if let Some(back) = self.new_pos(record.back) {
                    self.write_header(&record, prev, start, 0)?;
                    self.out.write(&back.to_be_bytes())?;
                } else {
                    // Undone to a revision that was dropped: the data takes the place of the back-pointer.
                    let data = self.window.data(record.back, false)?.map(|(_, data)| data.to_vec());
                    if let (Some(missing), Some(data)) = (missing, &data) {
                        later_references(missing.references, self.name, &record, data, &mut oids)?;
                    }
                    self.write_data(&record, prev, start, data.as_deref())?;
                }
                suspects.extend(oids.iter().copied().filter(|&oid| self.index.get(oid).is_none()));
                pace.advance(DATA_HEADER_LEN as u64 + record.header.body_len(), 1)?;
            }
            self.finish(start)?;
            written.drain(..).for_each(|(oid, pos)| {
                self.index.insert(oid, pos);
            });
            // What this transaction made itself is there now. What the live index does not know never existed.
            let lost = |oid: &Oid| {
                self.index.get(*oid).is_none() && missing.is_some_and(|m| m.live.get(*oid).is_some())
            };
            if let Some(oid) = suspects.iter().copied().find(lost) {
                return Ok(Some(oid));
            }
            suspects.clear();
        }
        Ok(None)
    }

    /// A kept record of the time before the pack time: its own data, no history.
    fn copy_resolved(&mut self, walk: &mut Walk<'_>, record: &RecordAt, start: u64) -> Result<()> {
        let here = self.out.pos();
        if self.marked.targets.binary_search(&record.pos).is_ok() {
            self.moved.push((record.pos, here));
        }
        self.index.insert(record.header.oid, here);
        if record.header.plen > 0 {
            self.write_header(record, 0, start, record.header.plen)?;
            return walk.payload_pieces(record, &mut |piece| self.out.write(piece));
        }
        let data = self.window.data(record.pos, false)?.map(|(_, data)| data.to_vec());
        self.write_data(record, 0, start, data.as_deref())
    }

    /// New position of a record that a back-pointer leads to; `Some(0)` for no record, `None` if it was dropped.
    fn new_pos(&self, old: u64) -> Option<u64> {
        if old == 0 {
            return Some(0);
        }
        if old < self.pack_pos {
            let i = self.moved.binary_search_by_key(&old, |&(old, _)| old).ok()?;
            return self.moved.get(i).map(|&(_, new)| new);
        }
        let after = self.shifts.partition_point(|&(from, _)| from <= old);
        let &(from, new) = self.shifts.get(after.checked_sub(1)?)?;
        (new > 0).then(|| new + (old - from))
    }

    /// Remembers where a record goes, unless it follows from the one before.
    fn note_shift(&mut self, old: u64, new: u64) {
        let follows = self.shifts.last().is_some_and(|&(from, to)| to > 0 && new - to == old - from);
        if !follows {
            self.shifts.push((old, new));
        }
    }

    /// Begins a transaction; its length follows in [`Self::finish`].
    fn begin(&mut self, walk: &mut Walk<'_>, txn: &TxnAt, status: u8) -> Result<()> {
        self.samples.append(txn.header.tid, self.out.pos());
        self.out.write(&TxnHeader { status, tlen: 0, ..txn.header }.encode())?;
        self.out.write(walk.meta(txn)?)
    }

    fn finish(&mut self, start: u64) -> Result<()> {
        let tlen = self.out.pos() - start;
        self.out.patch(start + 8, tlen)?;
        self.out.write(&tlen.to_be_bytes())
    }

    fn write_header(&mut self, record: &RecordAt, prev: u64, tloc: u64, plen: u64) -> Result<()> {
        self.out.write(&DataHeader { prev, tloc, plen, ..record.header }.encode())
    }

    /// A record with data, or a tombstone.
    fn write_data(&mut self, record: &RecordAt, prev: u64, tloc: u64, data: Option<&[u8]>) -> Result<()> {
        let data = data.unwrap_or_default();
        self.write_header(record, prev, tloc, data.len() as u64)?;
        self.out.write(if data.is_empty() { &[0; 8] } else { data })
    }
}
