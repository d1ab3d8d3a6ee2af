use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use super::super::core::tests::Nobody;
use super::*;
use crate::cache::Cache;
use crate::net::Address;
use crate::shelf::{FORMAT, Shelf};

/// The next server may know what ended a revision of the last one's shelf, and the cache is verified once.
#[test]
fn nothing_gets_from_the_shelf_into_the_cache_after_the_end() {
    const OBJECTS: u64 = 3000;
    const CAPACITY: u64 = 8 << 20;
    let shelf = Shelf::new(CAPACITY).unwrap();
    shelf.prepare();
    let reader = || {
        let descriptor = shelf.reader().try_clone_to_owned().unwrap();
        ShelfReader::open(descriptor, FORMAT, CAPACITY).unwrap()
    };
    drop(reader());
    for oid in (0..OBJECTS).map(Oid) {
        shelf.put(shelf.ticket(oid).unwrap(), oid, Tid(5), b"data");
    }
    let directory = tempfile::tempdir().unwrap();
    let address = Address::Unix(directory.path().join("socket"));
    let Address::Unix(path) = &address else { unreachable!() };
    let listener = UnixListener::bind(path).unwrap();
    let mut in_between = 0;
    for _ in 0..20 {
        let core = Arc::new(Core::new(Arc::new(Cache::new(16 << 20)), Tid(9), Arc::new(Nobody)));
        let deadline = Instant::now() + Duration::from_secs(10);
        let stream = Stream::connect(&address, None, deadline, &AtomicBool::new(false)).unwrap();
        let _server = listener.accept().unwrap();
        let connection = Connection {
            stream,
            encoding: Encoding::Msgpack,
            generation: 1,
            shelf: Some(reader()),
            news: News::new(Arc::clone(&core)),
            core: Arc::clone(&core),
            wake: Arc::new(Wake::new().unwrap()),
            next_id: AtomicI64::new(1),
            dead: AtomicBool::new(false),
            leads: AtomicU64::new(0),
            shared: Mutex::default(),
            out: Mutex::default(),
            written: Condvar::new(),
            inbox: Mutex::default(),
        };
        let loaded = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for oid in (0..OBJECTS).map(Oid) {
                    if connection.load_from_shelf(oid, Tid(10)).is_some() {
                        loaded.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
            while loaded.load(Ordering::SeqCst) < 100 {
                std::hint::spin_loop();
            }
            connection.fail(ClientError::disconnected("the server is gone"));
            let kept = core.cache.len();
            in_between += usize::from(loaded.load(Ordering::SeqCst) < OBJECTS as usize / 2);
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(core.cache.len(), kept);
        });
        assert_eq!(core.cache.len(), loaded.into_inner(), "nor is anything shown that does not");
    }
    assert!(in_between > 0, "the end was too late to tell");
}
