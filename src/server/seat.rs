//! Seats: threads for connections that do nothing but load, one each.
//!
//! The threads of the shared runtime take turns at one `epoll`, so the one that has just answered a client is seldom the one that
//! the client's next request wakes. A client and a thread of its own wake each other: the system keeps such pairs together, and with 8
//! processes that load on two cores that is a fifth of all CPU time (docs/performance.md); where a core is idle, the thread may
//! ask its socket without sleeping ([`crate::net::Spin`]), which with one process is more than half of the time of a load.
//! Everything else is better off in the shared runtime: it handles many connections per wake-up, so idle ones, those that
//! hear of commits and those that commit stay there.
//!
//! A connection takes a seat after [`RUN`] loads within [`BUSY`] and nothing else, and gives it back at its first other
//! request, or when it has been quiet for one or two [`LOOK`]s. It is the same connection on either: what moves is its
//! socket's registration, between two requests.
//!
//! Cost: a move is one thread started, one `epoll` made, and two registrations; a load pays one comparison.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{self, Handle};
use tokio::sync::oneshot;

/// Loads without any other request, after which the clock is looked at.
const RUN: u64 = 64;
/// Who makes them within this time is busy.
const BUSY: Duration = Duration::from_millis(50);
/// How often a connection that has a seat is asked whether it still needs it. Then it needs [`RUN`] loads.
pub(crate) const LOOK: Duration = Duration::from_millis(100);

/// How many connections may have one.
pub(crate) struct Seats(Arc<AtomicUsize>);

impl Seats {
    pub(crate) fn new(count: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(count)))
    }

    pub(crate) fn free(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// `None` if all are taken.
    pub(crate) fn take(&self) -> Option<Seat> {
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(1));
        taken.ok().map(|_| Seat(Arc::clone(&self.0)))
    }
}

/// The right to one thread, until it is dropped.
pub(crate) struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a seat was given cannot be given back: its thread has panicked (the panic is in the log).
pub(crate) struct Lost;

impl Seat {
    /// Runs `work` on `tenant` in a thread of its own, and gives both it and the result back. There, `arrive` is called in the
    /// context of a runtime for its socket alone, without timers (a wait with a timeout costs the kernel more than one without);
    /// then `work` runs, its timers and tasks the calling runtime's.
    ///
    /// # Errors
    /// `Err(Ok((tenant, error)))` if there can be no thread, `Err(Err(Lost))` if `work` panicked.
    pub(crate) async fn run<T, R, F>(
        self,
        tenant: T,
        arrive: impl FnOnce(&mut T) + Send + 'static,
        work: F,
    ) -> Result<(T, R), Result<(T, io::Error), Lost>>
    where
        T: Send + 'static,
        R: Send + 'static,
        F: AsyncFnOnce(&mut T) -> R + Send + 'static,
    {
        let (give, taken) = oneshot::channel::<T>();
        let (give_back, back) = oneshot::channel();
        let shared = Handle::current();
        let started = runtime::Builder::new_current_thread().enable_io().build().and_then(|runtime| {
            thread::Builder::new().name("zeo server seat".into()).spawn(move || {
                let Ok(mut tenant) = taken.blocking_recv() else { return };
                let result = runtime.block_on(async {
                    arrive(&mut tenant);
                    let _timers = shared.enter();
                    work(&mut tenant).await
                });
                // Its task has ended only if the whole server was dropped.
                let _ = give_back.send((tenant, result));
            })
        });
        if let Err(error) = started {
            return Err(Ok((tenant, error)));
        }
        if give.send(tenant).is_err() {
            return Err(Err(Lost));
        }
        back.await.map_err(|_| Err(Lost))
    }
}

/// How a connection has been used of late.
pub(crate) struct Pace {
    since: Instant,
    loads: u64,
    others: u64,
}

impl Pace {
    /// Of a connection that has made so many loads and other requests so far.
    pub(crate) fn new((loads, others): (u64, u64)) -> Self {
        Self { since: Instant::now(), loads, others }
    }

    /// In the shared runtime: whether it should have a seat.
    pub(crate) fn is_busy(&mut self, so_far: (u64, u64)) -> bool {
        let (loads, others) = so_far;
        if others != self.others {
            *self = Self::new(so_far);
        } else if loads - self.loads >= RUN {
            let busy = self.since.elapsed() < BUSY;
            *self = Self::new(so_far);
            return busy;
        }
        false
    }

    /// On a seat: whether something else was asked for.
    pub(crate) fn has_changed(&self, (_, others): (u64, u64)) -> bool {
        others != self.others
    }

    /// On a seat, every [`LOOK`]: whether there were few loads since the last time.
    pub(crate) fn is_quiet(&mut self, so_far: (u64, u64)) -> bool {
        let quiet = so_far.0 - self.loads < RUN;
        *self = Self::new(so_far);
        quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_alone_and_many_of_them_make_busy() {
        let mut pace = Pace::new((0, 0));
        assert!(!pace.is_busy((RUN - 1, 0)));
        assert!(pace.is_busy((RUN, 0)));
        assert!(!pace.is_busy((RUN + 1, 0)), "counted anew");
        assert!(!pace.is_busy((3 * RUN, 1)), "something else in between");
        pace.since = Instant::now() - BUSY;
        assert!(!pace.is_busy((4 * RUN, 1)), "too slow");
    }

    #[test]
    fn a_seat_is_given_back_at_once_for_other_work_and_after_a_while_for_none() {
        let mut pace = Pace::new((10, 5));
        assert!(!pace.has_changed((11, 5)));
        assert!(pace.has_changed((11, 6)));
        assert!(!pace.is_quiet((10 + RUN, 5)));
        assert!(pace.is_quiet((10 + RUN + RUN - 1, 5)));
    }

    #[test]
    fn seats_are_counted() {
        let seats = Seats::new(1);
        let seat = seats.take();
        assert!(seat.is_some());
        assert!(seats.take().is_none());
        drop(seat);
        assert!(seats.take().is_some());
        assert!(Seats::new(0).take().is_none());
    }

    #[tokio::test]
    async fn a_panic_on_a_seat_costs_its_tenant_and_no_seat() {
        let seats = Seats::new(1);
        let seat = seats.take().expect("free");
        let outcome = seat.run(1, |_| {}, async |_: &mut i32| -> () { panic!("on purpose") }).await;
        assert!(matches!(outcome, Err(Err(Lost))));
        let seat = seats.take().expect("free again");
        let outcome = seat.run(1, |_| {}, async |tenant: &mut i32| std::mem::replace(tenant, 2)).await;
        assert!(matches!(outcome, Ok((2, 1))));
    }
}
