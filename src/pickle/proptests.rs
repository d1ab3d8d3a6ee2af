//! Properties of the pickle codec, and the [`Value`]s that others test with.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::{Globals, PickleError, Value, decode, decode_extension, decode_first, encode, encode_extension};

/// Any value of the kinds that occur in messages, nested a few levels. `objects`: also classes and calls.
pub(crate) fn values(objects: bool) -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::None),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        (0..70_000i64).prop_map(Value::Int),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_filter("NaN is not equal to itself", |f| !f.is_nan()).prop_map(Value::Float),
        proptest::collection::vec(any::<u8>(), 0..300).prop_map(|b| Value::Bytes(b.into())),
        ".{0,20}".prop_map(Value::Str),
        "[a-z]{0,2}".prop_map(Value::Str),
    ];
    leaf.prop_recursive(5, 64, 8, move |inner| {
        let items = proptest::collection::vec(inner.clone(), 0..8);
        let pairs = proptest::collection::vec((".{0,5}".prop_map(Value::Str), inner.clone()), 0..6);
        let plain = prop_oneof![
            items.clone().prop_map(Value::Tuple),
            items.prop_map(Value::List),
            pairs.prop_map(Value::Dict),
        ];
        if !objects {
            return plain.boxed();
        }
        let global =
            ("[a-z.]{1,9}", "[A-Z][a-z]{0,9}").prop_map(|(module, name)| Value::Global { module, name });
        let args =
            proptest::collection::vec(inner.clone(), 0..3).prop_map(|args| Box::new(Value::Tuple(args)));
        let state = proptest::option::of(inner.prop_map(Box::new));
        let call = (global.clone(), args, state).prop_map(|(callable, args, state)| Value::Call {
            callable: Box::new(callable),
            args,
            state,
        });
        prop_oneof![3 => plain, 1 => global, 1 => call].boxed()
    })
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(value in values(true)) {
        let mut out = BytesMut::new();
        encode(&value, &mut out).unwrap();
        let length = out.len();
        out.extend_from_slice(b"what follows");
        let (back, used) = decode_first(&out.freeze(), Globals::Any).unwrap();
        prop_assert_eq!(back, value);
        prop_assert_eq!(used, length);
    }

    #[test]
    fn memo_entries_change_nothing(value in values(true)) {
        let extension = Value::Dict(vec![("k".into(), value.clone()), ("again".into(), value)]);
        let stored = encode_extension(&extension).unwrap();
        prop_assert_eq!(decode_extension(&stored).unwrap(), extension);
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), whole in any::<bool>()) {
        if whole {
            bytes.push(b'.');
        }
        if let Ok(value) = decode_extension(&bytes) {
            prop_assert!(weight(&value) <= 4096 + 17 * bytes.len());
        }
        let _ = decode(&bytes.into(), Globals::Request);
    }

    #[test]
    fn a_damaged_pickle_is_decoded_or_refused(value in values(true), at in any::<usize>(), with in any::<u8>()) {
        let mut out = BytesMut::new();
        encode(&value, &mut out).unwrap();
        let at = at % out.len();
        out[at] = with;
        let length = out.len();
        if let Ok(value) = decode(&out.freeze(), Globals::Stored) {
            prop_assert!(weight(&value) <= 4096 + 17 * length);
        }
    }
}

/// Number of values and bytes of text in a tree.
fn weight(value: &Value) -> usize {
    1 + match value {
        Value::Str(text) => text.len(),
        Value::Tuple(items) | Value::List(items) => items.iter().map(weight).sum(),
        Value::Dict(pairs) => pairs.iter().map(|(key, value)| weight(key) + weight(value)).sum(),
        Value::Global { module, name } => module.len() + name.len(),
        Value::Call { callable, args, state } => {
            weight(callable) + weight(args) + state.as_ref().map_or(0, |state| weight(state))
        }
        _ => 0,
    }
}

fn decoded(pickle: &'static [u8]) -> Result<Value, PickleError> {
    decode(&Bytes::from_static(pickle), Globals::Stored)
}

/// Bytes made by `zodbpickle.dumps(zodbpickle.loads(fast pickle), 3)`: what a ZEO server stores for an extension.
#[test]
fn extensions_are_stored_as_zodb_stores_them() {
    let set = |name: &str, items| Value::builtin_call(name, Value::List(items));
    let (one, two) = (Value::Int(1), Value::Int(2));
    let text = |text: &str| Value::from(text);
    for (extension, hex) in [
        (
            Value::dict([("k", text("v")), ("n", one.clone())]),
            "80037d71002858010000006b7101580100000076710258010000006e71034b01752e",
        ),
        (
            Value::dict([
                ("k", text("k")),
                (
                    "x",
                    Value::List(vec![
                        text("k"),
                        text("long"),
                        text("long"),
                        Value::bytes(b""),
                        Value::bytes(b"a"),
                        Value::bytes(b"a"),
                        Value::bytes(b""),
                        text("é"),
                        text("é"),
                        Value::Tuple(vec![]),
                        Value::Tuple(vec![one.clone()]),
                    ]),
                ),
            ]),
            "80037d71002858010000006b7101680158010000007871025d710328680158040000006c6f6e67710458040000006c6f6e6771054300710643016171076807680658\
             02000000c3a971086808294b0185710965752e",
        ),
        (
            Value::dict([("s", set("set", vec![one.clone(), two])), ("f", set("set", vec![one]))]),
            "80037d7100285801000000737101636275696c74696e730a7365740a71025d7103284b014b026585710452710558010000006671066802\
             5d71074b016185710852710975 2e",
        ),
    ] {
        let stored = encode_extension(&extension).unwrap();
        let ours: String = stored.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(ours, hex.replace(' ', ""), "{extension}");
    }
    assert!(encode_extension(&Value::Dict(vec![])).unwrap().is_empty());
    assert_eq!(decode_extension(b"").unwrap(), Value::Dict(vec![]));
}

#[test]
fn long_lists_and_dicts_come_in_batches_of_1000() {
    for (count, batches) in [(1, 0), (1000, 1), (1001, 2), (2500, 3)] {
        let numbers = || (0..count).map(Value::Int);
        let mut out = BytesMut::new();
        encode(&Value::List(numbers().map(|_| Value::None).collect()), &mut out).unwrap();
        assert_eq!(out.iter().filter(|byte| **byte == b'e').count(), batches, "{count}");
        out.clear();
        encode(&Value::Dict(numbers().map(|_| (Value::None, Value::None)).collect()), &mut out).unwrap();
        assert_eq!(out.iter().filter(|byte| **byte == b'u').count(), batches, "{count}");
    }
}

#[test]
fn old_protocols_are_read() {
    let expected = Value::dict([
        ("t", Value::Bool(true)),
        ("i", Value::Int(-7)),
        ("l", Value::Int(5_000_000_000)),
        ("f", Value::Float(1.5)),
        ("u", Value::from("é")),
        ("b", Value::bytes(b"\xe9")),
        ("n", Value::List(vec![Value::None, Value::Tuple(vec![])])),
    ]);
    let protocol_0 = b"(dp0\nS't'\np1\nI01\nsS'i'\nI-7\nsS'l'\nL5000000000L\nsS'f'\nF1.5\nsS'u'\nV\xe9\nsS'b'\nS'\\xe9'\nsS'n'\n(lp3\nNa(tas.";
    assert_eq!(decoded(protocol_0).unwrap(), expected);
    let protocol_4 = b"\x80\x04\x95\0\0\0\0\0\0\0\0}\x94(\x8c\x01t\x94\x88\x8c\x01iJ\xf9\xff\xff\xff\x8c\x01l\x8a\x05\0\xf2\x05\x2a\x01\
        \x8c\x01fG\x3f\xf8\0\0\0\0\0\0\x8c\x01u\x8c\x02\xc3\xa9\x8c\x01bC\x01\xe9\x8c\x01n](N)eu.";
    assert_eq!(decoded(protocol_4).unwrap(), expected);
    // Protocol 2 of Python 3 spells bytes as a call.
    let bytes = b"\x80\x02c_codecs\nencode\nX\x02\0\0\0\xc3\xa9X\x06\0\0\0latin1\x86R.";
    assert_eq!(decoded(bytes).unwrap(), Value::bytes(b"\xe9"));
}

#[test]
fn a_shared_value_is_repeated_and_a_recursive_one_refused() {
    let shared = Value::List(vec![Value::Int(1)]);
    assert_eq!(decoded(b"]q\0K\x01ah\0\x86.").unwrap(), Value::Tuple(vec![shared.clone(), shared]));
    assert_eq!(decode(&Bytes::from_static(b"]q\0h\0a."), Globals::Any), Err(PickleError::TooDeep));
    // Stored ones are shown as far as they are readable.
    assert!(decoded(b"]q\0h\0a.").is_ok());
}

#[test]
fn repeated_doubling_is_refused() {
    let mut bomb = b"]q\0".to_vec();
    for level in 0..60 {
        bomb.extend([b']', b'q', level + 1, b'(', b'h', level, b'h', level, b'e']);
    }
    bomb.push(b'.');
    for globals in [Globals::Request, Globals::Stored] {
        assert_eq!(decode(&bomb.clone().into(), globals), Err(PickleError::TooMany));
    }
}

#[test]
fn requests_name_only_what_they_may() {
    let request = |pickle: &'static [u8]| decode(&Bytes::from_static(pickle), Globals::Request);
    for allowed in [
        &b"cZopeUndo.Prefix\nPrefix\n)\x81}b."[..],
        b"czodbpickle\nbinary\n.",
        b"cbuiltins\nset\n](K\x01e\x85R.",
    ] {
        request(allowed).unwrap();
    }
    for (refused, name) in [
        (&b"cbuiltins\neval\n."[..], "builtins.eval"),
        (b"cos\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "posix.system"),
        (b"(iposix\nsystem\n.", "posix.system"),
        (b"czodbpickle\nfastpickle\n.", "zodbpickle.fastpickle"),
    ] {
        let error = request(refused).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    assert_eq!(request(b"czodbpickle\nbinary\nU\x02ab\x85R."), Ok(Value::bytes(b"ab")));
}

#[test]
fn deep_nesting_is_refused_not_followed() {
    let deep: Bytes = [vec![b')'], vec![0x85; 100_000], vec![b'.']].concat().into();
    assert_eq!(decode(&deep, Globals::Request), Err(PickleError::TooDeep));
    let marks: Bytes = [vec![b'('; 100_000], vec![b'.']].concat().into();
    assert!(decode(&marks, Globals::Request).is_err());
    let mut value = Value::None;
    for _ in 0..100 {
        value = Value::List(vec![value]);
    }
    assert_eq!(encode(&value, &mut BytesMut::new()), Err(PickleError::TooDeep));
}

#[test]
fn announced_lengths_are_not_believed() {
    for pickle in [
        &b"X\xff\xff\xff\x7f."[..],
        b"B\xff\xff\xff\xff.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"\x8b\xff\xff\xff\xff.",
        b"T\xff\xff\xff\xff.",
        b"C",
    ] {
        let error = decoded(pickle).unwrap_err();
        assert!(matches!(error, PickleError::Truncated { .. } | PickleError::Number { .. }), "{error}");
    }
}
