//! Tests of [`LockTable`]: the plain rule, what is news to whom, and who may step aside.

use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;

fn objects(oids: &[(u64, bool)]) -> LockSet {
    LockSet::Objects(oids.iter().map(|(oid, exclusive)| (Oid(*oid), *exclusive)).collect())
}

struct Asked {
    guard: LockGuard,
    granted: Arc<AtomicUsize>,
    changed: Arc<AtomicUsize>,
}

impl Asked {
    fn holds(&self) -> bool {
        self.granted.load(Ordering::SeqCst) == 1
    }
}

fn ask(table: &Arc<LockTable>, set: &LockSet) -> Asked {
    let granted = Arc::new(AtomicUsize::new(0));
    let changed = Arc::new(AtomicUsize::new(0));
    let counters = [Arc::clone(&granted), Arc::clone(&changed)];
    let (guard, now) = table.request(set, "test".into(), move |news| {
        counters[usize::from(news == News::Changed)].fetch_add(1, Ordering::SeqCst);
    });
    granted.fetch_add(usize::from(now), Ordering::SeqCst);
    Asked { guard, granted, changed }
}

#[test]
fn disjoint_objects_are_held_side_by_side() {
    let table = Arc::new(LockTable::default());
    let a = ask(&table, &objects(&[(1, true), (2, true)]));
    let b = ask(&table, &objects(&[(3, true)]));
    assert!(a.holds() && b.holds());
    assert_eq!(table.waiting(), 0);
}

#[test]
fn a_waiter_keeps_later_arrivals_from_its_objects() {
    let table = Arc::new(LockTable::default());
    let a = ask(&table, &objects(&[(1, true)]));
    let b = ask(&table, &objects(&[(1, true), (2, true)]));
    let c = ask(&table, &objects(&[(2, true)]));
    assert!(a.holds() && !b.holds() && !c.holds());
    assert_eq!(table.waiting(), 2);
    drop(a.guard);
    assert!(b.holds() && !c.holds());
    drop(b.guard);
    assert!(c.holds());
}

#[test]
fn a_commit_is_news_to_all_who_wait_for_what_it_wrote() {
    let table = Arc::new(LockTable::default());
    let mut a = ask(&table, &objects(&[(1, true), (2, true), (3, false)]));
    let waiting =
        [[(1, true), (2, true)], [(2, true), (4, true)], [(1, false), (9, true)], [(3, true), (5, true)]]
            .map(|oids| ask(&table, &objects(&oids)));
    assert!(a.holds() && waiting.iter().all(|asked| !asked.holds()));
    a.guard.changed();
    drop(a.guard);
    let seen = waiting.each_ref().map(|asked| (asked.holds(), asked.changed.load(Ordering::SeqCst)));
    // The first is granted; of the others, those that touch what was written hear of it once; 3 was only read.
    assert_eq!(seen, [(true, 0), (false, 1), (false, 1), (true, 0)]);
    let [first, second, third, _] = waiting;
    // Aborted: no news.
    drop(first.guard);
    assert!(second.holds() && third.holds());
    assert_eq!((second.changed.load(Ordering::SeqCst), third.changed.load(Ordering::SeqCst)), (1, 1));
}

#[test]
fn leaving_the_queue_lets_the_next_in() {
    let table = Arc::new(LockTable::default());
    let a = ask(&table, &objects(&[(1, false)]));
    let b = ask(&table, &objects(&[(1, true)]));
    let c = ask(&table, &objects(&[(1, false)]));
    assert!(a.holds() && !b.holds() && !c.holds());
    drop(b.guard);
    assert!(c.holds() && table.waiting() == 0);
}

#[test]
fn the_whole_storage_waits_for_all_and_holds_back_all() {
    let table = Arc::new(LockTable::default());
    let a = ask(&table, &objects(&[(1, true)]));
    let whole = ask(&table, &LockSet::WholeStorage);
    let b = ask(&table, &objects(&[(2, true)]));
    assert!(a.holds() && !whole.holds() && !b.holds());
    drop(a.guard);
    assert!(whole.holds() && !b.holds());
    drop(whole.guard);
    assert!(b.holds());
    drop(b.guard);
    assert!(table.lock().queues.is_empty() && table.lock().requests.is_empty());
}

/// Looks as a watch does, `seconds` from now.
fn look(table: &Arc<LockTable>, asked: &Asked, seconds: u64) -> bool {
    let now = Instant::now() + Duration::from_secs(seconds);
    table.look(asked.guard.id, now, Some(Duration::from_secs(30))).is_some()
}

#[test]
fn a_hung_client_and_a_wish_for_the_whole_storage_stop_nobody_else() {
    let table = Arc::new(LockTable::default());
    let hung = ask(&table, &objects(&[(1, true)]));
    let whole = ask(&table, &LockSet::WholeStorage);
    let b = ask(&table, &objects(&[(2, true)]));
    assert!(look(&table, &whole, 0));
    assert!(!whole.holds() && !b.holds(), "not before the holder is old");
    assert!(look(&table, &whole, 2));
    assert!(!whole.holds() && b.holds());
    let c = ask(&table, &objects(&[(3, true)]));
    assert!(c.holds());
    assert_eq!(table.waiting(), 1);
    // Nobody is old (the table's clock is not the test's): its turn comes before that of later ones.
    drop(hung.guard);
    let d = ask(&table, &objects(&[(4, true)]));
    assert!(!whole.holds() && !d.holds());
    drop(b.guard);
    drop(c.guard);
    assert!(whole.holds() && !d.holds());
    assert!(!look(&table, &whole, 2));
    drop(whole.guard);
    assert!(d.holds());
    drop(d.guard);
    assert!(table.lock().queues.is_empty() && table.lock().requests.is_empty());
    assert!(table.lock().aside.is_empty() && table.waiting() == 0);
}

#[test]
fn the_whole_storage_lets_others_pass_for_a_time_only() {
    let table = Arc::new(LockTable::default());
    let hung = ask(&table, &objects(&[(1, true)]));
    let whole = ask(&table, &LockSet::WholeStorage);
    assert!(look(&table, &whole, 2));
    let b = ask(&table, &objects(&[(2, true)]));
    assert!(b.holds());
    assert!(!look(&table, &whole, 30), "it needs no more looks");
    let c = ask(&table, &objects(&[(3, true)]));
    assert!(!look(&table, &whole, 31));
    assert!(!c.holds() && !whole.holds());
    drop(b.guard);
    drop(hung.guard);
    assert!(whole.holds() && !c.holds());
    drop(whole.guard);
    assert!(c.holds());
}

#[test]
fn who_stands_aside_may_give_up() {
    let table = Arc::new(LockTable::default());
    let hung = ask(&table, &objects(&[(1, true)]));
    let whole = ask(&table, &LockSet::WholeStorage);
    let second = ask(&table, &LockSet::WholeStorage);
    assert!(look(&table, &whole, 2) && look(&table, &second, 2));
    drop(whole.guard);
    assert_eq!(table.waiting(), 1);
    drop(hung.guard);
    assert!(second.holds());
}

proptest! {
    /// With looks of all kinds: nothing that conflicts is held at once, somebody always goes on, an early wish for the
    /// whole storage is passed by nobody who comes later once it was let wait for long enough, and nothing is left behind.
    #[test]
    fn stepping_aside_starves_nobody(
        steps in proptest::collection::vec(
            (0u8..4, proptest::collection::btree_map(0u64..4, any::<bool>(), 0..3), 0usize..8, 0u8..4), 1..60)
    ) {
        let table = Arc::new(LockTable::default());
        // With the number of the next request when it became firm.
        let mut living: Vec<(LockSet, Asked, Option<u64>)> = Vec::new();
        for (step, oids, at, whole) in steps {
            let at = at % living.len().max(1);
            match step {
                _ if living.is_empty() || step == 0 => {
                    let oids: Vec<_> = oids.into_iter().collect();
                    let set = if whole == 0 { LockSet::WholeStorage } else { objects(&oids) };
                    let asked = ask(&table, &set);
                    living.push((set, asked, None));
                }
                1 => drop(living.remove(at)),
                2 => drop(look(&table, &living[at].1, 2)),
                _ => {
                    let (_, asked, firm) = &mut living[at];
                    look(&table, asked, 31);
                    let table = table.lock();
                    if firm.is_none() && table.requests[&asked.guard.id].stand == Stand::Firm {
                        *firm = Some(table.next_id);
                    }
                }
            }
            for (at, (set, asked, _)) in living.iter().enumerate().filter(|(_, (_, asked, _))| asked.holds()) {
                for (other, earlier, firm) in living[..at].iter().filter(|(other, ..)| conflict(other, set)) {
                    prop_assert!(!earlier.holds(), "{other:?} and {set:?} at once");
                    prop_assert!(firm.is_none_or(|firm| asked.guard.id < firm), "{other:?} overtaken by {set:?}");
                }
            }
            prop_assert!(living.is_empty() || living.iter().any(|(_, asked, _)| asked.holds()));
            let waiting = living.iter().filter(|(_, asked, _)| !asked.holds()).count();
            prop_assert_eq!(table.waiting(), waiting);
        }
        // Whoever waits gets its turn as those before it end.
        while !living.is_empty() {
            let at = living.iter().position(|(_, asked, _)| asked.holds());
            prop_assert!(at.is_some());
            drop(living.remove(at.unwrap_or_default()));
        }
        let table = table.lock();
        prop_assert!(table.queues.is_empty() && table.requests.is_empty() && table.aside.is_empty());
    }

    /// Against the obvious rule: granted exactly if no earlier living request conflicts.
    #[test]
    fn grants_are_those_of_the_plain_rule(
        steps in proptest::collection::vec(
            (any::<bool>(), proptest::collection::btree_map(0u64..6, any::<bool>(), 0..4), 0usize..8, 0u8..8), 1..60)
    ) {
        let table = Arc::new(LockTable::default());
        let mut living: Vec<(LockSet, Asked)> = Vec::new();
        for (ask_more, oids, victim, whole) in steps {
            if ask_more || living.is_empty() {
                let oids: Vec<_> = oids.into_iter().collect();
                let set = if whole == 0 { LockSet::WholeStorage } else { objects(&oids) };
                let asked = ask(&table, &set);
                living.push((set, asked));
            } else {
                let at = victim % living.len();
                drop(living.remove(at));
            }
            for (at, (set, asked)) in living.iter().enumerate() {
                let free = living[..at].iter().all(|(earlier, _)| !conflict(earlier, set));
                prop_assert_eq!(asked.holds(), free);
            }
        }
    }
}

fn conflict(a: &LockSet, b: &LockSet) -> bool {
    match (a, b) {
        (LockSet::Objects(a), LockSet::Objects(b)) => a
            .iter()
            .any(|(oid, exclusive)| b.iter().any(|(other, also)| oid == other && (*exclusive || *also))),
        _ => true,
    }
}
