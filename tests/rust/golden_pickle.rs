//! What ZODB and zodbpickle made of random records and extensions (`tests/fixtures/pickle/make_vectors.py`): the same
//! references, classes and bytes here.

#![allow(clippy::unwrap_used)] // helpers of tests

use bytes::{Bytes, BytesMut};
use serde_json::Value as Json;
use zeo_rs::ids::Oid;
use zeo_rs::pickle::{self, Globals, ReferenceScanner};

fn vectors(name: &str) -> Vec<Json> {
    let path = format!("{}/tests/fixtures/pickle/{name}", env!("CARGO_MANIFEST_DIR"));
    let lines = std::fs::read_to_string(path).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn unhex(json: &Json) -> Bytes {
    let hex = json.as_str().unwrap();
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn references_are_those_that_zodb_finds() {
    let (mut scanner, mut total, mut records) = (ReferenceScanner::default(), 0, 0);
    for vector in vectors("references.jsonl") {
        let record = unhex(&vector["record"]);
        let expected: Vec<Oid> = vector["references"]
            .as_array()
            .unwrap()
            .iter()
            .map(|oid| Oid::from_slice(&unhex(oid)).expect("8 bytes"))
            .collect();
        let mut found = Vec::new();
        scanner
            .scan(&record, &mut found)
            .unwrap_or_else(|error| panic!("{error}: {}", record.escape_ascii()));
        assert_eq!(found, expected, "{}", record.escape_ascii());
        let (module, name) = pickle::class_of(&record).expect("a class");
        // ZODB shows the tuple (class, arguments) in one piece where the class does not come first in the bytes.
        if let Some(class) = vector["class"].as_str().filter(|class| !class.contains(['(', '<'])) {
            assert_eq!(format!("{module}.{name}"), class);
        }
        (total, records) = (total + found.len(), records + 1);
    }
    println!("{total} references in {records} records");
    assert!(records > 350 && total > 500);
}

#[test]
fn extensions_are_stored_byte_for_byte() {
    let vectors = vectors("extensions.jsonl");
    for vector in &vectors {
        let (sent, stored) = (unhex(&vector["sent"]), unhex(&vector["stored"]));
        let extension = pickle::decode(&sent, Globals::Request).unwrap();
        let mut again = BytesMut::new();
        pickle::encode(&extension, &mut again).unwrap();
        assert_eq!(again, sent, "{extension}");
        assert_eq!(pickle::encode_extension(&extension).unwrap(), stored, "{extension}");
        assert_eq!(pickle::decode_extension(&stored).unwrap(), extension);
    }
    assert!(vectors.len() >= 300);
}
