//! A file that remembers what was written and what was synced, and that fails on demand.

use std::io;
use std::sync::{Condvar, Mutex};

use zeo_rs::storage::file::file::StorageFile;

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write { pos: usize, bytes: Vec<u8> },
    SetLen(usize),
    Sync,
}

/// When to fail: at the n-th write, sync, cut or reservation from now on (counted together), with this error; `part` of
/// a failing write is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub after: usize,
    pub error: i32,
    pub part: usize,
    /// Whether everything after it fails, too.
    pub lasting: bool,
}

#[derive(Default)]
struct State {
    content: Vec<u8>,
    events: Vec<Event>,
    fault: Option<Fault>,
    read_error: bool,
    /// Syncs wait.
    hold: bool,
    waiting: bool,
}

#[derive(Default)]
pub(crate) struct Disk(Mutex<State>, Condvar);

impl Disk {
    pub(crate) fn with(content: Vec<u8>) -> Self {
        Self(Mutex::new(State { content, ..Default::default() }), Condvar::new())
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.0.lock().unwrap().content.clone()
    }

    /// Changes the bytes behind the engine's back.
    pub(crate) fn put(&self, content: Vec<u8>) {
        self.0.lock().unwrap().content = content;
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().events.clone()
    }

    pub(crate) fn event_count(&self) -> usize {
        self.0.lock().unwrap().events.len()
    }

    pub(crate) fn fail(&self, fault: Option<Fault>) {
        self.0.lock().unwrap().fault = fault;
    }

    /// Makes syncs wait, or lets them go on.
    pub(crate) fn hold_syncs(&self, hold: bool) {
        self.0.lock().unwrap().hold = hold;
        self.1.notify_all();
    }

    pub(crate) fn wait_until_a_sync_waits(&self) {
        let _state = self.1.wait_while(self.0.lock().unwrap(), |state| !state.waiting).unwrap();
    }

    pub(crate) fn fail_reads(&self, on: bool) {
        self.0.lock().unwrap().read_error = on;
    }
}

impl State {
    /// How much of a write of `len` bytes is done, and the error to answer.
    fn outcome(&mut self, len: usize) -> (usize, io::Result<()>) {
        let Some(fault) = &mut self.fault else { return (len, Ok(())) };
        if fault.after > 0 {
            fault.after -= 1;
            return (len, Ok(()));
        }
        let (part, error) = (fault.part.min(len), io::Error::from_raw_os_error(fault.error));
        if !fault.lasting {
            self.fault = None;
        }
        (part, Err(error))
    }
}

impl StorageFile for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().content.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], pos: u64) -> io::Result<usize> {
        let state = self.0.lock().unwrap();
        if state.read_error {
            return Err(io::Error::from_raw_os_error(5));
        }
        let rest = state.content.get(pos as usize..).unwrap_or_default();
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn try_read_at(&self, buf: &mut [u8], pos: u64) -> io::Result<Option<usize>> {
        self.read_at(buf, pos).map(Some)
    }

    fn write_at(&self, buf: &[u8], pos: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        let pos = pos as usize;
        assert_eq!(pos, state.content.len(), "the engine only appends");
        let (done, result) = state.outcome(buf.len());
        state.content.extend_from_slice(&buf[..done]);
        state.events.push(Event::Write { pos, bytes: buf[..done].to_vec() });
        result
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        let (_, result) = state.outcome(0);
        result?;
        state.content.resize(len as usize, 0);
        state.events.push(Event::SetLen(len as usize));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        while state.hold {
            state.waiting = true;
            self.1.notify_all();
            state = self.1.wait(state).unwrap();
        }
        let (_, result) = state.outcome(0);
        result?;
        state.events.push(Event::Sync);
        Ok(())
    }

    fn reserve(&self, _: u64, _: u64) -> io::Result<()> {
        self.0.lock().unwrap().outcome(0).1
    }

    fn try_lock(&self) -> io::Result<bool> {
        Ok(true)
    }

    fn unlock(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Every content that the file may have after a crash when `events[..at]` were done: what was synced, then a beginning of
/// what was written since (files grow in the order of the writes), then perhaps zeros as far as the file had grown.
pub(crate) fn images(events: &[Event], at: usize, mut visit: impl FnMut(Vec<u8>)) {
    let done = &events[..at];
    let synced = done.iter().rposition(|e| matches!(e, Event::Sync)).map_or(0, |i| i + 1);
    let mut base = Vec::new();
    for event in &done[..synced] {
        apply(&mut base, event, usize::MAX);
    }
    visit(base.clone());
    for event in &done[synced..] {
        if let Event::Write { bytes, .. } = event {
            for cut in cuts(bytes.len()) {
                let mut image = base.clone();
                apply(&mut image, event, cut);
                visit(image.clone());
                image.resize(base.len() + bytes.len(), 0);
                visit(image);
            }
        }
        apply(&mut base, event, usize::MAX);
        visit(base.clone());
    }
}

fn apply(content: &mut Vec<u8>, event: &Event, cut: usize) {
    match event {
        Event::Write { pos, bytes } => {
            assert_eq!(*pos, content.len());
            content.extend_from_slice(&bytes[..cut.min(bytes.len())]);
        }
        Event::SetLen(len) => content.resize(*len, 0),
        Event::Sync => {}
    }
}

/// Where a write may be torn: everywhere in the headers at its start and in its end, and at intervals between.
fn cuts(len: usize) -> impl Iterator<Item = usize> {
    (0..=len).filter(move |&cut| cut < 24 || len - cut < 12 || cut % 31 == 0)
}
