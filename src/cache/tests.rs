//! The cache against a model of the database, and its eviction against ZEO's.
//!
//! One file of more than 500 lines, because its tests share the model.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::{Cache, NODE_OVERHEAD, Policy, TraceRecord, simulate};
use crate::ids::{Oid, Tid};

#[derive(Clone, Debug)]
enum Step {
    /// Load as of some tid up to the last one; a miss is answered by the server and stored.
    Load {
        oid: u8,
        back: u8,
    },
    /// A transaction of others: invalidation, then the last tid.
    Commit {
        oids: Vec<u8>,
        len: u8,
    },
    /// A transaction whose load reply comes before its invalidation.
    EarlyReply {
        oid: u8,
    },
    /// This client's commit.
    Own {
        oid: u8,
        len: u8,
    },
    Forget {
        oid: u8,
    },
    Clear,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let oid = 0..6u8;
    let step = prop_oneof![
        8 => (oid.clone(), 0..12u8).prop_map(|(oid, back)| Step::Load { oid, back }),
        4 => (prop::collection::vec(oid.clone(), 0..4), any::<u8>()).prop_map(|(oids, len)| Step::Commit { oids, len }),
        2 => oid.clone().prop_map(|oid| Step::EarlyReply { oid }),
        2 => (oid.clone(), any::<u8>()).prop_map(|(oid, len)| Step::Own { oid, len }),
        1 => oid.prop_map(|oid| Step::Forget { oid }),
        1 => Just(Step::Clear),
    ];
    prop::collection::vec(step, 0..200)
}

/// Every revision of every object: what a server would answer.
#[derive(Default)]
struct Database {
    revisions: HashMap<u8, BTreeMap<u64, Vec<u8>>>,
    last: u64,
}

impl Database {
    fn commit(&mut self, oid: u8, tid: u64, len: u8) {
        let mut data = vec![oid; usize::from(len)];
        data.extend_from_slice(&tid.to_be_bytes());
        self.revisions.entry(oid).or_default().insert(tid, data);
    }

    fn load(&self, oid: u8, before: u64) -> Option<(Vec<u8>, u64, Option<u64>)> {
        let revisions = self.revisions.get(&oid)?;
        let (&tid, data) = revisions.range(..before).next_back()?;
        Some((data.clone(), tid, revisions.range(before..).next().map(|(&tid, _)| tid)))
    }
}

fn check(cache: &Cache, database: &Database, oid: u8, before: u64) -> bool {
    let Some(hit) = cache.load_before(Oid(u64::from(oid)), Tid(before)) else { return false };
    let (data, tid, end) = database.load(oid, before).expect("the cache has what the database has not");
    assert_eq!((&hit.data[..], hit.tid), (&data[..], Tid(tid)), "oid {oid} before {before}");
    // An end may not be known yet, but never a wrong one.
    assert!(
        hit.end_tid == end.map(Tid) || (hit.end_tid.is_none() && end.is_none_or(|end| end > database.last))
    );
    true
}

proptest! {
    #[test]
    fn answers_are_those_of_the_database(steps in steps(), max in prop_oneof![Just(700usize), Just(2000), Just(1 << 20)]) {
        let (cache, mut database) = (Cache::new(max), Database::default());
        let mut tid = 1;
        for step in steps {
            match step {
                Step::Load { oid, back } => {
                    let before = (database.last + 1).saturating_sub(u64::from(back));
                    if !check(&cache, &database, oid, before)
                        && let Some((data, start, end)) = database.load(oid, before)
                    {
                        cache.store(Oid(u64::from(oid)), Tid(start), end.map(Tid), &data);
                    }
                }
                Step::Commit { oids, len } => {
                    tid += 2;
                    for &oid in &oids {
                        database.commit(oid, tid, len);
                    }
                    for &oid in &oids {
                        cache.invalidate(Oid(u64::from(oid)), Some(Tid(tid)));
                    }
                    database.last = tid;
                }
                Step::EarlyReply { oid } => {
                    tid += 2;
                    database.commit(oid, tid, 9);
                    let (data, start, _) = database.load(oid, tid + 1).unwrap();
                    cache.store(Oid(u64::from(oid)), Tid(start), None, &data);
                    check(&cache, &database, oid, database.last + 1);
                    cache.invalidate(Oid(u64::from(oid)), Some(Tid(tid)));
                    database.last = tid;
                }
                Step::Own { oid, len } => {
                    tid += 2;
                    database.commit(oid, tid, len);
                    cache.invalidate(Oid(u64::from(oid)), Some(Tid(tid)));
                    let (data, ..) = database.load(oid, tid + 1).unwrap();
                    cache.store(Oid(u64::from(oid)), Tid(tid), None, &data);
                    database.last = tid;
                }
                Step::Forget { oid } => {
                    cache.invalidate(Oid(u64::from(oid)), None);
                    // Not that there is nothing: older revisions may stay, the current one may not.
                    prop_assert!(cache.load_before(Oid(u64::from(oid)), Tid::MAX).is_none());
                }
                Step::Clear => {
                    cache.clear();
                    prop_assert_eq!((cache.len(), cache.bytes()), (0, 0));
                }
            }
            prop_assert!(cache.bytes() <= max, "{} of {max}", cache.bytes());
            let (mut bytes, mut count) = (0, 0);
            cache.for_each(|_, _, _, length| { bytes += length + NODE_OVERHEAD; count += 1; });
            prop_assert!(bytes <= cache.bytes());
            prop_assert_eq!(count, cache.len());
        }
        for oid in 0..6 {
            for before in 0..=database.last + 1 {
                check(&cache, &database, oid, before);
            }
        }
    }
}

/// Storing and forgetting for ever does not grow: what is forgotten is paid for until its place is used again.
#[test]
fn forgotten_revisions_do_not_pile_up() {
    let cache = Cache::new(10_000);
    for tid in 1..10_000 {
        cache.store(Oid(1), Tid(tid), None, b"x");
        cache.invalidate(Oid(1), None);
        assert!(cache.bytes() <= 10_000);
    }
    assert!(cache.len() <= 1);
}

/// An answer from aside the order of invalidations: whatever may have ended the revision since it was asked for keeps it out.
#[test]
fn what_may_have_ended_since_its_ticket_does_not_get_in() {
    let cache = Cache::new(1 << 20);
    let data = bytes::Bytes::from_static(b"x");
    let ended_by: [&dyn Fn(); 5] = [
        &|| cache.invalidate(Oid(1), Some(Tid(20))),
        &|| cache.invalidate(Oid(1), None),
        &|| cache.clear(),
        &|| cache.move_aside(),
        &|| {
            cache.store(Oid(1), Tid(30), None, b"newer");
            cache.forget_after(Tid(5));
        },
    ];
    for end in ended_by {
        let ticket = cache.ticket(Oid(1));
        end();
        cache.store_current(ticket, Oid(1), Tid(10), &data);
        assert!(cache.load_before(Oid(1), Tid(11)).is_none());
    }
    let ticket = cache.ticket(Oid(1));
    cache.store(Oid(1), Tid(2), Some(Tid(10)), b"older");
    cache.store_current(ticket, Oid(1), Tid(10), &data);
    let loaded = cache.load_before(Oid(1), Tid(11)).unwrap();
    assert_eq!((loaded.tid, loaded.end_tid, &loaded.data[..]), (Tid(10), None, &b"x"[..]));
    cache.invalidate(Oid(1), Some(Tid(20)));
    assert_eq!(cache.load_before(Oid(1), Tid(11)).unwrap().end_tid, Some(Tid(20)));
}

#[test]
fn too_large_is_not_kept() {
    let cache = Cache::new(1000);
    cache.store(Oid(1), Tid(1), None, b"small");
    cache.store(Oid(2), Tid(1), None, &[0; 1000]);
    assert!(cache.covers(Oid(1), Tid(2)) && !cache.covers(Oid(2), Tid(2)));
    assert_eq!(Cache::new(0).max_bytes(), 0);
}

/// Hit rates on a trace of loads: `(this cache, ZEO's ring)`. Both get the same bytes; this one pays more overhead a
/// revision.
fn compare(trace: &[u64], size: usize) -> (f64, f64) {
    let records = || {
        trace.iter().map(|&oid| TraceRecord {
            second: 1,
            code: 0x22,
            length: 200 + (oid % 7) as u32 * 150,
            oid: Oid(oid),
            tid: Tid(1),
            end: Tid::ZERO,
        })
    };
    let rate = |policy| simulate(records(), policy, size).hit_rate() / 100.0;
    (rate(Policy::Ours), rate(Policy::Zeo))
}

struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Roughly Zipf with exponent 1 over `1..=n`.
    fn popular(&mut self, n: f64) -> u64 {
        n.powf(self.unit()) as u64
    }
}

#[test]
fn keeps_more_of_what_is_needed_than_the_ring() {
    let mut random = Random(42);
    let zipf: Vec<u64> = (0..200_000).map(|_| random.popular(20_000.0)).collect();
    // The same, with the whole database read once in between (a catalog rebuild, a crawler), twice.
    let mut scans = zipf.clone();
    for at in [80_000, 150_000] {
        scans.splice(at..at, 100_000..130_000);
    }
    for (name, trace, margin) in [("popular", &zipf, 0.0), ("scans", &scans, 0.02)] {
        let (ours, ring) = compare(trace, 2 << 20);
        println!("{name}: hit rate {ours:.3}, ring {ring:.3}");
        assert!(ours > ring + margin, "{name}: {ours:.3} against {ring:.3}");
    }
}

mod file {
    use std::fs;
    use std::path::Path;

    use proptest::prelude::*;

    use super::{Cache, Database, Oid, Step, Tid, check, steps};
    use crate::cache::{Opened, inspect};

    /// Applies steps as a client does, with the last tid after every transaction.
    fn run(cache: &Cache, database: &mut Database, steps: &[Step]) {
        let mut tid = database.last;
        for step in steps {
            match step {
                Step::Load { oid, back } => {
                    let before = (database.last + 1).saturating_sub(u64::from(*back));
                    if !check(cache, database, *oid, before)
                        && let Some((data, start, end)) = database.load(*oid, before)
                    {
                        cache.store(Oid(u64::from(*oid)), Tid(start), end.map(Tid), &data);
                    }
                    continue;
                }
                Step::Commit { oids, len } => {
                    tid += 2;
                    for oid in oids {
                        database.commit(*oid, tid, *len);
                        cache.invalidate(Oid(u64::from(*oid)), Some(Tid(tid)));
                    }
                }
                Step::EarlyReply { oid } | Step::Own { oid, .. } => {
                    tid += 2;
                    database.commit(*oid, tid, 9);
                    cache.invalidate(Oid(u64::from(*oid)), Some(Tid(tid)));
                    cache.store(
                        Oid(u64::from(*oid)),
                        Tid(tid),
                        None,
                        &database.load(*oid, tid + 1).unwrap().0,
                    );
                }
                Step::Forget { oid } => {
                    cache.invalidate(Oid(u64::from(*oid)), None);
                    continue;
                }
                Step::Clear => {
                    cache.clear();
                    continue;
                }
            }
            database.last = tid;
            cache.set_last_tid(Tid(tid));
        }
    }

    /// The index, and the values of both names.
    type Files = [(String, Option<Vec<u8>>); 3];

    fn read(path: &Path) -> Files {
        ["", ".values-0", ".values-1"].map(|ending| {
            let name = format!("{}{ending}", path.display());
            (ending.to_owned(), fs::read(name).ok())
        })
    }

    /// Opens a copy of the files, verifies as a client does, and compares every answer with the database. How many
    /// answers there were.
    fn reopen(files: &Files, database: &Database, directory: &Path, max: usize) -> usize {
        let path = directory.join("copy");
        for (ending, content) in files {
            let name = format!("{}{ending}", path.display());
            let _ = fs::remove_file(&name);
            if let Some(content) = content {
                fs::write(&name, content).unwrap();
            }
        }
        let (cache, opened) = Cache::open(&path, max).unwrap();
        let last = match opened {
            Opened::Warm(tid) => tid,
            Opened::Empty => {
                assert!(cache.is_empty());
                cache.close();
                return 0;
            }
            Opened::InUse(_) => panic!("nobody uses it"),
        };
        assert!(last.0 <= database.last);
        for (oid, revisions) in &database.revisions {
            if revisions.range(last.0 + 1..).next().is_some() {
                cache.invalidate(Oid(u64::from(*oid)), None);
            }
        }
        let mut answers = 0;
        // Twice: from the file, then from memory.
        for _ in 0..2 {
            for oid in 0..6 {
                for before in 0..=database.last + 1 {
                    answers += usize::from(check(&cache, database, oid, before));
                }
            }
        }
        cache.close();
        answers
    }

    fn cut(files: &Files, which: usize, at: usize) -> Files {
        let mut files = files.clone();
        if let Some(content) = &mut files[which].1 {
            content.truncate(at);
        }
        files
    }

    fn flip(files: &Files, which: usize, at: usize) -> Files {
        let mut files = files.clone();
        if let Some(byte) = files[which].1.as_mut().and_then(|content| content.get_mut(at)) {
            *byte ^= 0x41;
        }
        files
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Killed at any byte, or with any byte damaged: nothing wrong is served.
        #[test]
        fn what_is_left_is_right(steps in steps(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 12)) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("cache");
            let mut database = Database::default();
            // Two lives, the second on the first one's file, with room for a few revisions only.
            let max = 1500;
            for half in steps.chunks(steps.len().div_ceil(2).max(1)) {
                let (cache, _) = Cache::open(&path, max).unwrap();
                run(&cache, &mut database, half);
                cache.close();
            }
            let files = read(&path);
            reopen(&files, &database, directory.path(), max);
            reopen(&files, &database, directory.path(), 1 << 20);
            for index in cuts {
                for which in 0..3 {
                    let at = index.index(files[which].1.as_ref().map_or(1, |content| content.len().max(1)));
                    reopen(&cut(&files, which, at), &database, directory.path(), 1 << 20);
                    reopen(&flip(&files, which, at), &database, directory.path(), 1 << 20);
                }
            }
        }
    }

    /// A small cache's files, cut and damaged at every single byte.
    #[test]
    fn every_byte_may_be_the_last_or_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cache");
        let mut database = Database::default();
        let commit = |oids: &[u8], len| Step::Commit { oids: oids.to_vec(), len };
        let load = |oid, back| Step::Load { oid, back };
        let lives = [
            vec![commit(&[0, 1, 2], 9), load(0, 0), load(1, 0), load(2, 0), Step::Own { oid: 1, len: 3 }],
            vec![load(0, 0), commit(&[0], 5), load(0, 0), load(0, 3), Step::EarlyReply { oid: 3 }],
            vec![Step::Forget { oid: 2 }, load(2, 0), commit(&[4], 7), load(4, 0)],
        ];
        for steps in &lives {
            let (cache, _) = Cache::open(&path, 1 << 20).unwrap();
            run(&cache, &mut database, steps);
            cache.close();
        }
        let files = read(&path);
        let whole = reopen(&files, &database, directory.path(), 1 << 20);
        assert!(whole > 10, "{whole}");
        let mut fewer = 0;
        for which in 0..3 {
            for at in 0..files[which].1.as_ref().map_or(0, Vec::len) {
                for damaged in [cut(&files, which, at), flip(&files, which, at)] {
                    fewer += usize::from(reopen(&damaged, &database, directory.path(), 1 << 20) < whole);
                }
            }
        }
        assert!(fewer > 100, "damage shows: {fewer}");
    }

    /// A file of values that belongs to another index is not used, nor is one without the other.
    #[test]
    fn files_of_different_generations_do_not_mix() {
        let directory = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| {
            let path = directory.path().join(name);
            let (cache, _) = Cache::open(&path, 1 << 20).unwrap();
            cache.store(Oid(1), Tid(1), None, name.as_bytes());
            cache.set_last_tid(Tid(1));
            cache.close();
            path
        });
        let values = |path: &Path| {
            let names = ["0", "1"].map(|slot| format!("{}.values-{slot}", path.display()));
            names.into_iter().find(|name| Path::new(name).exists()).unwrap()
        };
        fs::copy(values(&other), values(&one)).unwrap();
        let (cache, opened) = Cache::open(&one, 1 << 20).unwrap();
        assert!(matches!(opened, Opened::Empty) && cache.is_empty(), "{opened:?}");
        cache.close();
        fs::remove_file(values(&other)).unwrap();
        let (cache, opened) = Cache::open(&other, 1 << 20).unwrap();
        assert!(matches!(opened, Opened::Empty) && cache.is_empty(), "{opened:?}");
    }

    /// What nobody has read since the file was opened survives the file being written anew.
    #[test]
    fn unread_values_move_to_the_new_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cache");
        let max = 200_000;
        let (cache, _) = Cache::open(&path, max).unwrap();
        for oid in 0..50 {
            cache.store(Oid(oid), Tid(1), None, &[oid as u8; 500]);
        }
        cache.set_last_tid(Tid(1));
        cache.close();
        let before = read(&path);
        let (cache, _) = Cache::open(&path, max).unwrap();
        // Enough for new files; these are forgotten at once, so they push nothing out.
        for tid in 2..150 {
            cache.store(Oid(1000), Tid(tid), None, &[1; 20_000]);
            cache.invalidate(Oid(1000), None);
            cache.set_last_tid(Tid(tid));
        }
        cache.close();
        let after = read(&path);
        let generation = |files: &Files| files[0].1.as_ref().map(|index| index[..20].to_vec());
        assert_ne!(generation(&before), generation(&after));
        let (again, _) = Cache::open(&path, max).unwrap();
        for oid in 0..50 {
            for cache in [&cache, &again] {
                let loaded = cache.load_before(Oid(oid), Tid(2)).expect("still there");
                assert_eq!(&loaded.data[..], &[oid as u8; 500]);
            }
        }
    }

    #[test]
    fn a_second_user_gets_a_temporary_cache() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cache");
        let (first, _) = Cache::open(&path, 1 << 20).unwrap();
        first.store(Oid(1), Tid(1), None, b"x");
        first.set_last_tid(Tid(1));
        let (second, opened) = Cache::open(&path, 1 << 20).unwrap();
        assert!(matches!(opened, Opened::InUse(_)) && !second.is_persistent() && second.is_empty());
        first.close();
        let (third, opened) = Cache::open(&path, 1 << 20).unwrap();
        assert!(matches!(opened, Opened::Warm(Tid(1))) && third.covers(Oid(1), Tid(2)), "{opened:?}");
    }

    #[test]
    fn the_file_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cache");
        let max = 100_000;
        let (cache, _) = Cache::open(&path, max).unwrap();
        for tid in 1..4000 {
            cache.invalidate(Oid(tid % 300), Some(Tid(tid)));
            cache.store(Oid(tid % 300), Tid(tid), None, &[7; 1000]);
            cache.set_last_tid(Tid(tid));
        }
        cache.close();
        let kept = cache.len();
        let stats = inspect(&path).unwrap().unwrap();
        assert!(stats.file_bytes + stats.values_bytes < 2 * max as u64 + (2 << 20), "{stats:?}");
        assert_eq!((stats.file_bytes, stats.last_tid), (fs::metadata(&path).unwrap().len(), Tid(3999)));
        assert_eq!((stats.whole_bytes, stats.largest), (stats.file_bytes, 1000));
        assert!(stats.current <= 300 && stats.revisions >= kept as u64 / 2, "{stats:?}");
        fs::write(directory.path().join("other"), "ZEC3 and so on").unwrap();
        assert_eq!(inspect(&directory.path().join("other")).unwrap(), None);
        let (again, opened) = Cache::open(&path, max).unwrap();
        assert!(matches!(opened, Opened::Warm(Tid(3999))) && again.len() > kept / 2, "{opened:?}");
        assert!(again.load_before(Oid(3999 % 300), Tid(4000)).is_some());
    }

    /// `cargo test --release --lib a_gigabyte -- --ignored --nocapture`.
    #[test]
    #[ignore = "not a check but a figure"]
    fn opening_a_gigabyte() {
        let directory = tempfile::tempdir_in("target").unwrap();
        let path = directory.path().join("cache");
        let max = 1200 << 20;
        let (cache, _) = Cache::open(&path, max).unwrap();
        let data = [7; 1000];
        for oid in 0..1_000_000 {
            cache.store(Oid(oid), Tid(1), None, &data);
            // The writer leaves revisions out if it falls behind.
            if oid % 8192 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
        cache.set_last_tid(Tid(1));
        cache.close();
        let kept = inspect(&path).unwrap().unwrap();
        drop(cache);
        for _ in 0..3 {
            let start = std::time::Instant::now();
            let (cache, _) = Cache::open(&path, max).unwrap();
            let opened = start.elapsed();
            let start = std::time::Instant::now();
            let found = (0..100_000).filter(|oid| cache.load_before(Oid(oid * 10), Tid(2)).is_some()).count();
            let loaded = start.elapsed();
            println!(
                "{} revisions, {} + {} bytes: open {opened:?}; {found} first reads {loaded:?}",
                kept.revisions, kept.file_bytes, kept.values_bytes
            );
            cache.close();
        }
    }
}
