//! The shelf: current revisions that a server puts where all clients of its machine can read them, without asking it.
//!
//! It is a file without a name, in memory. The server writes it ([`Shelf`]); a client that comes over a Unix socket is handed a
//! descriptor that can only read ([`ShelfReader`], `docs/decisions/0007-shelf.md`). Nothing that a client does is seen by the server or by
//! other clients, and no memory is shared: both sides use `pread` and `pwrite`.
//!
//! # Format 1
//! A file of `capacity` bytes: a table of buckets, then a ring of data.
//!
//! | part | bytes | what |
//! | --- | --- | --- |
//! | bucket | 128 | four entries; which bucket: [`Layout::bucket`] of the oid |
//! | entry | 32 | oid (u64), tid (u64), position in the file (u64), length of the data (u32), CRC-32 of these 28 bytes and the data; integers little-endian; length 0: empty |
//! | ring | the rest | label (oid and tid as in the entry, 16 bytes) and data, one after the other, over and over again; never split |
//!
//! What has been overwritten since has another label, what is being written while it is read does not match its checksum; both are not
//! there. (Entries whose data is overwritten stay: a busy shelf has many, and a checksum that fits by chance must not be enough.)
//!
//! # What it promises
//! An entry that a reader finds was current at some moment after the reader began: it is taken away before anybody is told of the
//! transaction that ends it. Why that is enough for both sides: `docs/ordering.md`.

mod reader;
mod writer;

use flate2::Crc;

use crate::ids::{Oid, Tid};

pub(crate) use reader::ShelfReader;
pub(crate) use writer::{Shelf, Ticket};

/// Of the format; a reader that does not know it reads nothing.
pub(crate) const FORMAT: u64 = 1;
/// Larger data is not put there.
const MAX_DATA: usize = 64 << 10;
const ENTRY: usize = 32;
/// Before the data.
const LABEL: usize = 16;
const WAYS: usize = 4;
const BUCKET: usize = WAYS * ENTRY;
/// The table is about a sixteenth of it all: room for an entry for each 512 bytes.
const BYTES_PER_BUCKET: u64 = 2048;
const MIN_CAPACITY: u64 = 1 << 20;
const MAX_CAPACITY: u64 = 1 << 40;

/// Where things are in a file of some capacity.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Layout {
    capacity: u64,
    /// Number of buckets: two to this.
    bits: u32,
}

impl Layout {
    /// `None`: no size for a shelf.
    fn new(capacity: u64) -> Option<Self> {
        let bits = (capacity / BYTES_PER_BUCKET).checked_ilog2()?;
        (MIN_CAPACITY..=MAX_CAPACITY).contains(&capacity).then_some(Self { capacity, bits })
    }

    fn buckets(self) -> usize {
        1 << self.bits
    }

    fn bucket(self, oid: Oid) -> usize {
        // oids are dense integers: Fibonacci hashing spreads neighbours.
        (oid.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - self.bits)) as usize
    }

    fn ring(self) -> u64 {
        (self.buckets() * BUCKET) as u64
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Entry {
    oid: Oid,
    tid: Tid,
    position: u64,
    length: u32,
    checksum: u32,
}

impl Entry {
    fn new(oid: Oid, tid: Tid, position: u64, data: &[u8]) -> Self {
        let mut entry = Self { oid, tid, position, length: data.len() as u32, checksum: 0 };
        entry.checksum = entry.checksum_of(data);
        entry
    }

    fn checksum_of(&self, data: &[u8]) -> u32 {
        let mut crc = Crc::new();
        crc.update(self.encode().get(..ENTRY - 4).unwrap_or_default());
        crc.update(data);
        crc.sum()
    }

    fn encode(&self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        let fields = [
            &self.oid.0.to_le_bytes()[..],
            &self.tid.0.to_le_bytes(),
            &self.position.to_le_bytes(),
            &self.length.to_le_bytes(),
            &self.checksum.to_le_bytes(),
        ];
        let mut rest = &mut bytes[..];
        for field in fields {
            let (place, after) = rest.split_at_mut(field.len());
            place.copy_from_slice(field);
            rest = after;
        }
        bytes
    }

    /// What its data begins with.
    fn label(&self) -> [u8; LABEL] {
        let [oid, tid] = [self.oid.0, self.tid.0].map(u64::to_le_bytes);
        std::array::from_fn(|i| if i < 8 { oid[i] } else { tid[i - 8] })
    }

    fn decode(bytes: &[u8; ENTRY]) -> Self {
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let short = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Self {
            oid: Oid(long(0)),
            tid: Tid(long(8)),
            position: long(16),
            length: short(24),
            checksum: short(28),
        }
    }
}

#[cfg(test)]
mod tests;
