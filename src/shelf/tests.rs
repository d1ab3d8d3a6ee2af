use std::collections::HashMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;

const CAPACITY: u64 = MIN_CAPACITY;

fn shelf() -> (Shelf, ShelfReader) {
    let shelf = Shelf::new(CAPACITY).unwrap();
    assert!(!shelf.is_ready());
    shelf.prepare();
    assert!(shelf.is_ready());
    let reader = ShelfReader::open(shelf.reader().try_clone_to_owned().unwrap(), FORMAT, CAPACITY).unwrap();
    (shelf, reader)
}

fn put(shelf: &Shelf, oid: u64, tid: u64, data: &[u8]) {
    let ticket = shelf.ticket(Oid(oid)).unwrap();
    shelf.put(ticket, Oid(oid), Tid(tid), data);
}

#[test]
fn what_was_put_is_there_until_it_changes() {
    let (shelf, reader) = shelf();
    assert_eq!(reader.load(Oid(1)), None);
    put(&shelf, 1, 10, b"one");
    put(&shelf, 0, 10, b"zero");
    assert_eq!(reader.load(Oid(1)), Some((Tid(10), b"one".to_vec())));
    assert_eq!(reader.load(Oid(0)), Some((Tid(10), b"zero".to_vec())));
    put(&shelf, 1, 10, b"one");
    assert_eq!(shelf.puts(), 2, "it was there");
    shelf.remove(&[Oid(1), Oid(7)]);
    assert_eq!(reader.load(Oid(1)), None);
    put(&shelf, 1, 11, b"two");
    assert_eq!(reader.load(Oid(1)), Some((Tid(11), b"two".to_vec())));
    shelf.clear();
    assert_eq!((reader.load(Oid(1)), reader.load(Oid(0))), (None, None));
    put(&shelf, 1, 11, b"two");
    assert_eq!(reader.load(Oid(1)), Some((Tid(11), b"two".to_vec())));
}

#[test]
fn what_changed_since_the_ticket_is_not_put() {
    let (shelf, reader) = shelf();
    let ticket = shelf.ticket(Oid(1)).unwrap();
    shelf.remove(&[Oid(1)]);
    shelf.put(ticket, Oid(1), Tid(10), b"old");
    assert_eq!(reader.load(Oid(1)), None);
    let ticket = shelf.ticket(Oid(1)).unwrap();
    shelf.clear();
    shelf.put(ticket, Oid(1), Tid(10), b"old");
    assert_eq!(reader.load(Oid(1)), None);
}

#[test]
fn nothing_is_put_for_nobody_nor_what_is_too_large_or_nothing() {
    let shelf = Shelf::new(CAPACITY).unwrap();
    assert!(!shelf.is_ready());
    assert!(shelf.ticket(Oid(1)).is_none(), "nobody reads");
    shelf.prepare();
    assert!(shelf.is_ready());
    let reader = ShelfReader::open(shelf.reader().try_clone_to_owned().unwrap(), FORMAT, CAPACITY).unwrap();
    put(&shelf, 1, 10, b"");
    put(&shelf, 2, 10, &vec![0; MAX_DATA + 1]);
    put(&shelf, 3, 10, &vec![7; MAX_DATA]);
    assert_eq!((reader.load(Oid(1)), reader.load(Oid(2))), (None, None));
    assert_eq!(reader.load(Oid(3)), Some((Tid(10), vec![7; MAX_DATA])));
}

#[test]
fn only_the_server_writes_and_only_shelves_are_read() {
    let (shelf, _) = shelf();
    let file = File::from(shelf.reader().try_clone_to_owned().unwrap());
    assert!(file.set_len(0).is_err());
    assert!(std::os::unix::fs::FileExt::write_at(&file, b"x", 0).is_err());
    let descriptor = || shelf.reader().try_clone_to_owned().unwrap();
    assert!(ShelfReader::open(descriptor(), FORMAT + 1, CAPACITY).is_none());
    assert!(ShelfReader::open(descriptor(), FORMAT, MIN_CAPACITY - 1).is_none());
    assert!(ShelfReader::open(descriptor(), FORMAT, u64::MAX).is_none());
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(ShelfReader::open(socket.into(), FORMAT, CAPACITY).is_none(), "no file");
    // A file, but not in memory: reading some of them does not end.
    let file = File::open("/proc/self/status").unwrap();
    assert!(file.metadata().unwrap().is_file());
    assert!(ShelfReader::open(file.into(), FORMAT, CAPACITY).is_none(), "elsewhere");
    // Larger than it is: what is missing is not there.
    let reader = ShelfReader::open(descriptor(), FORMAT, 1 << 30).unwrap();
    assert_eq!(reader.load(Oid(1)), None);
    assert!(Shelf::new(MIN_CAPACITY - 1).is_err());
}

/// Many times around the ring, in every size: whatever is found is the newest, and a good part is found.
#[test]
fn a_full_shelf_forgets_and_never_mixes_up() {
    let (shelf, reader) = shelf();
    let mut model = HashMap::new();
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    };
    let mut found = 0;
    for step in 1..60_000u64 {
        let oid = random() % 3000;
        if random() % 8 == 0 {
            shelf.remove(&[Oid(oid)]);
            model.remove(&oid);
        } else {
            let length = if random() % 50 == 0 { random() % 60_000 } else { random() % 900 };
            let data: Vec<u8> = (0..1 + length).map(|i| (i ^ step ^ oid) as u8).collect();
            put(&shelf, oid, step, &data);
            model.insert(oid, (Tid(step), data));
        }
        let asked = random() % 3000;
        if let Some(loaded) = reader.load(Oid(asked)) {
            assert_eq!(Some(&loaded), model.get(&asked), "step {step}");
            found += 1;
        }
    }
    assert!(found > 10_000, "{found}");
}

/// A checksum of four bytes fits by chance, sooner or later, if entries whose data is overwritten are asked for all the time.
#[test]
fn what_was_overwritten_is_not_there_whatever_its_checksum() {
    let (shelf, reader) = shelf();
    let data = *b"data of one";
    put(&shelf, 1, 10, &data);
    assert!(reader.load(Oid(1)).is_some());
    // Others' data that has the same checksum: they differ by the polynomial, 33 bits.
    let mut other = data;
    for bit in (0..33).filter(|bit| 0x1_04c1_1db7_u64 >> (32 - bit) & 1 == 1) {
        other[bit / 8] ^= 1 << (bit % 8);
    }
    let entry = |oid, data: &[u8]| Entry::new(Oid(oid), Tid(10), 0, data);
    assert_eq!(entry(1, &data).checksum, entry(1, &other).checksum);
    shelf.overwrite(0, &[&entry(2, &other).label()[..], &other].concat());
    assert_eq!(reader.load(Oid(1)), None);
}

/// A commit of a million objects takes them all away; loads go on meanwhile.
#[test]
fn a_load_does_not_wait_for_the_shelf() {
    let (shelf, reader) = shelf();
    let busy = shelf.busy();
    put(&shelf, 1, 10, b"one");
    drop(busy);
    assert_eq!(reader.load(Oid(1)), None);
    put(&shelf, 1, 10, b"one");
    assert!(reader.load(Oid(1)).is_some());
}

/// Objects change all the time: a reader never finds what had been ended before it began, nor halves of two revisions.
#[test]
fn readers_beside_a_writer_find_what_is_current() {
    const OBJECTS: u64 = 64;
    let (shelf, reader) = shelf();
    let committed: Vec<AtomicU64> = (0..OBJECTS).map(|_| AtomicU64::new(1)).collect();
    let published: Vec<AtomicU64> = (0..OBJECTS).map(|_| AtomicU64::new(1)).collect();
    let bytes = |oid: u64, tid: u64| -> Vec<u8> {
        let length = 1 + (oid * 131 + tid * 977) % 30_000;
        (0..length).map(|i| (i ^ oid ^ tid) as u8).collect()
    };
    let done = AtomicU64::new(0);
    let found = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let patience = Instant::now() + Duration::from_secs(60);
            let mut step = 0;
            while step < 20_000 || found.load(Ordering::SeqCst) < 1000 && Instant::now() < patience {
                step += 1;
                if step % 16 == 0 {
                    std::thread::yield_now();
                }
                let oid = step * 7 % OBJECTS;
                // The index, then the shelf, then everybody.
                let tid = committed[oid as usize].fetch_add(1, Ordering::SeqCst) + 1;
                shelf.remove(&[Oid(oid)]);
                published[oid as usize].store(tid, Ordering::SeqCst);
            }
            done.store(1, Ordering::SeqCst);
        });
        // Two sessions that load.
        for seed in 0..2u64 {
            let (shelf, committed, bytes, done) = (&shelf, &committed, &bytes, &done);
            scope.spawn(move || {
                let mut step = seed;
                while done.load(Ordering::SeqCst) == 0 {
                    step += 5;
                    let oid = step % OBJECTS;
                    let ticket = shelf.ticket(Oid(oid)).unwrap();
                    let tid = committed[oid as usize].load(Ordering::SeqCst);
                    shelf.put(ticket, Oid(oid), Tid(tid), &bytes(oid, tid));
                }
            });
        }
        scope.spawn(|| {
            let mut step = 0;
            while done.load(Ordering::SeqCst) == 0 {
                step += 3;
                let oid = step % OBJECTS;
                let known = published[oid as usize].load(Ordering::SeqCst);
                if let Some((tid, data)) = reader.load(Oid(oid)) {
                    assert!(tid.0 >= known, "{oid}: {tid} after {known}");
                    assert_eq!(data, bytes(oid, tid.0));
                    found.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
    });
    assert!(found.load(Ordering::SeqCst) >= 1000);
}
