//! A client of raw frames, and a storage whose steps a test can hold up.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use zeo_rs::ids::{Oid, Tid};
use zeo_rs::net::Address;
use zeo_rs::pickle::Value;
use zeo_rs::server::{Server, ServerConfig, ServerHandle};
use zeo_rs::storage::memory::MemoryStorage;
use zeo_rs::storage::{
    Capabilities, Committed, ConflictResolver, HistoryEntry, InvalidationSink, Loaded, NextRecord,
    PackOptions, Result, StagedTxn, Storage, StorageError, TxnIterator, UndoEntry, VoteOutcome, VotedTxn,
    WholeStorageLock,
};
use zeo_rs::wire::{self, Call, Encoding, Fault, FrameReader, MessageId, Notice, ServerMessage};

/// Of a load: data, tid, and the tid of the next revision.
pub(crate) type Answer = Result<Option<(Bytes, Tid, Option<Tid>)>, Fault>;

/// Nothing in these tests takes this long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn serve(config: ServerConfig, storage: Arc<dyn Storage>) -> ServerHandle {
    serve_all(config, vec![("1".into(), storage)])
}

pub(crate) fn serve_all(mut config: ServerConfig, storages: Vec<(String, Arc<dyn Storage>)>) -> ServerHandle {
    config.addresses = vec![Address::tcp("127.0.0.1", 0)];
    Server::bind(config, storages).unwrap().start().unwrap()
}

pub(crate) fn memory() -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::new("memory"))
}

pub(crate) fn port(server: &ServerHandle) -> u16 {
    match &server.addresses()[0] {
        Address::Tcp { port, .. } => *port,
        Address::Unix(_) => panic!("not TCP"),
    }
}

pub(crate) fn raw(server: &ServerHandle) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port(server))).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Writes; that the server has closed shows when it is read from.
pub(crate) fn say(stream: &mut TcpStream, bytes: &[u8]) {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    match stream.write_all(bytes) {
        Err(error) if !matches!(error.kind(), BrokenPipe | ConnectionReset) => panic!("not sent: {error}"),
        _ => {}
    }
}

/// What the peer sends until it closes.
pub(crate) fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("not closed: {error}"),
    }
    bytes
}

pub(crate) struct Peer {
    pub(crate) stream: TcpStream,
    pub(crate) encoding: Encoding,
    frames: FrameReader,
    received: BytesMut,
    next_id: i64,
    /// What `register` answered.
    pub(crate) registered: Tid,
    /// Notices in order of arrival, so far.
    pub(crate) notices: Vec<Notice>,
}

impl Peer {
    /// Shakes hands, registers for writing.
    pub(crate) fn new(server: &ServerHandle, encoding: Encoding) -> Self {
        let mut peer = Self::unregistered(server, encoding);
        peer.register("1", false).unwrap();
        peer
    }

    pub(crate) fn unregistered(server: &ServerHandle, encoding: Encoding) -> Self {
        let mut peer = Self {
            stream: raw(server),
            encoding,
            frames: FrameReader::new(1 << 30),
            received: BytesMut::new(),
            next_id: 1,
            registered: Tid::ZERO,
            notices: Vec::new(),
        };
        assert_eq!(&peer.frame().unwrap()[..], b"Z5");
        let mut out = BytesMut::new();
        wire::put_frame(&mut out, encoding.protocol()).unwrap();
        say(&mut peer.stream, &out);
        peer
    }

    pub(crate) fn register(&mut self, storage: &str, read_only: bool) -> Result<Tid, Fault> {
        let answer = self.call(Call::Register { storage: storage.into(), read_only })?;
        self.registered = answer.as_tid().unwrap();
        Ok(self.registered)
    }

    /// The next frame, or `None` if the server has closed.
    fn frame(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.frames.next_frame(&mut self.received).unwrap() {
                return Some(frame);
            }
            let mut buffer = [0; 65536];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no frame: {error}"),
            }
        }
    }

    /// The next message that is no notice; notices before it are kept.
    pub(crate) fn message(&mut self) -> Option<ServerMessage> {
        loop {
            match wire::decode_server_message(self.encoding, &self.frame()?).unwrap() {
                ServerMessage::Notice(notice) => self.notices.push(notice),
                message => return Some(message),
            }
        }
    }

    /// Waits for the next notice.
    pub(crate) fn notice(&mut self) -> Notice {
        match wire::decode_server_message(self.encoding, &self.frame().expect("closed")).unwrap() {
            ServerMessage::Notice(notice) => notice,
            message => panic!("no notice: {message:?}"),
        }
    }

    pub(crate) fn send(&mut self, call: &Call, is_async: bool) -> MessageId {
        let id = match call {
            Call::LoadBefore { oid, before } => MessageId::Load { oid: *oid, before: *before },
            _ if is_async => MessageId::Seq(0),
            _ => {
                self.next_id += 1;
                MessageId::Seq(self.next_id)
            }
        };
        let mut out = BytesMut::new();
        wire::encode_call(self.encoding, &id, is_async, call, &mut out).unwrap();
        say(&mut self.stream, &out);
        id
    }

    /// The bytes of so many calls without an answer.
    pub(crate) fn casts(&self, call: &Call, count: usize) -> Vec<u8> {
        let mut out = BytesMut::new();
        wire::encode_call(self.encoding, &MessageId::Seq(0), true, call, &mut out).unwrap();
        out.repeat(count)
    }

    /// False if the server has closed the connection.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// A call without an answer.
    pub(crate) fn cast(&mut self, call: Call) {
        self.send(&call, true);
    }

    pub(crate) fn call(&mut self, call: Call) -> Result<Value, Fault> {
        let id = self.send(&call, false);
        self.answer(&id)
    }

    /// The answer to the call `id`, which must be the next.
    pub(crate) fn answer(&mut self, id: &MessageId) -> Result<Value, Fault> {
        match self.message().expect("closed") {
            ServerMessage::Reply { id: answered, value } if answered == *id => Ok(value),
            ServerMessage::Fault { id: answered, fault } if answered == *id => Err(fault),
            other => panic!("no answer to {id:?}: {other:?}"),
        }
    }

    pub(crate) fn load(&mut self, oid: u64, before: Tid) -> Answer {
        self.send(&Call::LoadBefore { oid: Oid(oid), before }, false);
        self.loaded()
    }

    pub(crate) fn loaded(&mut self) -> Answer {
        match self.message().expect("closed") {
            ServerMessage::Loaded { loaded, .. } => Ok(loaded),
            ServerMessage::Fault { fault, .. } => Err(fault),
            other => panic!("no load: {other:?}"),
        }
    }

    pub(crate) fn begin(&mut self, key: i64) {
        self.cast(Call::TpcBegin {
            txn: Value::Int(key),
            user: Bytes::from_static(b"user"),
            description: Bytes::from_static(b"description"),
            extension: Value::Dict(Vec::new()),
            tid: None,
            status: b' ',
        });
    }

    pub(crate) fn store(&mut self, key: i64, oid: u64, serial: Tid, data: &[u8]) {
        let data = Bytes::copy_from_slice(data);
        self.cast(Call::Storea { oid: Oid(oid), serial, data, txn: Value::Int(key) });
    }

    pub(crate) fn vote(&mut self, key: i64) -> Result<Value, Fault> {
        self.call(Call::Vote { txn: Value::Int(key) })
    }

    pub(crate) fn finish(&mut self, key: i64) -> Result<Tid, Fault> {
        self.call(Call::TpcFinish { txn: Value::Int(key) }).map(|tid| tid.as_tid().unwrap())
    }

    pub(crate) fn abort(&mut self, key: i64) {
        self.call(Call::TpcAbort { txn: Value::Int(key) }).unwrap();
    }

    /// A whole transaction with one object.
    pub(crate) fn commit(&mut self, oid: u64, serial: Tid, data: &[u8]) -> Result<Tid, Fault> {
        self.begin(1);
        self.store(1, oid, serial, data);
        self.vote(1)?;
        self.finish(1)
    }

    pub(crate) fn ping(&mut self) {
        assert_eq!(self.call(Call::Ping).unwrap(), Value::None);
    }

    /// A round trip, while the answer to the call `other` must not come yet.
    pub(crate) fn ping_before(&mut self, other: &MessageId) {
        let id = self.send(&Call::Ping, false);
        match self.message().expect("closed") {
            ServerMessage::Reply { id: answered, .. } if answered == id => {}
            message => panic!("{other:?} was answered: {message:?}"),
        }
    }

    /// The invalidations received so far.
    pub(crate) fn invalidations(&self) -> Vec<(Tid, Vec<Oid>)> {
        let invalidation = |notice: &Notice| match notice {
            Notice::InvalidateTransaction { tid, oids } => Some((*tid, oids.clone())),
            _ => None,
        };
        self.notices.iter().filter_map(invalidation).collect()
    }

    /// As [`Self::load`] of what is current; `None`: the server has closed.
    pub(crate) fn try_load(&mut self, oid: u64) -> Option<Answer> {
        self.try_send(&[Call::LoadBefore { oid: Oid(oid), before: Tid::MAX }])?;
        Some(match self.message()? {
            ServerMessage::Loaded { loaded, .. } => Ok(loaded),
            ServerMessage::Fault { fault, .. } => Err(fault),
            other => panic!("no load: {other:?}"),
        })
    }

    /// A whole transaction of `(oid, serial, data)`; `None`: the server has closed, whatever became of it.
    pub(crate) fn try_commit(
        &mut self,
        key: i64,
        stores: &[(u64, Tid, &[u8])],
    ) -> Option<Result<Tid, Fault>> {
        let txn = Value::Int(key);
        let mut calls = vec![Call::TpcBegin {
            txn: txn.clone(),
            user: Bytes::new(),
            description: Bytes::new(),
            extension: Value::Dict(Vec::new()),
            tid: None,
            status: b' ',
        }];
        calls.extend(stores.iter().map(|(oid, serial, data)| Call::Storea {
            oid: Oid(*oid),
            serial: *serial,
            data: Bytes::copy_from_slice(data),
            txn: txn.clone(),
        }));
        calls.push(Call::Vote { txn: txn.clone() });
        self.try_send(&calls)?;
        match self.message()? {
            ServerMessage::Fault { fault, .. } => return Some(Err(fault)),
            ServerMessage::Reply { .. } => {}
            other => panic!("no vote: {other:?}"),
        }
        self.try_send(&[Call::TpcFinish { txn }])?;
        match self.message()? {
            ServerMessage::Reply { value, .. } => Some(Ok(value.as_tid().unwrap())),
            ServerMessage::Fault { fault, .. } => Some(Err(fault)),
            other => panic!("no finish: {other:?}"),
        }
    }

    /// Sends calls of which the last is answered.
    fn try_send(&mut self, calls: &[Call]) -> Option<()> {
        let mut out = BytesMut::new();
        for (at, call) in calls.iter().enumerate() {
            let is_async = at + 1 < calls.len();
            let id = match call {
                Call::LoadBefore { oid, before } => MessageId::Load { oid: *oid, before: *before },
                _ => MessageId::Seq(if is_async { 0 } else { 1 }),
            };
            wire::encode_call(self.encoding, &id, is_async, call, &mut out).unwrap();
        }
        self.stream.write_all(&out).ok()
    }

    /// The server must close; what it said before is dropped.
    pub(crate) fn expect_closed(&mut self) {
        while self.frame().is_some() {}
    }
}

/// Lets a step pass, or holds it up until the test opens it.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<(bool, usize)>,
    changed: Condvar,
}

impl Gate {
    pub(crate) fn shut(&self) {
        self.state.lock().unwrap().0 = true;
    }

    pub(crate) fn open(&self) {
        self.state.lock().unwrap().0 = false;
        self.changed.notify_all();
    }

    pub(crate) fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        self.changed.notify_all();
        drop(self.changed.wait_timeout_while(state, PATIENCE, |state| state.0).unwrap());
    }

    /// Waits until somebody has come to the gate for the `count`th time.
    pub(crate) fn wait_for(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let (_state, waited) =
            self.changed.wait_timeout_while(state, PATIENCE, |state| state.1 < count).unwrap();
        assert!(!waited.timed_out(), "nobody came");
    }
}

/// A memory storage whose loads always have to wait for the disk, with gates.
pub(crate) struct Gated {
    pub(crate) inner: MemoryStorage,
    /// Passed by a load after it has read.
    pub(crate) loads: Gate,
    pub(crate) votes: Gate,
    pub(crate) finishes: Gate,
    /// Passed when a transaction is in the storage and not yet published.
    pub(crate) publishes: Gate,
    pub(crate) histories: Gate,
    /// Passed before the file of an upload is made.
    pub(crate) uploads: Gate,
    pub(crate) fails: Mutex<Option<StorageError>>,
    pub(crate) quick_loads: bool,
    /// It is never called from the event loop, as one in Python.
    pub(crate) slow_calls: bool,
    pub(crate) below: Mutex<Option<Arc<dyn InvalidationSink>>>,
}

impl Gated {
    pub(crate) fn new(quick_loads: bool) -> Arc<Self> {
        Self::over(MemoryStorage::new("gated"), quick_loads)
    }

    pub(crate) fn over(inner: MemoryStorage, quick_loads: bool) -> Arc<Self> {
        Arc::new(Self::plain(inner, quick_loads))
    }

    /// As a storage in Python.
    pub(crate) fn slow() -> Arc<Self> {
        Arc::new(Self { slow_calls: true, ..Self::plain(MemoryStorage::new("slow"), false) })
    }

    fn plain(inner: MemoryStorage, quick_loads: bool) -> Self {
        Self {
            inner,
            loads: Gate::default(),
            votes: Gate::default(),
            finishes: Gate::default(),
            publishes: Gate::default(),
            histories: Gate::default(),
            uploads: Gate::default(),
            fails: Mutex::default(),
            quick_loads,
            slow_calls: false,
            below: Mutex::default(),
        }
    }
}

impl Storage for Gated {
    fn name(&self) -> String {
        self.inner.name()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { slow_calls: self.slow_calls, ..self.inner.capabilities() }
    }
    fn object_count(&self) -> u64 {
        self.inner.object_count()
    }
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn last_tid(&self) -> Tid {
        self.inner.last_tid()
    }
    fn load_before(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>> {
        let loaded = self.inner.load_before(oid, before);
        self.loads.pass();
        loaded
    }
    fn try_load_before(&self, oid: Oid, before: Tid) -> Result<Option<Loaded>> {
        if self.quick_loads { self.inner.load_before(oid, before) } else { Err(StorageError::WouldBlock) }
    }
    fn load_serial(&self, oid: Oid, serial: Tid) -> Result<Bytes> {
        self.inner.load_serial(oid, serial)
    }
    fn current_tid(&self, oid: Oid) -> Result<Tid> {
        self.inner.current_tid(oid)
    }
    fn history(&self, oid: Oid, size: usize) -> Result<Vec<HistoryEntry>> {
        let entries = self.inner.history(oid, size);
        self.histories.pass();
        entries
    }
    fn record_iternext(&self, next: Option<Oid>) -> Result<Option<NextRecord>> {
        self.inner.record_iternext(next)
    }
    fn iterate(&self, start: Option<Tid>, stop: Option<Tid>) -> Result<Box<dyn TxnIterator>> {
        self.inner.iterate(start, stop)
    }
    fn last_invalidations(&self, count: usize) -> Result<Vec<(Tid, Vec<Oid>)>> {
        self.inner.last_invalidations(count)
    }
    fn undo_log(
        &self,
        first: usize,
        last: usize,
        accept: &mut dyn FnMut(&UndoEntry) -> bool,
    ) -> Result<Vec<UndoEntry>> {
        self.inner.undo_log(first, last, accept)
    }
    fn new_oids(&self, count: usize) -> Result<Vec<Oid>> {
        self.inner.new_oids(count)
    }
    fn vote(&self, txn: StagedTxn, resolver: &dyn ConflictResolver) -> Result<VoteOutcome> {
        self.votes.pass();
        self.inner.vote(txn, resolver)
    }
    fn finish(&self, group: Vec<VotedTxn>, publish: &mut dyn FnMut(&Committed)) -> Result<()> {
        self.finishes.pass();
        match self.fails.lock().unwrap().take() {
            Some(error) => Err(error),
            None => self.inner.finish(group, &mut |committed| {
                self.publishes.pass();
                publish(committed);
            }),
        }
    }
    fn abort(&self, txn: VotedTxn) {
        self.inner.abort(txn);
    }
    fn pack(&self, options: PackOptions<'_>, switch_lock: &dyn WholeStorageLock) -> Result<()> {
        self.inner.pack(options, switch_lock)
    }
    fn blob_path(&self, oid: Oid, serial: Tid) -> Result<PathBuf> {
        self.inner.blob_path(oid, serial)
    }
    fn temporary_directory(&self) -> Result<PathBuf> {
        self.uploads.pass();
        self.inner.temporary_directory()
    }
    fn blob_oid_directory(&self, oid: Oid) -> Result<PathBuf> {
        self.inner.blob_oid_directory(oid)
    }
    fn subscribe(&self, sink: Arc<dyn InvalidationSink>) {
        *self.below.lock().unwrap() = Some(sink);
    }
    fn checkpoint(&self) -> Result<()> {
        Ok(())
    }
    fn close(&self) -> Result<()> {
        self.inner.close()
    }
}
