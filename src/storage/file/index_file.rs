//! The index file, NAME.index, in ZODB's format: a cache of the index, so that opening need not read the data file.
//!
//! ```text
//! pickle(end) { pickle((prefix, block)) }* pickle(None)     protocol 3, no memo
//! ```
//! `prefix` is the first 6 bytes of the oids of a block, ascending; `block` is n suffixes of 2 bytes, ascending, then n
//! positions of 6 bytes. Older spellings that ZODB still reads are taken for "no index": the file is scanned instead.
//!
//! It is written to NAME.index.index_tmp, synced and renamed: a torn index could have wrong positions that the check
//! on opening (which looks at the newest transaction) would not see.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::format::FIRST_TXN;
use super::index::Index;
use super::snapshot::Snapshot;
use crate::ids::Oid;
use crate::storage::{Result, StorageError};

const PROTO: [u8; 2] = [0x80, 3];
const STOP: u8 = b'.';
/// For what is between the blocks; a block, of at most 512 KiB, is read into a buffer of its own.
const READ_SIZE: usize = 8 << 10;

/// NAME + `suffix`.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Saves the index of `snapshot` as of its current end, durably, beside `path`. Commits may go on meanwhile: an object
/// that has been written since is saved with the position it had. Answers `None`, and leaves the index file alone, if
/// the snapshot is no longer current when it is to get its name, which happens under the lock `names`.
pub(super) fn save(
    path: &Path,
    snapshot: &Snapshot,
    names: &Mutex<()>,
    is_current: &dyn Fn() -> bool,
) -> Result<Option<u64>> {
    let end = snapshot.end();
    let temp = beside(path, ".index.index_tmp");
    let failed = |e| StorageError::io(format!("cannot save the index of {}", path.display()), e);
    let make = || {
        let file = File::create(&temp).map_err(failed)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write(&mut out, snapshot, end)?.map_err(failed)?;
        let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_data().map_err(failed)
    };
    // On a full disk half an index would take the room that is left.
    make().inspect_err(|_| drop(std::fs::remove_file(&temp)))?;
    let _names = names.lock().unwrap_or_else(PoisonError::into_inner);
    if !is_current() {
        std::fs::remove_file(&temp).map_err(failed)?;
        return Ok(None);
    }
    std::fs::rename(&temp, beside(path, ".index")).map_err(failed)?;
    Ok(Some(end))
}

/// The outer error is of reading the data file, the inner one of writing the index.
fn write(out: &mut dyn Write, snapshot: &Snapshot, end: u64) -> Result<io::Result<()>> {
    let mut block = Block::default();
    let mut result = write_head(out, end);
    let mut read_error = None;
    snapshot.index.for_each_from(Oid(0), &mut |oid, pos| {
        let pos = match position_below(snapshot, oid, pos, end) {
            Ok(Some(pos)) => pos,
            Ok(None) => return true,
            Err(e) => {
                read_error = Some(e);
                return false;
            }
        };
        if block.prefix != oid.0 >> 16 {
            result = block.flush(out);
            block.prefix = oid.0 >> 16;
        }
        block.push(oid, pos);
        result.is_ok()
    });
    match read_error {
        Some(e) => Err(e),
        None => {
            Ok(result.and_then(|()| block.flush(out)).and_then(|()| out.write_all(&[0x80, 3, b'N', STOP])))
        }
    }
}

/// Position of the newest record of `oid` below `end`.
fn position_below(snapshot: &Snapshot, oid: Oid, mut pos: u64, end: u64) -> Result<Option<u64>> {
    while pos >= end {
        let head = snapshot.head_of(oid, pos)?;
        pos = snapshot.previous(pos, &head)?;
    }
    Ok((pos != 0).then_some(pos))
}

#[derive(Default)]
struct Block {
    prefix: u64,
    suffixes: Vec<u8>,
    positions: Vec<u8>,
}

impl Block {
    fn push(&mut self, oid: Oid, pos: u64) {
        self.suffixes.extend_from_slice(&(oid.0 as u16).to_be_bytes());
        let [_, _, low @ ..] = pos.to_be_bytes();
        self.positions.extend_from_slice(&low);
    }

    fn flush(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let len = self.suffixes.len() + self.positions.len();
        if len == 0 {
            return Ok(());
        }
        let [_, _, prefix @ ..] = self.prefix.to_be_bytes();
        out.write_all(&PROTO)?;
        out.write_all(&[b'C', 6])?;
        out.write_all(&prefix)?;
        match u8::try_from(len) {
            Ok(short) => out.write_all(&[b'C', short])?,
            // At most 65536 * 8 bytes.
            Err(_) => {
                out.write_all(b"B")?;
                out.write_all(&(len as u32).to_le_bytes())?;
            }
        }
        out.write_all(&self.suffixes)?;
        out.write_all(&self.positions)?;
        out.write_all(&[0x86, STOP])?;
        self.suffixes.clear();
        self.positions.clear();
        Ok(())
    }
}

fn write_head(out: &mut dyn Write, end: u64) -> io::Result<()> {
    out.write_all(&PROTO)?;
    match end {
        0..=0xff => out.write_all(&[b'K', end as u8])?,
        0x100..=0xffff => {
            out.write_all(b"M")?;
            out.write_all(&(end as u16).to_le_bytes())?;
        }
        0x1_0000..=0x7fff_ffff => {
            out.write_all(b"J")?;
            out.write_all(&(end as u32).to_le_bytes())?;
        }
        _ => {
            // LONG1: the fewest bytes whose top bit is the sign.
            let len = (64 - end.leading_zeros() as usize) / 8 + 1;
            out.write_all(&[0x8a, len as u8])?;
            let bytes = end.to_le_bytes();
            out.write_all(bytes.get(..len).unwrap_or(&bytes))?;
        }
    }
    out.write_all(&[STOP])
}

/// Reads the index beside `path`: the index and the end of the data file it was made for. `None` if there is none, or
/// it is not in this format, damaged, or has positions that the file cannot have.
pub(super) fn load(path: &Path) -> Option<(Index, u64)> {
    let file = beside(path, ".index");
    let source = match File::open(&file) {
        Ok(source) => source,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
        Err(e) => {
            tracing::warn!("cannot read {}, the data file will be scanned: {e}", file.display());
            return None;
        }
    };
    let parsed = parse(BufReader::with_capacity(READ_SIZE, source));
    if parsed.is_none() {
        tracing::warn!("{} is no index of the current format, the data file will be scanned", file.display());
    }
    parsed
}

fn parse(source: impl Read) -> Option<(Index, u64)> {
    let mut input = Input { source, block: Vec::new() };
    let end = input.head()?;
    let index = Index::new();
    let mut last_prefix = None;
    while let Some(prefix) = input.block()? {
        if last_prefix.is_some_and(|last| last >= prefix) {
            return None;
        }
        last_prefix = Some(prefix);
        let block = input.block.as_slice();
        let n = block.len() / 8;
        let (suffixes, raw_positions) = block.split_at_checked(2 * n).filter(|_| block.len() % 8 == 0)?;
        let (suffixes, positions) = (suffixes.as_chunks::<2>().0, raw_positions.as_chunks::<6>().0);
        let later = suffixes.get(1..).unwrap_or_default();
        // As numbers and without branches, so that the compiler does many at once.
        let number = |bytes: &[u8; 2]| u16::from_be_bytes(*bytes);
        let ascending = suffixes.iter().zip(later).fold(true, |ok, (a, b)| ok & (number(a) < number(b)));
        if !ascending || !index.extend_block(prefix, suffixes, positions, FIRST_TXN..end) {
            return None;
        }
    }
    Some((index, end))
}

struct Input<R> {
    source: R,
    /// The block read last.
    block: Vec<u8>,
}

impl<R: Read> Input<R> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.source.read_exact(&mut bytes).ok()?;
        Some(bytes)
    }

    fn byte(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    fn expect<const N: usize>(&mut self, bytes: [u8; N]) -> Option<()> {
        (self.array()? == bytes).then_some(())
    }

    fn head(&mut self) -> Option<u64> {
        self.expect(PROTO)?;
        let len = match self.byte()? {
            b'K' => 1,
            b'M' => 2,
            b'J' => 4,
            0x8a => usize::from(self.byte()?),
            _ => return None,
        };
        let mut digits = [0; 8];
        self.source.read_exact(digits.get_mut(..len)?).ok()?;
        self.expect([STOP])?;
        Some(u64::from_le_bytes(digits))
    }

    /// Reads the next block; its prefix, or `Some(None)` at the final `None`.
    fn block(&mut self) -> Option<Option<u64>> {
        self.expect(PROTO)?;
        match self.byte()? {
            b'N' => return self.expect([STOP]).map(|()| None),
            b'C' => self.expect([6])?,
            _ => return None,
        }
        let [a, b, c, d, e, f] = self.array()?;
        let len = match self.byte()? {
            b'C' => usize::from(self.byte()?),
            b'B' => u32::from_le_bytes(self.array()?) as usize,
            _ => return None,
        };
        // At most 65536 objects of 8 bytes.
        self.block.resize(Some(len).filter(|&len| len <= 8 << 16)?, 0);
        self.source.read_exact(&mut self.block).ok()?;
        self.expect([0x86, STOP])?;
        Some(Some(u64::from_be_bytes([0, 0, a, b, c, d, e, f])))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::storage::file::file::OsFile;
    use crate::storage::file::samples::Samples;

    fn snapshot(entries: &[(u64, u64)], end: u64) -> Snapshot {
        let index = Index::new();
        for &(oid, pos) in entries {
            index.insert(Oid(oid), pos);
        }
        let file = Arc::new(OsFile(tempfile::tempfile().unwrap()));
        Snapshot::new(file, index, end, Samples::default(), "test".into())
    }

    fn encoded(entries: &[(u64, u64)], end: u64) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out, &snapshot(entries, end), end).unwrap().unwrap();
        out
    }

    #[test]
    fn bytes_of_the_specification() {
        let entries = [(0, 0xca), (1, 0x288), (2, 0x325), (3, 0x3ab)];
        let hex = "80034d2f042e80034306000000000000432000000001000200030000000000ca0000000002880000000003250000000003ab862e80034e2e";
        let bytes: String = encoded(&entries, 1071).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(bytes, hex);
        assert!(encoded(&[], 1 << 31).starts_with(b"\x80\x03\x8a\x05\0\0\0\x80\0."));
    }

    #[test]
    fn read_back() {
        let entries: Vec<_> = (0..3000)
            .map(|i| (i * 40, i + 500))
            .chain((0..3000).map(|i| (200_000 + i, i + 9)))
            .chain([(1 << 40, 5000), (u64::MAX, 70_000)])
            .collect();
        for end in [70_001, 1 << 31, 1 << 47] {
            let (index, found) = parse(&*encoded(&entries, end)).unwrap();
            assert_eq!((found, index.len()), (end, entries.len() as u64));
            assert!(entries.iter().all(|&(o, p)| index.get(Oid(o)) == Some(p)));
        }
    }

    #[test]
    fn anything_doubtful_is_no_index() {
        let good = encoded(&[(1, 200), (2, 300), (1 << 20, 400)], 1000);
        for cut in 0..good.len() {
            assert!(parse(&good[..cut]).is_none(), "{cut}");
        }
        let mut early = encoded(&[(1, 200)], 201);
        assert!(parse(&*early).is_some());
        early[3] = 200;
        assert!(parse(&*early).is_none(), "a position at the end");
        let swapped = encoded(&[(1, 200), (2, 300)], 1000);
        let at = swapped.windows(4).position(|w| w == [0, 1, 0, 2]).unwrap();
        let mut swapped = swapped;
        swapped[at..at + 4].copy_from_slice(&[0, 2, 0, 1]);
        assert!(parse(&*swapped).is_none(), "oids out of order");
    }

    /// Saving goes on beside commits: positions that are newer than the end it is saved for must not get in.
    #[test]
    fn what_is_written_meanwhile_is_left_out() {
        use crate::ids::Tid;
        use crate::storage::{NoResolution, Op, StagedTxn, Storage, VoteOutcome};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Data.fs");
        let storage = crate::storage::file::FileStorage::open(&path, Default::default()).unwrap();
        let commit = |oids: std::ops::Range<u64>| {
            let store = |oid| {
                let serial = storage.current_tid(Oid(oid)).unwrap_or(Tid::ZERO);
                Op::Store { oid: Oid(oid), serial, data: "data".into(), blob: None }
            };
            let txn = StagedTxn { ops: oids.map(store).collect(), ..Default::default() };
            let Ok(VoteOutcome::Ready(voted)) = storage.vote(txn, &NoResolution) else { panic!() };
            storage.finish(vec![voted], &mut |_| ()).unwrap();
        };
        commit(0..40);
        let (snapshot, end) = (storage.snapshot(), storage.size());
        let saved = || {
            let mut out = Vec::new();
            write(&mut out, &snapshot, end).unwrap().unwrap();
            out
        };
        let before = saved();
        commit(10..60);
        commit(20..70);
        assert_eq!(saved(), before);
    }
}
