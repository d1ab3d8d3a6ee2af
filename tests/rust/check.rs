//! `check` and `dump`: sound files are found sound, each kind of damage is found where it is, nothing panics.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use zeo_rs::ids::{Oid, Tid};
use zeo_rs::storage::StorageError;
use zeo_rs::storage::blob::BlobDir;
use zeo_rs::storage::file::check::{CheckOptions, CheckSummary, Fault, Severity, check_path};
use zeo_rs::storage::file::dump::dump;
use zeo_rs::storage::transform::RecordReferences;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/filestorage").join(name)
}

fn check(path: &Path, blobs: Option<&BlobDir>) -> Result<(CheckSummary, Vec<Fault>), StorageError> {
    let mut faults = Vec::new();
    let options = CheckOptions {
        references: Some(&RecordReferences),
        blobs,
        fault: &mut |fault| faults.push(fault.clone()),
        progress: &mut |_| true,
    };
    let summary = check_path(path, options)?;
    let errors = faults.iter().filter(|fault| fault.severity == Severity::Error).count();
    assert_eq!((summary.errors, summary.warnings), (errors as u64, (faults.len() - errors) as u64));
    Ok((summary, faults))
}

/// A file of its own with the fixture's data, without index.
fn changed(name: &str, change: impl FnOnce(&mut Vec<u8>)) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("Data.fs");
    let mut bytes = fs::read(fixture(name).join("Data.fs")).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

#[test]
fn sound_files_have_no_faults() {
    let names =
        ["simple", "undo", "delete", "multi_undo", "metadata", "packed", "conflict_bucket", "zlib", "empty"];
    for name in names {
        let (summary, faults) = check(&fixture(name).join("Data.fs"), None).unwrap();
        assert!(faults.is_empty(), "{name}: {faults:#?}");
        assert_eq!(summary.objects > 0, name != "empty", "{name}");
        assert_eq!(summary.end, fs::metadata(fixture(name).join("Data.fs")).unwrap().len(), "{name}");
    }
    for name in ["blobs", "blobs_lawn", "blobs_packed"] {
        let blobs = BlobDir::open(&fixture(name).join("blobs"), false).unwrap();
        let (summary, faults) = check(&fixture(name).join("Data.fs"), Some(&blobs)).unwrap();
        assert!(faults.is_empty() && summary.blobs > 0, "{name}: {faults:#?}");
    }
}

#[test]
fn damage_is_found_where_it_is() {
    for (name, pos, severity, text) in [
        ("bad_prev", None, Severity::Error, "previous record is given as"),
        ("bad_tloc", None, Severity::Error, "record names the transaction at"),
        ("bad_vlen", None, Severity::Error, "record of a version"),
        ("bad_redundant_mid", None, Severity::Error, "the length after the transaction"),
        ("bad_status", None, Severity::Error, "status"),
        ("tid_reduction", None, Severity::Error, "tid is not after"),
        ("dangling", None, Severity::Error, "refers to 0x01, which does not exist"),
        ("checkpoint", Some(773), Severity::Warning, "not finished, at the end"),
        ("trunc_data", None, Severity::Warning, "longer than the file, at the end"),
        ("trunc_txn_header", None, Severity::Warning, "fewer bytes than a transaction header, at the end"),
        ("tail_garbage_zero", None, Severity::Warning, "shorter than its own header, at the end"),
    ] {
        let (_dir, path) = changed(name, |_| {});
        let (_, faults) = check(&path, None).unwrap();
        let found = faults.iter().find(|fault| fault.what.contains(text));
        let Some(found) = found else { panic!("{name}: {faults:#?}") };
        assert_eq!(found.severity, severity, "{name}");
        assert!(pos.is_none_or(|pos| found.pos == pos), "{name}: {found}");
        assert!(severity == Severity::Warning || found.tid.is_some(), "{name}: {found}");
    }
    let error = check(&fixture("bad_magic").join("Data.fs"), None).unwrap_err();
    assert!(matches!(error, StorageError::Format(_)));
}

#[test]
fn it_goes_on_after_damage() {
    // The header of the second of four transactions (at 166, 448 bytes) is gone.
    let (_dir, path) = changed("simple", |bytes| bytes[166..189].fill(0));
    let (summary, faults) = check(&path, None).unwrap();
    assert_eq!(summary.transactions, 3);
    assert_eq!(faults[0].pos, 166);
    assert!(faults[0].what.ends_with("going on at 614"), "{}", faults[0]);
    assert!(faults.iter().any(|fault| fault.oid == Some(Oid(1))), "its objects have lost a revision");
}

#[test]
fn back_pointers_are_followed() {
    // The undo at 758 points to 482; now into the middle of a record, and to a record of another object.
    for target in [490u64, 52] {
        let (_dir, path) =
            changed("undo", |bytes| bytes[0x33f..0x347].copy_from_slice(&target.to_be_bytes()));
        let (_, faults) = check(&path, None).unwrap();
        let fault = &faults[0];
        assert_eq!((fault.pos, fault.oid, fault.tid), (789, Some(Oid(1)), Some(Tid(0x03f5_8e00_1111_1111))));
        assert!(fault.what.contains(&format!("back-pointer to {target}")), "{fault}");
        let text = fault.to_string();
        assert!(text.starts_with("error at 789, oid 0x01, tid 0x03f58e0011111111: "), "{text}");
    }
}

#[test]
fn blob_files_and_index_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = BlobDir::open(&dir.path().join("blobs"), true).unwrap();
    let upload = dir.path().join("upload");
    fs::write(&upload, "x").unwrap();
    blobs.commit(&upload, Oid(5), Tid(1)).unwrap();
    let (summary, faults) = check(&fixture("blobs").join("Data.fs"), Some(&blobs)).unwrap();
    let texts: Vec<String> = faults.iter().map(Fault::to_string).collect();
    assert_eq!(summary.errors, summary.blobs, "{texts:#?}");
    assert!(texts.iter().any(|text| text.contains("0x03f58e002aaaaaaa.blob is missing")), "{texts:#?}");
    assert!(texts.iter().any(|text| text.starts_with("warning at 0, oid 0x05, tid 0x01: no record has")));

    let (_dir, path) = changed("simple", |_| {});
    let index = fs::read(fixture("simple").join("Data.fs.index")).unwrap();
    fs::write(path.with_extension("fs.index"), &index).unwrap();
    assert_eq!(check(&path, None).unwrap().1, []);
    // Position of oid 1, which the newest transaction has not.
    let mut wrong = index;
    let at = wrong.windows(8).position(|w| w == b"\0\0\0\x01\0\x02\0\x03").unwrap() + 8 + 6;
    wrong[at + 5] ^= 1;
    fs::write(path.with_extension("fs.index"), &wrong).unwrap();
    let (_, faults) = check(&path, None).unwrap();
    assert!(faults.len() == 1 && faults[0].oid == Some(Oid(1)), "{faults:#?}");
    assert!(faults[0].what.contains("index file is wrong"));
}

#[test]
fn no_change_of_a_byte_makes_it_fail() {
    let size = fs::read(fixture("undo").join("Data.fs")).unwrap().len();
    for at in 4..size {
        for bit in [0x01, 0x80] {
            let (_dir, path) = changed("undo", |bytes| bytes[at] ^= bit);
            check(&path, None).unwrap();
            let _ = dump(&path, &mut Vec::new());
        }
    }
    for len in 0..size {
        let (_dir, path) = changed("undo", |bytes| bytes.truncate(len));
        assert_eq!(check(&path, None).unwrap().0.errors, 0, "{len}");
    }
}

#[test]
fn a_check_can_be_cancelled() {
    let options =
        CheckOptions { references: None, blobs: None, fault: &mut |_| {}, progress: &mut |_| false };
    let result = check_path(&fixture("simple").join("Data.fs"), options);
    assert!(matches!(result, Err(StorageError::Cancelled)));
}

#[test]
fn dump_prints_what_fsdump_prints() {
    for entry in fs::read_dir(fixture("dumped")).unwrap() {
        let expected = entry.unwrap().path();
        let name = expected.file_stem().unwrap().to_str().unwrap().to_owned();
        let mut out = Vec::new();
        dump(&fixture(&name).join("Data.fs"), &mut out).unwrap();
        let (out, expected) = (String::from_utf8(out).unwrap(), fs::read_to_string(expected).unwrap());
        for (ours, theirs) in out.lines().zip(expected.lines()) {
            assert_eq!(ours, theirs, "{name}");
        }
        assert_eq!(out.len(), expected.len(), "{name}");
    }
}
