//! Data records as an application may wrap them: `zc.zlibstorage` compresses them.
//!
//! A wrapped record is `.z` and a zlib stream; a plain one never starts so (`.` would end its pickle at once).

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::Read;

use flate2::read::ZlibDecoder;

use super::{References, Result, StorageError};
use crate::ids::Oid;
use crate::limits::MAX_FRAME;
use crate::pickle::refs::ReferenceScanner;

/// The record itself, decompressed where it is compressed. Errors: `Invalid` for a damaged stream.
pub fn untransform(record: &[u8]) -> Result<Cow<'_, [u8]>> {
    let Some(stream) = record.strip_prefix(b".z") else { return Ok(Cow::Borrowed(record)) };
    let mut plain = Vec::new();
    let read = ZlibDecoder::new(stream).take(MAX_FRAME as u64 + 1).read_to_end(&mut plain);
    match read {
        Ok(0) => Ok(Cow::Borrowed(record)),
        Ok(n) if n > MAX_FRAME => Err(StorageError::Invalid("compressed record of more than 1 GiB".into())),
        Ok(_) => Ok(Cow::Owned(plain)),
        Err(e) => Err(StorageError::Invalid(format!("damaged compressed record: {e}"))),
    }
}

/// References of plain and of compressed records, as `ZODB.serialize.referencesf` finds them.
#[derive(Debug, Default)]
pub struct RecordReferences;

thread_local! {
    /// Keeps its memory from record to record.
    static SCANNER: RefCell<ReferenceScanner> = RefCell::default();
}

impl References for RecordReferences {
    fn references(&self, record: &[u8], out: &mut Vec<Oid>) -> Result<()> {
        let plain = untransform(record)?;
        SCANNER
            .with_borrow_mut(|scanner| scanner.scan(&plain, out))
            .map_err(|e| StorageError::Invalid(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const RECORD: &[u8] = b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x00.\x80\x03C\x08\0\0\0\0\0\0\0\x07q\x01h\x00\x86q\x02Q.";

    fn compressed(record: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::ZlibEncoder::new(b".z".to_vec(), flate2::Compression::default());
        out.write_all(record).unwrap();
        out.finish().unwrap()
    }

    #[test]
    fn references_of_plain_and_compressed_records() {
        for record in [RECORD.to_vec(), compressed(RECORD)] {
            let mut oids = Vec::new();
            RecordReferences.references(&record, &mut oids).unwrap();
            assert_eq!(oids, [Oid(7)]);
        }
    }

    #[test]
    fn damage_is_an_error_and_emptiness_is_as_zlibstorage_has_it() {
        let whole = compressed(RECORD);
        for damaged in [&whole[..whole.len() / 2], b".zzzz"] {
            assert!(RecordReferences.references(damaged, &mut Vec::new()).is_err());
        }
        assert_eq!(untransform(&compressed(b"")).unwrap(), compressed(b""));
    }
}
