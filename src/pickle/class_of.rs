//! The class of a data record, by name: its first pickle is the class, or a tuple of it and constructor arguments.

use bytes::Bytes;

use super::decode::{Globals, decode_first};
use super::{Value, opcode as op};

/// Module and name of the class of `record`, as ZODB's `get_pickle_metadata` finds them; `None` if it is unknown or
/// not given by name.
pub fn class_of(record: &[u8]) -> Option<(String, String)> {
    let plain = match record {
        [op::PROTO, _, rest @ ..] => rest,
        rest => rest,
    };
    if let [op::GLOBAL, lines @ ..] | [op::MARK, op::GLOBAL, lines @ ..] = plain {
        let mut lines = lines.splitn(3, |byte| *byte == b'\n');
        let (module, name, _) = (lines.next()?, lines.next()?, lines.next()?);
        return Some((String::from_utf8(module.to_vec()).ok()?, String::from_utf8(name.to_vec()).ok()?));
    }
    let (class, _) = decode_first(&Bytes::copy_from_slice(record), Globals::Stored).ok()?;
    named(&class).or_else(|| named(class.as_items()?.first()?))
}

/// A class as a global or as the pair `(module, name)`.
fn named(class: &Value) -> Option<(String, String)> {
    match class {
        Value::Global { module, name } => Some((module.clone(), name.clone())),
        Value::Tuple(pair) => match pair.as_slice() {
            [Value::Str(module), Value::Str(name)] => Some((module.clone(), name.clone())),
            _ => None,
        },
        _ => None,
    }
}

/// For messages: `module.Class`, or that it is unknown.
pub(super) fn shown(record: &[u8]) -> String {
    class_of(record)
        .map_or_else(|| "record of unknown class".into(), |(module, name)| format!("{module}.{name}"))
}

/// Whether `record` is that of a blob, as `ZODB.blob.is_blob_record` says: its class is `ZODB.blob.Blob` without
/// constructor arguments.
///
/// Cost: a comparison of the first bytes.
pub fn is_blob_record(record: &[u8]) -> bool {
    let plain = match record {
        [op::PROTO, 0..=5, rest @ ..] => rest,
        rest => rest,
    };
    let Some(rest) = plain.strip_prefix(b"cZODB.blob\nBlob\n") else { return false };
    match rest {
        [op::STOP, ..] | [op::BINPUT, _, op::STOP, ..] | [op::LONG_BINPUT, _, _, _, _, op::STOP, ..] => true,
        [op::PUT, line @ ..] => line
            .iter()
            .position(|byte| !byte.is_ascii_digit())
            .is_some_and(|end| line.get(end..).is_some_and(|rest| rest.starts_with(&[b'\n', op::STOP]))),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_class() {
        let thing = Some(("my.app".to_owned(), "Thing".to_owned()));
        for record in [
            &b"cmy.app\nThing\nq\x01."[..],
            b"\x80\x03cmy.app\nThing\nq\x01.",
            b"\x80\x03cmy.app\nThing\nq\x01N\x86.",
            b"(cmy.app\nThing\nNt.",
            b"\x80\x03X\x06\0\0\0my.appX\x05\0\0\0Thing\x86N\x86.",
            b"((U\x06my.appU\x05Thingtq\x01Nt.",
            b"\x80\x04\x8c\x06my.app\x8c\x05Thing\x93.",
        ] {
            assert_eq!(class_of(record), thing, "{}", record.escape_ascii());
        }
        for record in
            [&b""[..], b"data", b"\x80\x03K\x01.", b"\x80\x03C\x08\0\0\0\0\0\0\0\x01Q.", b"cmy.app\nThing"]
        {
            assert_eq!(class_of(record), None, "{}", record.escape_ascii());
        }
    }

    #[test]
    fn blob_records() {
        for (record, is_blob) in [
            (&b"\x80\x03cZODB.blob\nBlob\nq\0.\x80\x03N."[..], true),
            (b"cZODB.blob\nBlob\np12\n.N.", true),
            (b"cZODB.blob\nBlob\n.N.", true),
            (b"cZODB.blob\nBlobby\n.N.", false),
            (b"\x80\x03cZODB.blob\nBlob\nq\0N\x86.", false),
            (b"", false),
        ] {
            assert_eq!(is_blob_record(record), is_blob, "{}", record.escape_ascii());
        }
    }
}
