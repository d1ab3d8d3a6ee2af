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
use pyo3::types::PyDict;
use tracing::field::Visit;
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
    Event { level: u8, target: &'static str, text: Text },
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
        send(Line::Event { level, target: metadata.target(), text });
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// `message key=value key=value`, and each of them for logs that have keys of their own.
#[derive(Default)]
struct Text {
    message: String,
    fields: Vec<(&'static str, Field)>,
    /// The event has a field `critical`: Python has a level above that of errors.
    is_critical: bool,
}

enum Field {
    Text(String),
    Int(i64),
    Uint(u64),
    Float(f64),
    Bool(bool),
}

impl Text {
    /// One line, whatever clients and files have put into it.
    fn line(&self) -> String {
        let mut line = String::new();
        push_printable(&mut line, &self.message);
        for (name, value) in &self.fields {
            let _ = write!(line, " {name}=");
            match value {
                Field::Text(text) => push_printable(&mut line, text),
                Field::Int(number) => drop(write!(line, "{number}")),
                Field::Uint(number) => drop(write!(line, "{number}")),
                Field::Float(number) => drop(write!(line, "{number:?}")),
                Field::Bool(flag) => drop(write!(line, "{flag}")),
            }
        }
        line
    }

    /// What `logging` takes as `extra`; `zeo_rs.logformat` knows it.
    fn extra<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let fields = PyDict::new(py);
        for (name, value) in &self.fields {
            match value {
                Field::Text(text) => fields.set_item(name, text)?,
                Field::Int(number) => fields.set_item(name, number)?,
                Field::Uint(number) => fields.set_item(name, number)?,
                Field::Float(number) => fields.set_item(name, number)?,
                Field::Bool(flag) => fields.set_item(name, flag)?,
            }
        }
        let extra = PyDict::new(py);
        extra.set_item("zeo_rs_message", &self.message)?;
        extra.set_item("zeo_rs_fields", fields)?;
        Ok(extra)
    }
}

/// A line stays one, and a terminal what it is.
fn push_printable(line: &mut String, text: &str) {
    for character in text.chars() {
        if character.is_control() || matches!(character, '\u{2028}' | '\u{2029}') {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
}

impl Visit for Text {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            self.fields.push((field.name(), Field::Text(text)));
        }
    }
    fn record_bool(&mut self, field: &tracing::field::Field, value: bool) {
        match field.name() {
            "critical" => self.is_critical = value,
            name => self.fields.push((name, Field::Bool(value))),
        }
    }
    fn record_i64(&mut self, field: &tracing::field::Field, value: i64) {
        self.fields.push((field.name(), Field::Int(value)));
    }
    fn record_u64(&mut self, field: &tracing::field::Field, value: u64) {
        // How many lines like this one were left out is of interest when there are some.
        if field.name() != "not_logged" || value > 0 {
            self.fields.push((field.name(), Field::Uint(value)));
        }
    }
    fn record_f64(&mut self, field: &tracing::field::Field, value: f64) {
        self.fields.push((field.name(), Field::Float(value)));
    }
    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
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
                    let message = format!("{dropped} log lines were dropped: Python did not keep up");
                    log(py, 30, "zeo_rs", &Text { message, ..Text::default() });
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

fn log(py: Python<'_>, level: u8, target: &str, text: &Text) {
    let logged = (|| -> PyResult<()> {
        let logger = py.import("logging")?.call_method1("getLogger", (target.replace("::", "."),))?;
        let keywords = PyDict::new(py);
        keywords.set_item("extra", text.extra(py)?)?;
        logger.call_method("log", (level, "%s", text.line()), Some(&keywords))?;
        Ok(())
    })();
    if let Err(error) = logged {
        error.write_unraisable(py, None);
    }
}
