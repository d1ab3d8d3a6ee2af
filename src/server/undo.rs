//! `undoInfo`, `undoLog`: which transactions can be undone, described as ZODB's dicts.

use std::sync::Arc;

use super::fault;
use super::hub::Hub;
use super::session::{Outcome, ReplyTo, Served, Session};
use crate::ids::Tid;
use crate::pickle::Value;
use crate::storage::UndoEntry;

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

impl Session {
    /// Entries `first..last` (or, if `last` is negative, `-last` entries) of those that `specification` admits.
    pub(crate) fn undo_info(
        &mut self,
        hub: &Arc<Hub>,
        to: &mut ReplyTo,
        first: i64,
        last: i64,
        specification: Value,
    ) -> Served {
        if !hub.capabilities.undo {
            return Ok(Outcome::Reply(Value::Tuple(Vec::new())));
        }
        let last = if last < 0 { first.saturating_sub(last) } else { last };
        let bound = |number: i64| usize::try_from(number.max(0)).unwrap_or(usize::MAX);
        let (first, last) = (bound(first), bound(last));
        let storage = Arc::clone(&hub.storage);
        let view = self.view;
        self.in_background(to, move || {
            let mut accept = |entry: &UndoEntry| entry.tid <= view && admits(&specification, entry);
            let entries = storage.undo_log(first, last, &mut accept)?;
            Ok(Value::List(entries.iter().map(describe).collect()))
        })
    }
}

fn describe(entry: &UndoEntry) -> Value {
    let fixed = [
        ("id", Value::bytes(&encode_trans_id(entry.tid))),
        ("time", entry.tid.to_unix().into()),
        ("user_name", entry.meta.user.clone().into()),
        ("size", entry.size.into()),
        ("description", entry.meta.description.clone().into()),
    ];
    with_extension(fixed, &entry.meta.extension, true)
}

/// A dict of `fixed` and of a stored extension's pairs, of which one side wins where they clash.
pub(crate) fn with_extension<'k>(
    fixed: impl IntoIterator<Item = (&'k str, Value)>,
    stored: &[u8],
    extension_wins: bool,
) -> Value {
    let mut more = fault::extension(stored);
    let mut pairs: Vec<(Value, Value)> = fixed.into_iter().map(|(key, value)| (key.into(), value)).collect();
    if extension_wins {
        pairs.retain(|(key, _)| !more.iter().any(|(other, _)| other == key));
    } else {
        more.retain(|(key, _)| !pairs.iter().any(|(other, _)| other == key));
    }
    pairs.append(&mut more);
    Value::Dict(pairs)
}

/// Whether every key of the specification has an equal value in the entry. Values of different types differ, except that
/// a `ZopeUndo.Prefix` admits every user path that it is a prefix of.
fn admits(specification: &Value, entry: &UndoEntry) -> bool {
    let Some(wanted) = specification.as_dict() else { return true };
    let described = describe(entry);
    let found =
        |key: &Value| described.as_dict()?.iter().find(|(other, _)| other == key).map(|(_, value)| value);
    wanted.iter().all(|(key, value)| {
        found(key).is_some_and(|found| match prefix_path(value) {
            Some(path) => has_prefix(found, &path),
            None => found == value,
        })
    })
}

/// The segments of a `ZopeUndo.Prefix.Prefix`.
fn prefix_path(value: &Value) -> Option<Vec<&str>> {
    let Value::Call { callable, state: Some(state), .. } = value else { return None };
    let is_prefix = matches!(&**callable, Value::Global { module, name } if module == "ZopeUndo.Prefix" && name == "Prefix");
    if !is_prefix {
        return None;
    }
    state.get("path")?.as_items()?.iter().map(Value::as_str).collect()
}

fn has_prefix(found: &Value, path: &[&str]) -> bool {
    let text = match found {
        Value::Str(text) => text.as_str(),
        Value::Bytes(bytes) => std::str::from_utf8(bytes).unwrap_or_default(),
        _ => return false,
    };
    // A user name follows the path, after a blank.
    let text = text.rsplit_once(' ').map_or(text, |(path, _)| path);
    let mut segments = text.split('/');
    path.iter().all(|wanted| segments.next() == Some(wanted))
}

/// The base64 text by which clients name a transaction to be undone.
pub(crate) fn encode_trans_id(tid: Tid) -> [u8; 12] {
    let mut text = [b'='; 12];
    let bits = u128::from(tid.0) << 2;
    for (at, character) in text.iter_mut().take(11).enumerate() {
        let sextet = (bits >> (6 * (10 - at))) & 63;
        *character = BASE64[sextet as usize];
    }
    text
}

/// Reverse of [`encode_trans_id`]; blanks at the end are ignored, anything else is `None`.
pub(crate) fn decode_trans_id(text: &[u8]) -> Option<Tid> {
    let digits = text.trim_ascii_end().strip_suffix(b"=")?;
    if digits.len() != 11 {
        return None;
    }
    let mut bits: u128 = 0;
    for digit in digits {
        bits = bits << 6 | BASE64.iter().position(|character| character == digit)? as u128;
    }
    u64::try_from(bits >> 2).ok().map(Tid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::TxnMeta;

    #[test]
    fn trans_ids_are_base64() {
        // base64.encodebytes(bytes.fromhex('040d3092e0b6c866')).rstrip()
        assert_eq!(&encode_trans_id(Tid(0x040d_3092_e0b6_c866)), b"BA0wkuC2yGY=");
        assert_eq!(decode_trans_id(b"BA0wkuC2yGY="), Some(Tid(0x040d_3092_e0b6_c866)));
        assert_eq!(decode_trans_id(b"BA0wkuC2yGY=\n"), Some(Tid(0x040d_3092_e0b6_c866)));
        assert_eq!(&encode_trans_id(Tid(u64::MAX)), b"//////////8=");
        assert_eq!(decode_trans_id(b"//////////8="), Some(Tid(u64::MAX)));
        for wrong in
            [&b""[..], b"=", b"BA0wkuC2yG=", b"BA0wkuC2yGY", b"BA0wkuC2yG*=", b"BA0wkuC2yGYBA0wkuC2yGY="]
        {
            assert_eq!(decode_trans_id(wrong), None);
        }
    }

    #[test]
    fn specifications_compare_values_and_prefixes() {
        let user = "/a/b jim";
        let meta = TxnMeta { user: user.into(), ..TxnMeta::default() };
        let entry = UndoEntry { tid: Tid(1), size: 1, meta };
        let prefix = |path: &[&str]| Value::Call {
            callable: Box::new(Value::Global { module: "ZopeUndo.Prefix".into(), name: "Prefix".into() }),
            args: Box::new(Value::Tuple(Vec::new())),
            state: Some(Box::new(Value::dict([
                ("length", Value::from(path.len() as u64)),
                ("path", Value::List(path.iter().map(|segment| Value::from(*segment)).collect())),
            ]))),
        };
        assert!(admits(&Value::None, &entry));
        assert!(admits(&Value::dict([("user_name", Value::bytes(user.as_bytes()))]), &entry));
        assert!(!admits(&Value::dict([("user_name", user.into())]), &entry));
        assert!(admits(&Value::dict([("user_name", prefix(&["", "a"]))]), &entry));
        assert!(admits(&Value::dict([("user_name", prefix(&["", "a", "b"]))]), &entry));
        assert!(!admits(&Value::dict([("user_name", prefix(&["", "b"]))]), &entry));
        assert!(!admits(&Value::dict([("missing", Value::None)]), &entry));
    }
}
