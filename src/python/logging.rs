//! Log events of the Rust layers become records of Python's `logging`, under the names `zeo_rs.…`.
//!
//! An event is formatted where it happens and put in a bounded queue; one thread hands the queue to Python. So no log
//! line ever waits for the GIL, and none can deadlock with code that holds it. If Python does not keep up, events are
//! dropped and the next line says how many. An event below the level in force costs one atomic read.
//!
//! The level in force is that of the Python logger `zeo_rs`, read again ([`refresh`]) whenever a storage or server is made
//! and with every line handed over.

use std::fmt::{self, Write as _};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use pyo3::prelude::*;
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

/// Lines waiting for Python; more are dropped.
const QUEUE: usize = 4096;
/// How long [`flush`] waits for the thread.
const FLUSH: Duration = Duration::from_secs(5);

/// Python's numbers of the levels; events below are not even formatted.
static LEVEL: AtomicU8 = AtomicU8::new(20);
static DROPPED: AtomicU64 = AtomicU64::new(0);
/// That of the process which imported the module; made then.
static FIRST: OnceLock<Queue> = OnceLock::new();

/// The queue of one process, which has the thread that empties it. A forked child gets one of its own and takes no lock
/// of its parent's: a thread that the child does not have may hold it.
struct Queue {
    process: u32,
    sender: OnceLock<SyncSender<Line>>,
    /// That of a child: never made in this process.
    next: OnceLock<Box<Self>>,
}

impl Queue {
    fn new(process: u32) -> Self {
        Self { process, sender: OnceLock::new(), next: OnceLock::new() }
    }

    /// This process's.
    fn current() -> &'static Self {
        let process = std::process::id();
        let mut queue = FIRST.get_or_init(|| Self::new(process));
        while queue.process != process {
            queue = queue.next.get_or_init(|| Box::new(Self::new(process)));
        }
        queue
    }

    /// `None` if there is no thread to be had.
    fn sender(&self) -> Option<&SyncSender<Line>> {
        if self.sender.get().is_none() {
            let (tx, rx) = sync_channel(QUEUE);
            std::thread::Builder::new().name("zeo_rs-log".into()).spawn(move || hand_over(&rx)).ok()?;
            // Another thread may have been first: then the end of `tx` ends this one's.
            let _ = self.sender.set(tx);
        }
        self.sender.get()
    }
}

enum Line {
    Event { level: u8, target: &'static str, text: String },
    Flush(SyncSender<()>),
}

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    // Now, so that no fork finds it half made.
    Queue::current();
    // fails if the host process has a subscriber already, which then gets the events
    let _ = tracing::subscriber::set_global_default(ToPython);
    m.add_function(wrap_pyfunction!(flush_logs, m)?)?;
    refresh(m.py());
    m.py().import("atexit")?.call_method1("register", (m.getattr("flush_logs")?,))?;
    Ok(())
}

/// Waits until everything logged so far has reached Python's handlers.
#[pyfunction]
fn flush_logs(py: Python<'_>) {
    py.detach(|| {
        let (done, wait) = sync_channel(1);
        if Queue::current().sender.get().is_some() && send(Line::Flush(done)) {
            let _ = wait.recv_timeout(FLUSH);
        }
    });
}

/// Reads the level of the Python logger `zeo_rs`.
pub(crate) fn refresh(py: Python<'_>) {
    let level = (|| -> PyResult<u8> {
        let logger = py.import("logging")?.call_method1("getLogger", ("zeo_rs",))?;
        Ok(logger.call_method0("getEffectiveLevel")?.extract::<i64>()?.clamp(0, 50) as u8)
    })();
    if let Ok(level) = level
        && LEVEL.swap(level, Ordering::Relaxed) != level
    {
        tracing::callsite::rebuild_interest_cache();
    }
}

fn number(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 40,
        Level::WARN => 30,
        Level::INFO => 20,
        Level::DEBUG => 10,
        Level::TRACE => 5,
    }
}

/// The subscriber. Spans are not kept: a line carries its own fields.
struct ToPython;

impl Subscriber for ToPython {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event()
            && metadata.target().starts_with("zeo_rs")
            && number(metadata.level()) >= LEVEL.load(Ordering::Relaxed)
    }
    fn register_callsite(&self, _: &'static Metadata<'static>) -> tracing::subscriber::Interest {
        tracing::subscriber::Interest::sometimes()
    }
    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let metadata = event.metadata();
        let level = if text.is_critical { 50 } else { number(metadata.level()) };
        send(Line::Event { level, target: metadata.target(), text: text.text });
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// `message key=value key=value`.
#[derive(Default)]
struct Text {
    text: String,
    /// The event has a field `critical`: Python has a level above that of errors.
    is_critical: bool,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let rest = std::mem::take(&mut self.text);
            let _ = write!(self.text, "{value:?}{rest}");
        } else {
            let _ = write!(self.text, " {}={value:?}", field.name());
        }
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        match field.name() {
            "critical" => self.is_critical = value,
            _ => self.record_debug(field, &value),
        }
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

/// False if the queue is full or there is no thread to empty it.
fn send(line: Line) -> bool {
    match Queue::current().sender().map(|tx| tx.try_send(line)) {
        Some(Ok(())) => true,
        Some(Err(TrySendError::Full(_))) => {
            DROPPED.fetch_add(1, Ordering::Relaxed);
            false
        }
        _ => false,
    }
}

/// The thread: attaches to Python for one line at a time, and ends with the interpreter.
fn hand_over(lines: &Receiver<Line>) {
    while let Ok(line) = lines.recv() {
        let handed = match line {
            Line::Event { level, target, text } => Python::try_attach(|py| {
                let dropped = DROPPED.swap(0, Ordering::Relaxed);
                if dropped > 0 {
                    log(
                        py,
                        30,
                        "zeo_rs",
                        &format!("{dropped} log lines were dropped: Python did not keep up"),
                    );
                }
                log(py, level, target, &text);
                refresh(py);
            }),
            Line::Flush(done) => {
                let _ = done.send(());
                Some(())
            }
        };
        if handed.is_none() {
            return;
        }
    }
}

fn log(py: Python<'_>, level: u8, target: &str, text: &str) {
    let logged = (|| -> PyResult<()> {
        let logger = py.import("logging")?.call_method1("getLogger", (target.replace("::", "."),))?;
        logger.call_method1("log", (level, "%s", text))?;
        Ok(())
    })();
    if let Err(error) = logged {
        error.write_unraisable(py, None);
    }
}
