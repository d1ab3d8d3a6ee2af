//! Received bytes, cut into messages.

use std::io;

use bytes::BytesMut;

use super::stream::Stream;
use crate::limits::MAX_FRAME;
use crate::net::tls::looks_like_tls;
use crate::wire::{self, Encoding, FrameReader, ServerMessage, WireError};

/// One `recv` takes at most this much: a few hundred small answers, or a part of a large one.
pub(super) const CHUNK: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct Inbox {
    received: BytesMut,
    frames: FrameReader,
    chunk: Box<[u8]>,
    /// Taken out, but to be applied by another thread.
    parked: Option<ServerMessage>,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            received: BytesMut::new(),
            frames: FrameReader::new(MAX_FRAME),
            chunk: vec![0; CHUNK].into_boxed_slice(),
            parked: None,
        }
    }
}

impl Inbox {
    /// Reads once: how much, at most [`CHUNK`]; 0 if the peer closed. Costs one system call and one copy.
    pub(super) fn fill(&mut self, stream: &Stream, now: bool) -> io::Result<usize> {
        let count = stream.read(&mut self.chunk, now)?;
        self.received.extend_from_slice(self.chunk.get(..count).unwrap_or_default());
        Ok(count)
    }

    /// What has been received begins as TLS does.
    pub(super) fn is_tls(&self) -> bool {
        looks_like_tls(&self.received)
    }

    /// The first frame, before there is an encoding.
    pub(super) fn next_frame(&mut self) -> Result<Option<bytes::Bytes>, WireError> {
        self.frames.next_frame(&mut self.received)
    }

    pub(super) fn next(&mut self, encoding: Encoding) -> Result<Option<ServerMessage>, WireError> {
        if let Some(message) = self.parked.take() {
            return Ok(Some(message));
        }
        match self.frames.next_frame(&mut self.received)? {
            Some(frame) => wire::decode_server_message(encoding, &frame).map(Some),
            None => Ok(None),
        }
    }

    pub(super) fn put_back(&mut self, message: ServerMessage) {
        self.parked = Some(message);
    }
}
