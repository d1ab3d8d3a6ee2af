//! [`Owner`]: the process that opened something, told from its forks.
//!
//! `fork` copies memory, descriptors and with them locks: a child has a storage that looks open, with the file as it was
//! then. Whatever it does to the file, its lock or the files beside it, it does to its parent. So what changes files
//! asks first, and what tidies up when it is dropped does nothing in a child.

use std::process;

/// Costs a `getpid` to ask.
#[derive(Clone, Copy, Debug)]
pub struct Owner(u32);

impl Owner {
    /// This process.
    pub fn here() -> Self {
        Self(process::id())
    }

    /// Whether this is still the process that it was.
    pub fn is_here(self) -> bool {
        self.0 == process::id()
    }

    pub fn pid(self) -> u32 {
        self.0
    }
}
