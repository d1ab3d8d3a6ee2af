//! Files that ZODB 6.4 wrote, opened here: every answer must be ZODB's, and replaying the calls that made a file must give
//! the same bytes. Where the engine is better on purpose, [`IMPROVEMENTS`] says so; an entry that is not needed any more
//! fails the test.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use bytes::Bytes;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::storage::file::{FileStorage, FileStorageOptions, Pending};
use zeo_rs::storage::{
    Conflict, ConflictResolver, Op, Resolution, Storage, StorageError, TxnIterator, TxnMeta,
};

/// (start of the name of a check, why it differs).
const IMPROVEMENTS: &[(&str, &str)] = &[
    ("checkpoint.", "lastTransaction is of the last transaction kept, not of the tail that was dropped"),
    ("trunc_redundant.", "as checkpoint"),
    ("trunc_data.", "as checkpoint"),
    ("trunc_meta.", "as checkpoint"),
    ("tail_garbage_zero.", "as checkpoint: ZODB answers zero"),
    ("tail_garbage_text.", "as checkpoint: ZODB answers the text"),
    ("only_empty_txn.ro_index.error", "ZODB's check of the index seeks before the file"),
    ("only_empty_txn.rw_index.error", "ZODB's check of the index seeks before the file"),
    ("dup_oids.ro_index.used_index", "the index of a file that ends with two records of one object is used"),
    ("dup_oids.rw_index.used_index", "the index of a file that ends with two records of one object is used"),
    ("bad_vlen.", "a damaged record, not a ValueError"),
    ("status_u_middle.iteration", "obsolete undone transactions are skipped, ZODB's iterator crashes"),
    ("index_shapes.ro.record_iternext", "the last oid of all is reached, too"),
    ("zero_length.ro.lastInvalidations", "an empty file has no transactions; ZODB's iterator refuses it"),
    ("statuses.ro.lastInvalidations", "as status_u_middle.iteration"),
    ("status_u_middle.ro.lastInvalidations", "as status_u_middle.iteration"),
    (
        "trunc_txn_header.ro.lastInvalidations",
        "stray bytes at the end are no transaction; ZODB's iterator fails on them",
    ),
    ("tail_garbage_short.ro.lastInvalidations", "as trunc_txn_header.ro.lastInvalidations"),
    ("bad_prev.ro.0000000000000002.load", "the class of the error of a damaged record"),
    (
        "tid_reduction.ranges",
        "of a file whose tids do not ascend, everything from the first tid that is large enough",
    ),
    ("statuses.ops.index", "records with status u do not count before the next opening either"),
    ("restore.ops.error", "a hint to a transaction that is not there is no hint"),
    ("status_u_middle.ops.index", "as statuses.ops.index"),
    ("index_formats.py3_dict", "an index in an old format is not read, the file is scanned"),
    ("index_formats.extra_keys", "an index in an old format is not read, the file is scanned"),
    ("index_formats.protocol0_pos", "an index in an old format is not read, the file is scanned"),
];

struct Checks {
    done: usize,
    failed: Vec<String>,
    used: BTreeMap<&'static str, usize>,
}

impl Checks {
    fn new() -> Self {
        Self { done: 0, failed: Vec::new(), used: BTreeMap::new() }
    }

    fn equal<T: PartialEq + std::fmt::Debug>(&mut self, name: impl Display, found: T, expected: T) {
        self.done += 1;
        if found == expected {
            return;
        }
        let name = name.to_string();
        match IMPROVEMENTS.iter().find(|(start, _)| name.starts_with(start)) {
            Some((start, _)) => *self.used.entry(start).or_default() += 1,
            None => self.failed.push(format!("{name}: {found:?}, ZODB: {expected:?}")),
        }
    }

    /// `belongs`: which of the improvements this test is about.
    fn finish(self, belongs: impl Fn(&str) -> bool) {
        let mut failed = self.failed;
        let unused =
            IMPROVEMENTS.iter().filter(|(start, _)| belongs(start) && !self.used.contains_key(start));
        failed.extend(unused.map(|(start, _)| format!("{start} is as in ZODB: remove it from the list")));
        assert!(failed.is_empty(), "{} of {} checks failed:\n{}", failed.len(), self.done, failed.join("\n"));
        println!("{} checks, {} differ on purpose", self.done, self.used.values().sum::<usize>());
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/filestorage")
}

fn manifest() -> Value {
    serde_json::from_slice(&fs::read(fixtures().join("manifest.json")).unwrap()).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string"))
}

fn id(value: &Value) -> u64 {
    u64::from_str_radix(text(value), 16).unwrap()
}

fn bytes(value: &Value) -> Bytes {
    let hex = text(value);
    (0..hex.len() / 2)
        .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
        .collect::<Vec<_>>()
        .into()
}

fn hex(n: u64) -> String {
    format!("{n:016x}")
}

fn sha(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// The exception that ZODB raises for an error.
fn class(error: &StorageError) -> &'static str {
    match error {
        StorageError::NotFound(_) => "POSKeyError",
        StorageError::Conflict(_) => "ConflictError",
        StorageError::Undo { .. } => "UndoError",
        StorageError::MultipleUndo(_) => "MultipleUndoErrors",
        StorageError::Format(_) => "FileStorageFormatError",
        StorageError::Corrupted { .. } => "CorruptedTransactionError",
        _ => "other",
    }
}

fn open(path: &Path, read_only: bool, blobs: bool) -> Result<FileStorage, StorageError> {
    let blob_dir = blobs.then(|| path.with_file_name("blobs"));
    FileStorage::open(path, FileStorageOptions { read_only, blob_dir, ..Default::default() })
}

fn copy_of(fixture: &Value, with_index: bool) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let source = fixtures().join(text(&fixture["file"]));
    let path = dir.path().join("Data.fs");
    fs::copy(&source, &path).unwrap();
    let index = source.with_file_name("Data.fs.index");
    if with_index && index.exists() {
        fs::copy(index, dir.path().join("Data.fs.index")).unwrap();
    }
    (dir, path)
}

fn index_of(storage: &FileStorage) -> Value {
    let mut index = serde_json::Map::new();
    storage.snapshot().index.for_each_from(Oid(0), &mut |oid, pos| {
        index.insert(hex(oid.0), json!(pos));
        true
    });
    index.into()
}

#[test]
fn files_open_and_answer_as_in_zodb() {
    let mut checks = Checks::new();
    for fixture in list(&manifest()["fixtures"]) {
        for mode in ["ro", "rw", "ro_index", "rw_index"] {
            let expected = &fixture["open"][mode];
            if expected.is_null() {
                continue;
            }
            let name = format!("{}.{mode}", text(&fixture["name"]));
            let (dir, path) = copy_of(fixture, mode.ends_with("index"));
            let error = expected["error"].as_str().map(|e| e.rsplit('.').next().unwrap());
            let storage = match open(&path, mode.starts_with("ro"), false) {
                Ok(storage) => storage,
                Err(e) => {
                    checks.equal(format!("{name}.error"), Some(class(&e)), error);
                    continue;
                }
            };
            checks.equal(format!("{name}.error"), None, error);
            if error.is_some() {
                continue;
            }
            checks.equal(
                format!("{name}.last_tid"),
                hex(storage.last_tid().0),
                text(&expected["lastTransaction"]).into(),
            );
            checks.equal(format!("{name}.size"), json!(storage.size()), expected["getSize"].clone());
            checks.equal(format!("{name}.len"), json!(storage.object_count()), expected["len"].clone());
            checks.equal(
                format!("{name}.used_index"),
                json!(u8::from(storage.used_index())),
                expected["used_index"].clone(),
            );
            checks.equal(format!("{name}.index"), index_of(&storage), expected["index"].clone());
            let max_oid = storage.snapshot().index.max_oid().unwrap_or_default();
            checks.equal(format!("{name}.max_oid"), json!(hex(max_oid.0)), expected["max_oid"].clone());
            if mode == "ro" {
                queries(&mut checks, &name, &storage, expected);
                iteration(&mut checks, text(&fixture["name"]), &storage, fixture);
            }
            storage.close().unwrap();
            files_after(&mut checks, &name, dir.path(), &expected["files_after"]);
        }
    }
    checks.finish(|start| !start.contains(".ops.") && !start.starts_with("index_formats"));
}

/// Data.fs, its index and the tails cut off must be ZODB's. (`.tmp` is not made here.)
fn files_after(checks: &mut Checks, name: &str, dir: &Path, expected: &Value) {
    for (file, properties) in expected.as_object().unwrap() {
        if file == "Data.fs" || file.starts_with("Data.fs.tr") || file == "Data.fs.index" {
            let found = fs::read(dir.join(file)).map(|content| sha(&content)).unwrap_or("missing".into());
            checks.equal(format!("{name}.files.{file}"), found, text(&properties[1]).into());
        }
    }
}

fn queries(checks: &mut Checks, name: &str, storage: &FileStorage, expected: &Value) {
    for (oid_hex, answers) in expected["queries"].as_object().unwrap() {
        let oid = Oid(u64::from_str_radix(oid_hex, 16).unwrap());
        let name = format!("{name}.{oid_hex}");
        let load = match storage.load_before(oid, Tid(u64::MAX)) {
            Ok(loaded) => loaded.map_or(Value::Null, |l| json!([sha(&l.data), l.data.len(), hex(l.tid.0)])),
            Err(e) => json!(class(&e)),
        };
        checks.equal(format!("{name}.load"), load, answers["load"].clone());
        let tid = storage.current_tid(oid).map_or_else(|e| json!(class(&e)), |tid| json!(hex(tid.0)));
        checks.equal(format!("{name}.getTid"), tid, answers["getTid"].clone());
        for (before, answer) in answers["loadBefore"].as_object().unwrap() {
            let before = Tid(u64::from_str_radix(before, 16).unwrap());
            for found in [storage.load_before(oid, before), storage.try_load_before(oid, before)] {
                let found = match found {
                    Ok(loaded) => loaded.map_or(Value::Null, |l| {
                        json!([sha(&l.data), hex(l.tid.0), l.end_tid.map(|tid| hex(tid.0))])
                    }),
                    Err(e) => json!(class(&e)),
                };
                checks.equal(format!("{name}.loadBefore {before}"), found, answer.clone());
            }
        }
        for (serial, answer) in answers["loadSerial"].as_object().unwrap() {
            let serial = Tid(u64::from_str_radix(serial, 16).unwrap());
            let found = storage
                .load_serial(oid, serial)
                .map_or_else(|e| json!(class(&e)), |data| json!([sha(&data), data.len()]));
            checks.equal(format!("{name}.loadSerial {serial}"), found, answer.clone());
        }
        if let Some(entries) = answers["history"].as_array() {
            let found = storage.history(oid, 1000).unwrap();
            let found: Vec<_> = found.iter().map(|e| json!([hex(e.tid.0), e.size])).collect();
            let entries = entries.iter().map(|e| json!([e[0], e[1]])).collect();
            checks.equal(format!("{name}.history"), found, entries);
        }
    }
    undo_log(checks, name, storage, list(&expected["undoLog"]));
    for count in [3, 1000] {
        let found = storage.last_invalidations(count).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|(tid, oids)| json!([hex(tid.0), oids.iter().map(|o| hex(o.0)).collect::<Vec<_>>()]))
            .collect();
        let key = format!("lastInvalidations_{count}");
        checks.equal(format!("{name}.{key}"), json!(found), expected[&key].clone());
    }
    let mut records = Vec::new();
    let mut next = None;
    // The first call of an empty database is an error in ZODB, the end here; a face makes it one.
    while let Some(record) = storage.record_iternext(next).unwrap() {
        let following = record.next.map(|oid| hex(oid.0));
        records.push(json!([hex(record.oid.0), hex(record.tid.0), sha(&record.data), following]));
        next = record.next;
        if next.is_none() {
            break;
        }
    }
    let complete = expected["record_iternext_error"].as_str().is_none_or(|e| e == "ValueError");
    if complete {
        checks.equal(format!("{name}.record_iternext"), json!(records), expected["record_iternext"].clone());
    } else {
        let before_the_error = list(&expected["record_iternext"]).to_vec();
        let n = before_the_error.len();
        checks.equal(format!("{name}.record_iternext"), records.len(), n);
        // ZODB names the deleted object as the next one.
        let without_next = |r: &Value| json!([r[0], r[1], r[2]]);
        let found: Vec<_> = records.iter().take(n).map(without_next).collect();
        let expected = before_the_error.iter().map(without_next).collect();
        checks.equal(format!("{name}.living"), found, expected);
    }
}

/// ZODB's entries, except where a transaction's extension overrides them (that is the face's part).
fn undo_log(checks: &mut Checks, name: &str, storage: &FileStorage, expected: &[Value]) {
    let entries = storage.undo_log(0, 1000, &mut |_| true).unwrap();
    checks.equal(format!("{name}.undo_log.len"), entries.len(), expected.len());
    let same = |part: &Bytes, value: &Value| match (&value["b"], &value["b_sha256"]) {
        (Value::String(_), _) => bytes(&value["b"]) == part,
        (_, Value::String(hash)) => *hash == sha(part),
        _ => false,
    };
    for (entry, expected) in entries.iter().zip(expected) {
        if entry.meta.extension.is_empty() {
            let ok = json!(entry.size) == expected["size"]
                && same(&entry.meta.user, &expected["user_name"])
                && same(&entry.meta.description, &expected["description"])
                && (entry.tid.to_unix() - expected["time"].as_f64().unwrap()).abs() < 1e-6;
            checks.equal(format!("{name}.undo_log {}", entry.tid), ok, true);
        }
    }
}

fn iteration(checks: &mut Checks, name: &str, storage: &FileStorage, fixture: &Value) {
    let found = transactions(&mut *storage.iterate(None, None).unwrap());
    let expected: Vec<Value> = list(&fixture["iteration"])
        .iter()
        .map(|t| {
            let part = |key: &str| {
                let hash = t[format!("{key}_sha256")].as_str().map(str::to_owned);
                hash.unwrap_or_else(|| sha(&bytes(&t[format!("{key}_hex")])))
            };
            let records: Vec<_> = list(&t["records"])
                .iter()
                .map(|r| json!([r["oid"], r["tid"], r["data_sha256"], r["data_txn"]]))
                .collect();
            json!([
                t["tid"],
                t["status"],
                part("user"),
                part("description"),
                part("extension_bytes"),
                records
            ])
        })
        .collect();
    checks.equal(format!("{name}.iteration"), json!(found), json!(expected));
    for range in list(&fixture["iterator_ranges"]) {
        // ZODB fails on a damaged tail; then there is nothing to compare.
        if range[3].is_null() {
            let bound = |v: &Value| v.as_str().map(|s| Tid(u64::from_str_radix(s, 16).unwrap()));
            let (start, stop) = (bound(&range[0]), bound(&range[1]));
            let found = transactions(&mut *storage.iterate(start, stop).unwrap());
            let tids: Vec<_> = found.iter().map(|t| t[0].clone()).collect();
            checks.equal(format!("{name}.ranges {start:?} {stop:?}"), json!(tids), range[2].clone());
        }
    }
}

fn transactions(iterator: &mut dyn TxnIterator) -> Vec<Value> {
    let mut all = Vec::new();
    while let Some((info, mut records)) = iterator.next_txn().unwrap() {
        let mut found = Vec::new();
        while let Some(r) = records.next_record().unwrap() {
            let data = r.data.as_ref().map(|data| sha(data));
            found.push(json!([hex(r.oid.0), hex(r.tid.0), data, r.data_txn.map(|tid| hex(tid.0))]));
        }
        let status = char::from(info.status).to_string();
        let meta = [&info.meta.user, &info.meta.description, &info.meta.extension].map(|part| sha(part));
        all.push(json!([hex(info.tid.0), status, meta[0], meta[1], meta[2], found]));
    }
    all
}

/// Stands for the application's classes: resolves a conflict to what ZODB's file has.
struct Oracle {
    resolved: BTreeMap<(Tid, Oid), Bytes>,
    tid: Mutex<Tid>,
}

impl Oracle {
    fn new(fixture: &Value) -> Self {
        let mut resolved = BTreeMap::new();
        for txn in list(&fixture["iteration"]) {
            for record in list(&txn["records"]) {
                if record["data_hex"].is_string() && record["data_txn"].is_null() {
                    let key = (Tid(id(&txn["tid"])), Oid(id(&record["oid"])));
                    resolved.insert(key, bytes(&record["data_hex"]));
                }
            }
        }
        Self { resolved, tid: Mutex::default() }
    }
}

impl ConflictResolver for Oracle {
    fn resolve(&self, _: &dyn Storage, conflict: &Conflict, _: Option<Bytes>) -> Resolution {
        let key = (*self.tid.lock().unwrap(), conflict.oid);
        match self.resolved.get(&key) {
            Some(data) => Resolution::Resolved(data.clone()),
            None => Resolution::Unresolved,
        }
    }
}

#[test]
fn replayed_calls_write_the_same_bytes() {
    let mut checks = Checks::new();
    for fixture in list(&manifest()["fixtures"]) {
        let ops = list(&fixture["ops"]);
        // Those with a pack are replayed by the tests of pack.
        if !ops.is_empty() && !ops.iter().any(|op| op["op"] == "pack") {
            replay(&mut checks, fixture, ops);
        }
    }
    checks.finish(|start| start.contains(".ops."));
}

fn replay(checks: &mut Checks, fixture: &Value, ops: &[Value]) {
    let name = format!("{}.ops", text(&fixture["name"]));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("Data.fs");
    let blobs = ops.iter().any(|op| op["op"] == "storeBlob");
    let oracle = Oracle::new(fixture);
    let mut storage = None;
    let mut pending: Option<Pending> = None;
    let mut voted = None;
    for op in ops {
        let expected = op["error"].as_str();
        let step = text(&op["op"]);
        if step == "open" {
            storage = Some(open(&path, false, blobs).unwrap());
            continue;
        }
        let storage = storage.as_ref().unwrap();
        let serial = || Tid(id(&op["serial"]));
        let call = match step {
            "begin" => {
                let meta = TxnMeta {
                    user: bytes(&op["user"]),
                    description: bytes(&op["desc"]),
                    extension: bytes(&op["ext"]),
                };
                let tid = Tid(id(&op["tid"]));
                *oracle.tid.lock().unwrap() = tid;
                pending = Some(storage.begin(meta, Some(tid), text(&op["status"]).as_bytes()[0]).unwrap());
                continue;
            }
            "vote" => {
                let txn = storage.vote_pending(pending.take().unwrap()).unwrap();
                let resolved: Vec<_> = txn.resolved.iter().map(|oid| hex(oid.0)).collect();
                checks.equal(format!("{name}.resolved"), json!(resolved), op["resolved"].clone());
                voted = Some(txn);
                continue;
            }
            "finish" => {
                let mut tids = Vec::new();
                storage
                    .finish(vec![voted.take().unwrap()], &mut |txn| tids.push(json!(hex(txn.tid.0))))
                    .unwrap();
                checks.equal(format!("{name}.tid"), tids, vec![op["tid"].clone()]);
                continue;
            }
            "abort" => {
                (pending, voted) = (None, None);
                continue;
            }
            "close" => {
                storage.close().unwrap();
                continue;
            }
            "store" | "storeBlob" => {
                let blob = op["blob"].as_str().map(|_| {
                    let file =
                        storage.temporary_directory().unwrap().join(format!("upload{}", text(&op["oid"])));
                    fs::write(&file, bytes(&op["blob"])).unwrap();
                    file
                });
                Op::Store {
                    oid: Oid(id(&op["oid"])),
                    serial: serial(),
                    data: bytes(&op["data"]).into(),
                    blob,
                }
            }
            "restore" => Op::Restore {
                oid: Oid(id(&op["oid"])),
                serial: serial(),
                data: op["data"].is_string().then(|| bytes(&op["data"]).into()),
                prev_txn: op["prev_txn"].is_string().then(|| Tid(id(&op["prev_txn"]))),
                blob: None,
            },
            "deleteObject" => Op::Delete { oid: Oid(id(&op["oid"])), serial: serial() },
            "undo" => Op::Undo { tid: Tid(id(&op["undone_tid"])) },
            other => panic!("unknown step {other}"),
        };
        let result = storage.apply(pending.as_mut().unwrap(), call, &oracle);
        checks.equal(format!("{name}.error"), result.as_ref().err().map(class), expected);
        if let (Ok(applied), Some(oids)) = (result, op["oids"].as_array()) {
            let mut undone: Vec<_> = applied.undone.iter().map(|oid| json!(hex(oid.0))).collect();
            undone.sort_by_key(|oid| text(oid).to_owned());
            checks.equal(format!("{name}.undone"), &undone, oids);
        }
    }
    drop(storage);
    let found = sha(&fs::read(&path).unwrap());
    checks.equal(format!("{name}.bytes"), found, text(&fixture["sha256"]).into());
    for (file, properties) in fixture["other_files"].as_object().unwrap() {
        let kind = if file.starts_with("blobs") { "blobs" } else { "index" };
        let found = fs::read(dir.path().join(file)).map(|content| sha(&content)).unwrap_or("missing".into());
        checks.equal(format!("{name}.{kind} {file}"), found, text(&properties[1]).into());
    }
}

#[test]
fn index_files_of_every_age() {
    let mut checks = Checks::new();
    let manifest = manifest();
    let formats = &manifest["index_formats"];
    for (file, entry) in formats["files"].as_object().unwrap() {
        for mode in ["ro", "rw"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("Data.fs");
            fs::copy(fixtures().join(text(&formats["data"])), &path).unwrap();
            fs::write(dir.path().join("Data.fs.index"), bytes(&entry["hex"])).unwrap();
            let expected = &entry["result"][mode];
            let name = format!("index_formats.{file}.{mode}");
            let storage = open(&path, mode == "ro", false).unwrap();
            checks.equal(
                format!("{name}.used_index"),
                json!(u8::from(storage.used_index())),
                expected["used_index"].clone(),
            );
            checks.equal(format!("{name}.index"), index_of(&storage), expected["index"].clone());
            checks.equal(format!("{name}.last"), json!(hex(storage.last_tid().0)), expected["last"].clone());
            storage.close().unwrap();
            let after = fs::read(dir.path().join("Data.fs.index")).map(|content| sha(&content)).unwrap();
            checks.equal(format!("{name}.index_after"), json!(after), expected["index_after_sha256"].clone());
        }
    }
    checks.finish(|start| start.starts_with("index_formats"));
}
