//! [`PackWatch`]: the pack of a storage, for those who want to know.

use std::sync::{Mutex, PoisonError};

use crate::storage::PackProgress;

/// The pack in progress, if any.
#[derive(Debug, Default)]
pub(crate) struct PackWatch(Mutex<Option<PackProgress>>);

impl PackWatch {
    pub(crate) fn progress(&self) -> Option<PackProgress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.progress().is_some()
    }

    /// A pack begins; `None`: another one runs, whose progress this is.
    pub(crate) fn begin(&self) -> Option<PackRun<'_>> {
        let mut progress = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if progress.is_some() {
            return None;
        }
        *progress = Some(PackProgress::default());
        Some(PackRun(self))
    }
}

/// The pack that is watched; it has ended when this is dropped, also by a panic.
pub(crate) struct PackRun<'a>(&'a PackWatch);

impl PackRun<'_> {
    pub(crate) fn set(&self, progress: &PackProgress) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress.clone());
    }
}

impl Drop for PackRun<'_> {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_progress_of_a_pack_is_its_own_and_ends_with_it() {
        let watch = PackWatch::default();
        let run = watch.begin();
        assert!(run.is_some());
        run.iter().for_each(|run| run.set(&PackProgress { bytes_done: 7, ..PackProgress::default() }));
        // one that is refused
        assert!(watch.begin().is_none());
        assert_eq!(watch.progress().map(|progress| progress.bytes_done), Some(7));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _run = run;
            panic!("in the engine");
        }));
        assert!(panicked.is_err() && !watch.is_running());
        assert!(watch.begin().is_some());
    }
}
