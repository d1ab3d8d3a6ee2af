//! [`Rates`]: what a storage did a second, over the last minute, for the status page.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::server::hub::Stats;

/// How often a sample is taken, and how many are kept: a minute.
pub(crate) const SAMPLE_EVERY: Duration = Duration::from_secs(5);
const SAMPLES: usize = 12;

pub(crate) const NAMES: [&str; 6] =
    ["loads", "stores", "commits", "conflicts", "bytes_received", "bytes_sent"];

/// Counters in the order of [`NAMES`].
pub(crate) type Counters = [u64; NAMES.len()];

pub(crate) fn counters(stats: &Stats) -> Counters {
    let read = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    [
        read(&stats.loads),
        read(&stats.stores),
        read(&stats.commits),
        read(&stats.conflicts),
        read(&stats.bytes_received),
        read(&stats.bytes_sent),
    ]
}

/// See the module documentation. Oldest sample first.
#[derive(Debug, Default)]
pub(crate) struct Rates(Mutex<VecDeque<(Instant, Counters)>>);

impl Rates {
    pub(crate) fn sample(&self, now: Instant, counters: Counters) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() == SAMPLES {
            samples.pop_front();
        }
        samples.push_back((now, counters));
    }

    /// Each counter's growth a second since the oldest sample; zeros without one.
    pub(crate) fn per_second(&self, now: Instant, counters: Counters) -> [f64; NAMES.len()] {
        let oldest = self.0.lock().unwrap_or_else(PoisonError::into_inner).front().copied();
        let Some((since, then)) = oldest else { return [0.0; NAMES.len()] };
        let seconds = now.saturating_duration_since(since).as_secs_f64().max(1.0);
        let mut rates = [0.0; NAMES.len()];
        for (rate, (now, then)) in rates.iter_mut().zip(counters.into_iter().zip(then)) {
            *rate = now.saturating_sub(then) as f64 / seconds;
        }
        rates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_last_minute() {
        let rates = Rates::default();
        let start = Instant::now();
        assert_eq!(rates.per_second(start, [5; 6]), [0.0; 6]);
        for number in 0..100 {
            rates.sample(start + SAMPLE_EVERY * number, [u64::from(number) * 10; 6]);
        }
        // the samples 88 to 99 are left
        let now = start + SAMPLE_EVERY * 100;
        assert_eq!(rates.per_second(now, [1000; 6]), [2.0; 6]);
    }
}
