//! Any bytes as a data record: scanned or refused, whatever the scanner saw before.

#![no_main]

use libfuzzer_sys::fuzz_target;
use zeo_rs::pickle::{self, ReferenceScanner};

fuzz_target!(|record: &[u8]| {
    let (mut scanner, mut first, mut second) = (ReferenceScanner::default(), Vec::new(), Vec::new());
    let (head, tail) = record.split_at(record.len() / 3);
    let _ = scanner.scan(head, &mut first);
    first.clear();
    let used = scanner.scan(tail, &mut first);
    let fresh = pickle::references(tail, &mut second);
    assert_eq!(used, fresh);
    assert_eq!(first, second);
    assert!(first.len() <= tail.len());
    let _ = pickle::class_of(record);
    let _ = pickle::is_blob_record(record);
});
