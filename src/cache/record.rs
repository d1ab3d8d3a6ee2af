//! Records of the cache's index file.
//!
//! A header (`ZRC2`, 4 zero bytes, generation, CRC-32 of these 16 bytes), then records: a kind, its fields, a CRC-32. Integers are
//! big-endian. The CRC covers the generation of the file and the position of the record as well, so that bytes of another
//! file or place are never taken for a record.
//!
//! | kind | fields | meaning |
//! | --- | --- | --- |
//! | `R` | oid, tid, end, offset, length (u32), checksum (u32) | a revision; end all ones: current; where its data is |
//! | `I` | oid, tid | its current revision ended at tid; 0: is forgotten |
//! | `F` | oid | all its revisions are forgotten |
//! | `T` | tid | everything up to tid is above |
//! | `C` | | everything is forgotten |

use std::io::{self, Read};

use crate::ids::{Oid, Tid};

pub(super) const MAGIC: [u8; 8] = *b"ZRC2\0\0\0\0";
pub(super) const HEADER: u64 = 20;
/// Bytes of an `R` record.
pub(super) const REVISION: u64 = 45;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Revision { oid: Oid, tid: Tid, end: Option<Tid>, offset: u64, length: u32, checksum: u32 },
    Invalidate { oid: Oid, tid: Option<Tid> },
    Forget { oid: Oid },
    LastTid(Tid),
    Clear,
}

pub(super) fn header(generation: u64) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&generation.to_be_bytes());
    let sum = checksum(&[&out]);
    out.extend_from_slice(&sum.to_be_bytes());
    out
}

/// The generation; `None` if it is no header.
pub(super) fn read_header(reader: &mut impl Read) -> Option<u64> {
    let mut bytes = [0; HEADER as usize];
    reader.read_exact(&mut bytes).ok()?;
    let (head, sum) = bytes.split_last_chunk::<4>()?;
    let right = head[..8] == MAGIC && checksum(&[head]) == u32::from_be_bytes(*sum);
    right.then(|| number(head, 8)).flatten()
}

/// Appends to `out`, of which the first byte will be at `start` in the file of that generation.
pub(super) fn put(out: &mut Vec<u8>, generation: u64, start: u64, record: &Record) {
    let begin = out.len();
    let mut write = |kind: u8, numbers: &[u64], small: &[u32]| {
        out.push(kind);
        numbers.iter().for_each(|number| out.extend_from_slice(&number.to_be_bytes()));
        small.iter().for_each(|number| out.extend_from_slice(&number.to_be_bytes()));
    };
    match *record {
        Record::Revision { oid, tid, end, offset, length, checksum } => {
            let end = end.map_or(u64::MAX, |end| end.0);
            write(b'R', &[oid.0, tid.0, end, offset], &[length, checksum]);
        }
        Record::Invalidate { oid, tid } => write(b'I', &[oid.0, tid.map_or(0, |tid| tid.0)], &[]),
        Record::Forget { oid } => write(b'F', &[oid.0], &[]),
        Record::LastTid(tid) => write(b'T', &[tid.0], &[]),
        Record::Clear => write(b'C', &[], &[]),
    }
    let at = start + begin as u64;
    let sum = checksum(&[&generation.to_be_bytes(), &at.to_be_bytes(), out.get(begin..).unwrap_or_default()]);
    out.extend_from_slice(&sum.to_be_bytes());
}

/// The next record and its bytes in the file; `None` at the end, or where the file is damaged.
///
/// # Errors
/// Reading failed.
pub(super) fn read(reader: &mut impl Read, generation: u64, at: u64) -> io::Result<Option<(Record, u64)>> {
    let mut bytes = [0; REVISION as usize];
    if !fill(reader, &mut bytes[..1])? {
        return Ok(None);
    }
    let length = match bytes[0] {
        b'R' => REVISION as usize,
        b'I' => 21,
        b'F' | b'T' => 13,
        b'C' => 5,
        _ => return Ok(None),
    };
    if !fill(reader, &mut bytes[1..length])? {
        return Ok(None);
    }
    let Some((body, sum)) = bytes[..length].split_last_chunk::<4>() else { return Ok(None) };
    if checksum(&[&generation.to_be_bytes(), &at.to_be_bytes(), body]) != u32::from_be_bytes(*sum) {
        return Ok(None);
    }
    Ok(parse(body).map(|record| (record, length as u64)))
}

fn parse(body: &[u8]) -> Option<Record> {
    Some(match body.first()? {
        b'R' => {
            let end = number(body, 17)?;
            let small = number(body, 33)?;
            Record::Revision {
                oid: Oid(number(body, 1)?),
                tid: Tid(number(body, 9)?),
                end: (end != u64::MAX).then_some(Tid(end)),
                offset: number(body, 25)?,
                length: (small >> 32) as u32,
                checksum: small as u32,
            }
        }
        b'I' => {
            let tid = number(body, 9)?;
            Record::Invalidate { oid: Oid(number(body, 1)?), tid: (tid != 0).then_some(Tid(tid)) }
        }
        b'F' => Record::Forget { oid: Oid(number(body, 1)?) },
        b'T' => Record::LastTid(Tid(number(body, 1)?)),
        _ => Record::Clear,
    })
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// False if the file ends before.
fn fill(reader: &mut impl Read, bytes: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn checksum(parts: &[&[u8]]) -> u32 {
    let mut crc = flate2::Crc::new();
    parts.iter().for_each(|part| crc.update(part));
    crc.sum()
}
