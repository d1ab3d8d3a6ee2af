//! The background thread: connects, verifies, reads while no caller does, keeps alive, connects again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::core::{Session, in_callback};
use super::dial::{Backoff, DialError, Registered, dial};
use super::error::ClientError;
use super::options::Access;
use super::stream::Peer;
use super::verify::verify;
use super::{Client, Phase};
use crate::net::Address;
use crate::wire::Notice;

/// While callers read for themselves the thread only looks in every so often, so that not every reply wakes it too:
/// first after this long, ever more seldom while they go on.
const NAP: Duration = Duration::from_millis(1);
const LONG_NAP: Duration = Duration::from_millis(8);
/// Callers that read every so often are busy: one of sixteen processes that commit reads twice in 2 to 4 ms.
const BUSY: Duration = Duration::from_millis(2);
/// Longest sleep while connecting without anything due.
const IDLE: Duration = Duration::from_secs(1);

pub(super) enum Event {
    Dialled {
        round: u64,
        index: usize,
        result: Result<Box<Registered>, DialError>,
    },
    /// Look at the client's state: it is closing, or its addresses have changed.
    Look,
}

pub(super) struct Keeper {
    client: Arc<Client>,
    events: Receiver<Event>,
    sender: Sender<Event>,
    attempts: Vec<Attempt>,
    /// Attempts of earlier rounds are dropped when they end.
    round: u64,
    generation: u64,
}

/// One address.
struct Attempt {
    address: Address,
    backoff: Backoff,
    due: Instant,
    running: bool,
}

impl Keeper {
    pub(super) fn start(
        client: Arc<Client>,
        sender: Sender<Event>,
        events: Receiver<Event>,
    ) -> std::io::Result<()> {
        let name = format!("{} zeo client", client.options.name);
        let keeper = Self { client, events, sender, attempts: Vec::new(), round: 0, generation: 0 };
        std::thread::Builder::new().name(name.chars().take(15).collect()).spawn(move || {
            let callbacks = Arc::clone(&keeper.client.core.callbacks);
            callbacks.enter(Box::new(move || keeper.run()));
        })?;
        Ok(())
    }

    fn run(mut self) {
        let client = self.client.clone();
        // Whatever ends this thread, a bug included, nobody may wait for it any longer.
        let _end = End(&client);
        while !client.is_closing() {
            let Some(registered) = self.find_server() else { continue };
            let mut next = Some(registered);
            while let Some(registered) = next.take() {
                next = match self.take_over(registered) {
                    Ok(connection) => self.serve(&connection),
                    Err(error) => {
                        self.failed(&error);
                        None
                    }
                };
            }
        }
    }

    // ---- connecting

    /// The first address that registers. `None`: the client closes.
    fn find_server(&mut self) -> Option<Box<Registered>> {
        self.reset_attempts();
        let access = self.client.options.access;
        loop {
            if self.client.is_closing() {
                return None;
            }
            if self.client.addresses_changed() {
                self.reset_attempts();
            }
            self.start_due_attempts(access);
            if let Some(registered) = self.next_dialled(self.until_due()) {
                return Some(registered);
            }
        }
    }

    fn reset_attempts(&mut self) {
        self.round += 1;
        let now = Instant::now();
        let mut old = std::mem::take(&mut self.attempts);
        for address in self.client.take_addresses() {
            // An address that failed just now is not tried again at once (a server that accepts and closes).
            let known = old.iter().position(|attempt| attempt.address == address);
            let (backoff, due) = match known {
                Some(index) => {
                    let known = old.swap_remove(index);
                    (known.backoff, known.due.max(now))
                }
                None => (Backoff::default(), now),
            };
            self.attempts.push(Attempt { address, backoff, due, running: false });
        }
    }

    fn start_due_attempts(&mut self, access: Access) {
        let now = Instant::now();
        for (index, attempt) in self.attempts.iter_mut().enumerate() {
            if attempt.running || attempt.due > now {
                continue;
            }
            attempt.running = true;
            let (client, sender, round) = (self.client.clone(), self.sender.clone(), self.round);
            let address = attempt.address.clone();
            let spawned = std::thread::Builder::new().name("zeo dial".into()).spawn(move || {
                let note = |text| client.note_failure(text);
                let result = dial(&address, &client.options, access, &client.closing, &note).map(Box::new);
                let _ = sender.send(Event::Dialled { round, index, result });
                client.wake.wake();
            });
            if let Err(error) = spawned {
                attempt.running = false;
                attempt.due = now + self.client.options.timers.retry_max;
                self.client.note_failure(format!("no thread to connect with: {error}"));
            }
        }
    }

    fn until_due(&self) -> Duration {
        let now = Instant::now();
        let due = self.attempts.iter().filter(|attempt| !attempt.running).map(|attempt| attempt.due).min();
        due.map_or(IDLE, |due| due.saturating_duration_since(now)).min(IDLE)
    }

    fn next_dialled(&mut self, timeout: Duration) -> Option<Box<Registered>> {
        let event = match self.events.recv_timeout(timeout) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        };
        let Event::Dialled { round, index, result } = event else { return None };
        if round != self.round {
            return None;
        }
        let timers = self.client.options.timers;
        let attempt = self.attempts.get_mut(index)?;
        attempt.running = false;
        match result {
            Ok(registered) => Some(registered),
            Err(error) => {
                attempt.due = Instant::now() + attempt.backoff.next(timers.retry_min, timers.retry_max);
                let text = format!("{}: {error}", attempt.address);
                self.client.note_failure(text);
                None
            }
        }
    }

    fn failed(&mut self, error: &DialError) {
        let timers = self.client.options.timers;
        self.client.note_failure(error.to_string());
        for attempt in &mut self.attempts {
            attempt.due = Instant::now() + attempt.backoff.next(timers.retry_min, timers.retry_max);
        }
    }

    // ---- verification

    /// Verifies the cache against the new server and makes the connection the one that callers use.
    fn take_over(&mut self, mut registered: Box<Registered>) -> Result<Arc<Connection>, DialError> {
        let client = self.client.clone();
        let deadline = Instant::now() + client.options.timers.handshake;
        let (tid, oids) = verify(&client, &mut registered, deadline)?;
        client.core.merge_info(std::mem::take(&mut registered.info));
        client.core.jump(tid, &oids);
        for notice in std::mem::take(&mut registered.notices) {
            // What `tid` covers has been verified.
            if !matches!(&notice, Notice::InvalidateTransaction { tid: of, .. } if *of <= tid) {
                client.core.apply_notice(notice);
            }
        }
        self.generation += 1;
        let (host, port) = match registered.stream.peer.clone() {
            Peer::Tcp { host, port } => (host, Some(port)),
            Peer::Unix(path) => (path, None),
        };
        let session = Session {
            host,
            port,
            encoding: registered.encoding,
            read_only: registered.read_only,
            generation: self.generation,
        };
        let connection =
            Arc::new(Connection::new(*registered, self.generation, client.core.clone(), client.wake.clone()));
        client.drop_oids();
        in_callback(|| client.core.callbacks.connected(&session));
        tracing::info!(name = client.options.name, host = session.host, port = ?session.port, read_only = session.read_only, tid = %tid, "connected");
        client.install(&connection, session);
        Ok(connection)
    }

    // ---- connected

    /// Looks after a connection until it ends. `Some`: a better one is there already.
    fn serve(&mut self, connection: &Arc<Connection>) -> Option<Box<Registered>> {
        let client = self.client.clone();
        let timers = client.options.timers;
        let mut alive = Instant::now() + timers.keep_alive;
        let probing = client.options.access == Access::Fallback && client.is_read_only();
        // At once: a writable server may have been slower to answer than the read-only one.
        let mut probe = Instant::now();
        let mut better = None;
        let since = Instant::now();
        // What came with the last message of the verification.
        connection.read_in_background();
        let (mut seen, mut nap) = (0, NAP);
        while !connection.is_dead() && better.is_none() {
            if client.is_closing() {
                connection.fail(ClientError::disconnected("closed"));
                break;
            }
            if probing {
                better = self.probe(&mut probe, timers.probe);
            } else {
                self.drop_late();
            }
            let buffered = connection.has_buffered();
            let (leads, is_led) = connection.leads();
            if !buffered && (is_led || leads != seen) {
                // A long answer keeps one caller reading all the time.
                let busy = is_led && leads == seen || BUSY * (leads - seen) as u32 >= nap;
                nap = if busy { (2 * nap).min(LONG_NAP) } else { (nap / 2).max(NAP) };
                seen = leads;
                client.wake.wait(nap);
            } else {
                if !buffered {
                    nap = NAP;
                }
                let until = alive.min(if probing { probe } else { alive });
                let timeout = until.saturating_duration_since(Instant::now()).min(IDLE);
                match connection
                    .stream
                    .poll(Some(&client.wake), if buffered { Duration::ZERO } else { timeout })
                {
                    // Returns at once if a caller has begun to read meanwhile; then this thread naps.
                    Ok(ready) if ready.socket || buffered => connection.read_in_background(),
                    Ok(_) => {}
                    Err(error) => connection
                        .fail(ClientError::disconnected(format!("the connection was lost: {error}"))),
                }
            }
            if Instant::now() >= alive {
                alive = Instant::now() + timers.keep_alive;
                connection.keep_alive();
            }
        }
        if better.is_some() {
            connection.fail(ClientError::disconnected("a writable server was found"));
        }
        connection.wait_for_reader();
        connection.tell_database();
        self.after_serving(since.elapsed());
        let reason = connection.reason().map_or_else(|| "closed".into(), |reason| reason.to_string());
        if !client.is_closing() {
            tracing::warn!(name = client.options.name, reason, "disconnected");
            client.note_failure(reason);
        }
        client.uninstall();
        in_callback(|| client.core.callbacks.disconnected());
        better
    }

    /// Back at once after a connection that lasted; a server that accepts and closes gets the usual delays.
    fn after_serving(&mut self, lasted: Duration) {
        let timers = self.client.options.timers;
        for attempt in &mut self.attempts {
            attempt.due = Instant::now();
            if lasted > timers.retry_max {
                attempt.backoff.reset();
            } else {
                attempt.due += attempt.backoff.next(timers.retry_min, timers.retry_max);
            }
        }
    }

    /// Closes connections to other addresses that were registered only after one was in use.
    fn drop_late(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            if let Event::Dialled { round, index, .. } = event
                && round == self.round
                && let Some(attempt) = self.attempts.get_mut(index)
            {
                attempt.running = false;
            }
        }
    }

    /// Looks for a writable server while a read-only one is in use; its own address too may have become writable.
    fn probe(&mut self, due: &mut Instant, every: Duration) -> Option<Box<Registered>> {
        while let Ok(event) = self.events.try_recv() {
            if let Event::Dialled { round, index, result } = event
                && round == self.round
                && let Some(attempt) = self.attempts.get_mut(index)
            {
                attempt.running = false;
                if let Ok(registered) = result
                    && !registered.read_only
                {
                    return Some(registered);
                }
            }
        }
        if Instant::now() >= *due || self.client.addresses_changed() {
            *due = Instant::now() + every;
            if self.client.addresses_changed() {
                self.reset_attempts();
            }
            for attempt in &mut self.attempts {
                attempt.due = Instant::now();
            }
            self.start_due_attempts(Access::Writable);
        }
        None
    }
}

/// Says that the thread is gone.
struct End<'a>(&'a Arc<Client>);

impl Drop for End<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(name = self.0.options.name, "internal error in the client's background thread");
            self.0.note_failure("internal error in the client's background thread (a bug)".into());
        }
        self.0.closing.store(true, Ordering::Release);
        let phase = self.0.end();
        if let Phase::Operational(connection, _) = phase {
            connection
                .fail(ClientError::disconnected("internal error in the client's background thread (a bug)"));
        }
    }
}
