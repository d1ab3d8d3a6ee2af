//! `zeo-rs dump`: transactions and records of a data file as text, line for line as ZODB's `fsdump` prints them.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use super::file::{OsFile, StorageFile};
use super::format::{DATA_HEADER_LEN, DataHeader, FIRST_TXN, TXN_HEADER_LEN, TxnHeader, status};
use super::walk::Walk;
use super::window::Window;
use crate::ids::Tid;
use crate::pickle::class_of::class_of;
use crate::storage::transform::untransform;
use crate::storage::{Result, StorageError};

/// Writes the content of the data file at `path` to `out`. A transaction at the end that was not finished (status `c`, or
/// longer than the file) is left out; one with a status that means nothing is listed.
///
/// Errors: `Corrupted` at the first damage (what is before it has been written), `Io`.
pub fn dump(path: &Path, out: &mut dyn Write) -> Result<()> {
    let name = path.display().to_string();
    let file = File::open(path).map_err(|e| StorageError::io(format!("cannot open {name}"), e))?;
    let file = OsFile(file);
    let size = file.len().map_err(|e| StorageError::io(format!("cannot read {name}"), e))?;
    if !super::scan::check_magic(&file, &name)? {
        return Ok(());
    }
    let mut walk = Walk::new(&file, &name, FIRST_TXN, size, false).with_any_status();
    let mut window = Window::new(&file, &name);
    let mut number = 0;
    while let Some(txn) = walk.next_txn().or_else(|error| unfinished(&file, &name, size, error))? {
        if txn.header.status == status::UNDONE {
            continue;
        }
        let written = {
            let [ulen, dlen] = [txn.header.user_len, txn.header.description_len].map(usize::from);
            let meta = walk.meta(&txn)?;
            let (user, rest) = meta.split_at(ulen.min(meta.len()));
            let description = rest.get(..dlen).unwrap_or_default();
            let header = &txn.header;
            writeln!(
                out,
                "Trans #{number:05} tid={:016x} size={} time={} offset={}\n    status={} user={} description={}",
                header.tid.0,
                header.tlen,
                time(header.tid),
                txn.pos + header.full_len(),
                quoted(&[header.status]).trim_start_matches('b'),
                quoted(user),
                quoted(description),
            )
        };
        written.map_err(cannot_write)?;
        let mut record_number = 0;
        while let Some(record) = walk.next_record()? {
            let class = match window.data(record.pos, true)? {
                Some((_, data)) => {
                    let plain = untransform(data)?;
                    let (module, name) = class_of(&plain).unwrap_or_default();
                    format!(" size={} class={module}.{name}", data.len())
                }
                None => " class=undo or abort of object creation".into(),
            };
            let source =
                if record.back == 0 { String::new() } else { source_txn(&file, &name, record.back)? };
            let line = format!("  data #{record_number:05} oid={:016x}{class}{source}", record.header.oid.0);
            writeln!(out, "{line}").map_err(cannot_write)?;
            record_number += 1;
        }
        number += 1;
    }
    Ok(())
}

/// What cannot be a transaction is the end if it can be one that is being written, or was when the machine stopped: its header
/// is cut off, reaches beyond the file or says that it is not finished, and no whole transaction ends the file after it.
fn unfinished<T>(file: &dyn StorageFile, name: &str, size: u64, error: StorageError) -> Result<Option<T>> {
    let StorageError::Corrupted { pos, what, .. } = &error else { return Err(error) };
    let failed = |e| StorageError::io(format!("cannot read {name}"), e);
    let header_at = |pos| -> Result<Option<TxnHeader>> {
        let mut bytes = [0; TXN_HEADER_LEN];
        let n = file.read_at(&mut bytes, pos).map_err(failed)?;
        Ok(TxnHeader::parse(bytes.get(..n).unwrap_or_default()))
    };
    let being_written = header_at(*pos)?.is_none_or(|header| {
        let beyond = header.tlen >= header.full_len() && header.end(*pos).is_none_or(|end| end > size);
        beyond || header.status == status::CHECKPOINT
    });
    let mut length = [0; 8];
    let at = size.saturating_sub(8);
    let n = file.read_at(&mut length, at).map_err(failed)?;
    let tlen = u64::from_be_bytes(length);
    let last = at.checked_sub(tlen).filter(|start| n == 8 && start > pos);
    let whole_after = match last {
        Some(start) => header_at(start)?.is_some_and(|header| header.tlen == tlen),
        None => false,
    };
    if !being_written || whole_after {
        return Err(error);
    }
    tracing::warn!("{what} at {pos}: not finished, not listed");
    Ok(None)
}

fn source_txn(file: &dyn StorageFile, name: &str, pos: u64) -> Result<String> {
    let mut bytes = [0; DATA_HEADER_LEN];
    file.read_at(&mut bytes, pos).map_err(|e| StorageError::io(format!("cannot read {name}"), e))?;
    Ok(DataHeader::parse(&bytes).map_or(String::new(), |header| format!(" bp={:016x}", header.tid.0)))
}

fn cannot_write(e: io::Error) -> StorageError {
    StorageError::io("cannot write the listing", e)
}

/// As `str(TimeStamp)`: `2024-01-01 00:00:00.000000`.
fn time(tid: Tid) -> String {
    let minutes = tid.0 >> 32;
    let (minute, hours) = (minutes % 60, minutes / 60);
    let (hour, days) = (hours % 24, hours / 24);
    let (day, months) = (days % 31 + 1, days / 31);
    let (month, year) = (months % 12 + 1, months / 12 + 1900);
    let seconds = f64::from(tid.0 as u32) * (60.0 / 65536.0 / 65536.0);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{seconds:09.6}")
}

/// As Python's `repr` of bytes.
fn quoted(bytes: &[u8]) -> String {
    let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') { '"' } else { '\'' };
    let mut text = format!("b{quote}");
    for &byte in bytes {
        match byte {
            b'\t' => text.push_str("\\t"),
            b'\n' => text.push_str("\\n"),
            b'\r' => text.push_str("\\r"),
            b'\\' => text.push_str("\\\\"),
            _ if char::from(byte) == quote => text.extend(['\\', quote]),
            0x20..=0x7e => text.push(char::from(byte)),
            _ => text.push_str(&format!("\\x{byte:02x}")),
        }
    }
    text.push(quote);
    text
}
