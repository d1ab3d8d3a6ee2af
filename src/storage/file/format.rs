//! Byte layout of Data.fs: headers to and from bytes. Pure.
//!
//! ```text
//! file        := "FS30" transaction*
//! transaction := header(23) user description extension record* tlen(8)
//! record      := header(42) (payload | back-pointer(8))
//! ```
//! Everything is big-endian. `tlen` is the length of the transaction without its trailing copy of `tlen`; the copy lets
//! readers walk backwards. A record without payload has 8 bytes instead: the position of an earlier record that holds
//! the data, or 0 (the object does not exist: a tombstone). See `docs/filestorage.md`.

use crate::ids::{Oid, Tid};

pub const MAGIC: [u8; 4] = *b"FS30";
/// Position of the first transaction.
pub const FIRST_TXN: u64 = 4;
pub const TXN_HEADER_LEN: usize = 23;
pub const DATA_HEADER_LEN: usize = 42;
/// Offset of the status byte in a transaction.
pub const STATUS_OFFSET: u64 = 16;
/// Index files hold positions of 6 bytes, so a file ends below this.
pub const MAX_POS: u64 = 1 << 48;

/// Status bytes. Others are read as `NORMAL`, with a warning.
pub mod status {
    pub const NORMAL: u8 = b' ';
    /// Voted by ZODB, not finished: end of the file for readers.
    pub const CHECKPOINT: u8 = b'c';
    pub const PACKED: u8 = b'p';
    /// Undone by an obsolete kind of undo: the records do not count.
    pub const UNDONE: u8 = b'u';
}

/// Header of a transaction, without its metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxnHeader {
    pub tid: Tid,
    /// Length of the transaction without the trailing copy of this number.
    pub tlen: u64,
    pub status: u8,
    pub user_len: u16,
    pub description_len: u16,
    pub extension_len: u16,
}

impl TxnHeader {
    /// `None` if `bytes` is shorter than a header.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.first_chunk::<TXN_HEADER_LEN>()?;
        Some(Self {
            tid: Tid(be64(bytes, 0)?),
            tlen: be64(bytes, 8)?,
            status: bytes[16],
            user_len: be16(bytes, 17)?,
            description_len: be16(bytes, 19)?,
            extension_len: be16(bytes, 21)?,
        })
    }

    pub fn encode(&self) -> [u8; TXN_HEADER_LEN] {
        let mut out = [0; TXN_HEADER_LEN];
        out[..8].copy_from_slice(&self.tid.to_bytes());
        out[8..16].copy_from_slice(&self.tlen.to_be_bytes());
        out[16] = self.status;
        out[17..19].copy_from_slice(&self.user_len.to_be_bytes());
        out[19..21].copy_from_slice(&self.description_len.to_be_bytes());
        out[21..].copy_from_slice(&self.extension_len.to_be_bytes());
        out
    }

    /// Length of user, description and extension together.
    pub fn meta_len(&self) -> usize {
        usize::from(self.user_len) + usize::from(self.description_len) + usize::from(self.extension_len)
    }

    /// Header and metadata: offset of the first record.
    pub fn full_len(&self) -> u64 {
        (TXN_HEADER_LEN + self.meta_len()) as u64
    }

    /// Position after the transaction that starts at `pos`; `None` if the length overflows.
    pub fn end(&self, pos: u64) -> Option<u64> {
        pos.checked_add(self.tlen)?.checked_add(8)
    }
}

/// Header of a data record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataHeader {
    pub oid: Oid,
    /// The revision's tid. Only `restore` makes it differ from the transaction's.
    pub tid: Tid,
    /// Position of the object's previous record, or 0.
    pub prev: u64,
    /// Position of the transaction that holds the record.
    pub tloc: u64,
    /// Length of a version's name in old files; must be 0.
    pub version_len: u16,
    /// Payload length; 0: a back-pointer of 8 bytes follows.
    pub plen: u64,
}

impl DataHeader {
    /// `None` if `bytes` is shorter than a header.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.first_chunk::<DATA_HEADER_LEN>()?;
        Some(Self {
            oid: Oid(be64(bytes, 0)?),
            tid: Tid(be64(bytes, 8)?),
            prev: be64(bytes, 16)?,
            tloc: be64(bytes, 24)?,
            version_len: be16(bytes, 32)?,
            plen: be64(bytes, 34)?,
        })
    }

    pub fn encode(&self) -> [u8; DATA_HEADER_LEN] {
        let mut out = [0; DATA_HEADER_LEN];
        out[..8].copy_from_slice(&self.oid.to_bytes());
        out[8..16].copy_from_slice(&self.tid.to_bytes());
        out[16..24].copy_from_slice(&self.prev.to_be_bytes());
        out[24..32].copy_from_slice(&self.tloc.to_be_bytes());
        out[32..34].copy_from_slice(&self.version_len.to_be_bytes());
        out[34..].copy_from_slice(&self.plen.to_be_bytes());
        out
    }

    /// What follows the header: the payload, or the 8 bytes of a back-pointer.
    pub fn body_len(&self) -> u64 {
        if self.plen == 0 { 8 } else { self.plen }
    }

    /// Position after the record that starts at `pos`; `None` if the length overflows.
    pub fn end(&self, pos: u64) -> Option<u64> {
        pos.checked_add(DATA_HEADER_LEN as u64)?.checked_add(self.body_len())
    }
}

/// Big-endian `u64` at `at`; `None` beyond the end.
pub fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transaction_header_of_the_specification() {
        let bytes = b"\x03\xf5\x8e\0\x11\x11\x11\x11\0\0\0\0\0\0\0\x51 \0\0\0\x08\0\0undo v=3";
        let header = TxnHeader::parse(bytes).unwrap();
        assert_eq!(header.tid, Tid(0x03f5_8e00_1111_1111));
        assert_eq!((header.tlen, header.status, header.full_len()), (81, status::NORMAL, 31));
        assert_eq!(header.end(758), Some(758 + 89));
        assert_eq!(header.encode()[..], bytes[..TXN_HEADER_LEN]);
        assert_eq!(TxnHeader::parse(&bytes[..22]), None);
    }

    #[test]
    fn data_header_of_the_specification() {
        let header = DataHeader {
            oid: Oid(1),
            tid: Tid(0x03f5_8e00_1111_1111),
            prev: 633,
            tloc: 758,
            version_len: 0,
            plen: 0,
        };
        let bytes = header.encode();
        assert_eq!(bytes[16..32], *b"\0\0\0\0\0\0\x02\x79\0\0\0\0\0\0\x02\xf6");
        assert_eq!(DataHeader::parse(&bytes), Some(header));
        assert_eq!(header.end(789), Some(789 + 50));
        assert_eq!(DataHeader { plen: u64::MAX, ..header }.end(789), None);
    }
}
