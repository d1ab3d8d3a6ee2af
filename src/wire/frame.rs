//! Frames: a 4-byte big-endian length, then as many bytes. Everything on a ZEO connection is frames.

use bytes::{BufMut, Bytes, BytesMut};

use super::WireError;
use crate::limits::{MAX_HANDSHAKE, MAX_PREALLOCATE};

const PREFIX: usize = 4;

/// Cuts frames out of received bytes.
///
/// A length beyond the limit is refused as soon as its 4 bytes are there. The first frame is the peer's handshake, so
/// its limit is [`MAX_HANDSHAKE`], and a TLS hello in its place is recognised.
#[derive(Debug)]
pub struct FrameReader {
    max: usize,
    is_first: bool,
}

impl FrameReader {
    /// Reader of a new connection, with the limit of every frame but the first.
    pub fn new(max: usize) -> Self {
        Self { max, is_first: true }
    }

    /// Splits the next frame's body off the front of `received`; `None` if it is not complete yet.
    ///
    /// Cost: no copy; the body shares `received`'s buffer (as do all slices cut from it later).
    ///
    /// # Errors
    /// [`WireError::TooLarge`], [`WireError::TlsHello`]: the connection cannot go on.
    pub fn next_frame(&mut self, received: &mut BytesMut) -> Result<Option<Bytes>, WireError> {
        let Some(announced) = announced(received) else { return Ok(None) };
        let limit = if self.is_first { MAX_HANDSHAKE.min(self.max) } else { self.max };
        if announced > limit {
            // Content type 22, version 3.1 or 3.3: a TLS record that opens a connection.
            let is_hello = self.is_first && matches!(announced >> 8, 0x16_03_01 | 0x16_03_03);
            return Err(if is_hello {
                WireError::TlsHello
            } else {
                WireError::TooLarge { announced, limit }
            });
        }
        if received.len() < PREFIX + announced {
            return Ok(None);
        }
        self.is_first = false;
        let frame = received.split_to(PREFIX + announced).freeze();
        Ok(Some(frame.slice(PREFIX..)))
    }

    /// How many more bytes to make room for before reading on: what the frame begun in `received` still lacks, but
    /// never more than [`MAX_PREALLOCATE`], as the length is only announced.
    pub fn room_wanted(&self, received: &BytesMut) -> usize {
        let whole = announced(received).map_or(PREFIX, |length| length + PREFIX);
        whole.saturating_sub(received.len()).min(MAX_PREALLOCATE)
    }
}

fn announced(received: &BytesMut) -> Option<usize> {
    let prefix = received.first_chunk::<PREFIX>()?;
    Some(u32::from_be_bytes(*prefix) as usize)
}

/// Appends a frame whose body is at hand.
///
/// # Errors
/// [`WireError::Unencodable`] for a body of 4 GiB or more.
pub fn put_frame(out: &mut BytesMut, body: &[u8]) -> Result<(), WireError> {
    let length = u32::try_from(body.len()).map_err(|_| WireError::frame_too_long())?;
    out.put_u32(length);
    out.put_slice(body);
    Ok(())
}

/// Appends a frame whose body `write` appends; its length is filled in afterwards, nothing is moved. If `write` fails,
/// `out` is as before.
///
/// # Errors
/// Those of `write`, or [`WireError::Unencodable`] for a body of 4 GiB or more.
pub fn put_frame_with(
    out: &mut BytesMut,
    write: impl FnOnce(&mut BytesMut) -> Result<(), WireError>,
) -> Result<(), WireError> {
    let start = out.len();
    out.put_u32(0);
    let written = write(out)
        .and_then(|()| u32::try_from(out.len() - start - PREFIX).map_err(|_| WireError::frame_too_long()));
    match (written, out.get_mut(start..start + PREFIX)) {
        (Ok(length), Some(prefix)) => {
            prefix.copy_from_slice(&length.to_be_bytes());
            Ok(())
        }
        (Err(error), _) => {
            out.truncate(start);
            Err(error)
        }
        (Ok(_), None) => Err(WireError::frame_too_long()),
    }
}
