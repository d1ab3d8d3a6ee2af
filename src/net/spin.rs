//! [`Spin`]: whether to ask a socket some times before sleeping on it.
//!
//! On a machine with an idle core an answer over loopback is there sooner than a thread can be put to sleep and woken again,
//! which takes an interrupt to another core: half of a round trip, and as much CPU time as asking meanwhile. Where that does not
//! pay (the peer is far, or all cores are busy and the peer needs this one) it is given up after [`LONGEST`], and tried ever more
//! seldom.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest time of asking.
const LONGEST: Duration = Duration::from_micros(50);
/// At the most so many waits go by between two attempts: what failing ones cost is then 0.2 us a wait.
const SELDOM: u32 = 255;

/// One for each connection and side. Its counters are a guide only, so they may be shared without order.
#[derive(Debug, Default)]
pub(crate) struct Spin {
    /// Waits that go by before the next attempt.
    skip: AtomicU32,
    /// As many as after the last one.
    pause: AtomicU32,
}

impl Spin {
    /// What `ask` answers within [`LONGEST`]; `None` if it answered nothing, or was not asked. Costs an atomic read and write when it
    /// is not asked; otherwise what `ask` costs, and a look at the clock each time.
    pub(crate) fn ask<T>(&self, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
        let skip = self.skip.load(Ordering::Relaxed);
        if skip > 0 {
            self.skip.store(skip - 1, Ordering::Relaxed);
            return None;
        }
        let pause = self.pause.load(Ordering::Relaxed);
        let until = Instant::now() + LONGEST;
        let (answer, pause) = loop {
            if let Some(answer) = ask() {
                break (Some(answer), pause / 4);
            }
            if Instant::now() >= until {
                break (None, (2 * pause + 1).min(SELDOM));
            }
            std::hint::spin_loop();
        };
        self.pause.store(pause, Ordering::Relaxed);
        self.skip.store(pause, Ordering::Relaxed);
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_asked_ever_more_seldom_while_nothing_is_answered() {
        let spin = Spin::default();
        let attempts = |waits: u32, answer: Option<()>| {
            let mut attempts = 0;
            for _ in 0..waits {
                let mut asked = false;
                let got = spin.ask(|| {
                    asked = true;
                    answer
                });
                assert!(got.is_none() || asked);
                attempts += u32::from(asked);
            }
            attempts
        };
        assert_eq!(attempts(100, Some(())), 100);
        let failing = attempts(1000, None);
        assert!((8..=12).contains(&failing), "{failing}");
        // Once it pays again it is soon tried every time.
        attempts(2 * SELDOM, Some(()));
        assert_eq!(attempts(100, Some(())), 100);
    }
}
