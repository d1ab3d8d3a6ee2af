//! The cache against a model of the database, and its eviction against ZEO's.

use std::collections::{BTreeMap, HashMap, VecDeque};

use proptest::prelude::*;

use super::{Cache, NODE_OVERHEAD};
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
            cache.for_each(|_, _, _, data| { bytes += data.len() + NODE_OVERHEAD; count += 1; });
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

#[test]
fn too_large_is_not_kept() {
    let cache = Cache::new(1000);
    cache.store(Oid(1), Tid(1), None, b"small");
    cache.store(Oid(2), Tid(1), None, &[0; 1000]);
    assert!(cache.covers(Oid(1), Tid(2)) && !cache.covers(Oid(2), Tid(2)));
    assert_eq!(Cache::new(0).max_bytes(), 0);
}

/// ZEO's cache file: a ring, in which a record found far behind the write position is written again.
struct Ring {
    size: usize,
    written: usize,
    places: HashMap<u64, usize>,
    order: VecDeque<(u64, usize, usize)>,
}

impl Ring {
    fn new(size: usize) -> Self {
        Self { size, written: 0, places: HashMap::new(), order: VecDeque::new() }
    }

    fn access(&mut self, oid: u64, len: usize) -> bool {
        let found = self.places.get(&oid).copied();
        match found {
            Some(place) if self.written - place <= self.size * 8 / 10 => true,
            _ => {
                self.write(oid, len + 43);
                found.is_some()
            }
        }
    }

    fn write(&mut self, oid: u64, len: usize) {
        self.places.insert(oid, self.written);
        self.order.push_back((oid, self.written, len));
        self.written += len;
        while let Some(&(old, place, _)) = self.order.front()
            && self.written - place > self.size
        {
            self.order.pop_front();
            if self.places.get(&old) == Some(&place) {
                self.places.remove(&old);
            }
        }
    }
}

/// Hit rates on a trace: `(this cache, ZEO's ring)`. Both get the same bytes; this one pays more overhead a revision.
fn compare(trace: &[u64], size: usize) -> (f64, f64) {
    let (cache, mut ring, mut hits, mut ring_hits) = (Cache::new(size), Ring::new(size), 0, 0);
    for &oid in trace {
        let len = 200 + (oid % 7) as usize * 150;
        if cache.load_before(Oid(oid), Tid::MAX).is_some() {
            hits += 1;
        } else {
            cache.store(Oid(oid), Tid(1), None, &vec![0; len]);
        }
        ring_hits += usize::from(ring.access(oid, len));
    }
    (f64::from(hits) / trace.len() as f64, ring_hits as f64 / trace.len() as f64)
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

    /// Opens a copy of the file, verifies as a client does, and compares every answer with the database.
    fn reopen(bytes: &[u8], database: &Database, directory: &Path, max: usize) {
        let path = directory.join("copy");
        fs::write(&path, bytes).unwrap();
        let (cache, opened) = Cache::open(&path, max).unwrap();
        let last = match opened {
            Opened::Warm(tid) => tid,
            Opened::Empty => {
                assert!(cache.is_empty());
                cache.close();
                return;
            }
            Opened::InUse(_) => panic!("nobody uses it"),
        };
        assert!(last.0 <= database.last);
        for (oid, revisions) in &database.revisions {
            if revisions.range(last.0 + 1..).next().is_some() {
                cache.invalidate(Oid(u64::from(*oid)), None);
            }
        }
        for oid in 0..6 {
            for before in 0..=database.last + 1 {
                check(&cache, database, oid, before);
            }
        }
        cache.close();
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
            let Ok(bytes) = fs::read(&path) else { return Ok(()) };
            reopen(&bytes, &database, directory.path(), max);
            reopen(&bytes, &database, directory.path(), 1 << 20);
            for cut in cuts {
                let at = cut.index(bytes.len().max(1));
                reopen(&bytes[..at], &database, directory.path(), 1 << 20);
                let mut damaged = bytes.clone();
                if let Some(byte) = damaged.get_mut(at) {
                    *byte ^= 0x41;
                    reopen(&damaged, &database, directory.path(), 1 << 20);
                }
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
        assert!(stats.file_bytes < 2 * max as u64 + (2 << 20), "{stats:?}");
        assert_eq!((stats.file_bytes, stats.last_tid), (fs::metadata(&path).unwrap().len(), Tid(3999)));
        assert_eq!((stats.whole_bytes, stats.largest), (stats.file_bytes, 1000));
        assert!(stats.current <= 300 && stats.revisions >= kept as u64 / 2, "{stats:?}");
        fs::write(directory.path().join("other"), "ZEC3 and so on").unwrap();
        assert_eq!(inspect(&directory.path().join("other")).unwrap(), None);
        let (again, opened) = Cache::open(&path, max).unwrap();
        assert!(matches!(opened, Opened::Warm(Tid(3999))) && again.len() > kept / 2, "{opened:?}");
        assert!(again.load_before(Oid(3999 % 300), Tid(4000)).is_some());
    }
}
