//! The handshake: the server announces its protocol, the client answers with the one that both will speak.
//!
//! A protocol string is a letter for the encoding (`Z` pickle, `M` msgpack) and the version, `5`. Each string is the
//! only content of one frame.

use super::{Encoding, WireError};

const VERSION: &[u8] = b"5";

impl Encoding {
    /// The protocol string, as announced by a server or answered by a client.
    pub const fn protocol(self) -> &'static [u8; 2] {
        match self {
            Self::Pickle => b"Z5",
            Self::Msgpack => b"M5",
        }
    }

    fn from_letter(letter: u8) -> Option<Self> {
        match letter {
            b'Z' => Some(Self::Pickle),
            b'M' => Some(Self::Msgpack),
            _ => None,
        }
    }
}

/// A client's first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientHello {
    /// The rest of the connection is in this encoding, whatever the server announced.
    Speak(Encoding),
    /// A monitoring client: answer one frame with the status of all storages as JSON, then close.
    Ruok,
}

impl ClientHello {
    /// Server: understands the client's first frame.
    ///
    /// # Errors
    /// [`WireError::Protocol`] naming what was received; the connection is to be closed.
    pub fn parse(frame: &[u8]) -> Result<Self, WireError> {
        match frame {
            b"ruok" => Ok(Self::Ruok),
            [letter, version @ ..] if version == VERSION => {
                Encoding::from_letter(*letter).map(Self::Speak).ok_or_else(|| WireError::protocol(frame))
            }
            _ => Err(WireError::protocol(frame)),
        }
    }
}

/// Client: chooses the encoding from the server's announcement; the answer is its [`Encoding::protocol`].
///
/// The announced letter is kept and the lesser version (compared as text, as ZEO does) must be ours: `Z6` is answered
/// with `Z5`, `Z4` and `Z10` are refused.
///
/// # Errors
/// [`WireError::Protocol`] naming what was announced.
pub fn choose(announced: &[u8]) -> Result<Encoding, WireError> {
    match announced {
        [letter, version @ ..] if version >= VERSION => {
            Encoding::from_letter(*letter).ok_or_else(|| WireError::protocol(announced))
        }
        _ => Err(WireError::protocol(announced)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_takes_what_the_client_chose() {
        assert_eq!(ClientHello::parse(b"Z5").unwrap(), ClientHello::Speak(Encoding::Pickle));
        assert_eq!(ClientHello::parse(b"M5").unwrap(), ClientHello::Speak(Encoding::Msgpack));
        assert_eq!(ClientHello::parse(b"ruok").unwrap(), ClientHello::Ruok);
        for refused in
            [&b""[..], b"5", b"Z", b"Z4", b"Z6", b"Z5 ", b"X5", b"Z50", b"z5", b"RUOK", b"GET / HTTP/1.1"]
        {
            assert!(matches!(ClientHello::parse(refused), Err(WireError::Protocol { .. })), "{refused:?}");
        }
    }

    #[test]
    fn client_keeps_the_letter_and_takes_the_lesser_version() {
        for (announced, chosen) in [
            (&b"Z5"[..], Encoding::Pickle),
            (b"M5", Encoding::Msgpack),
            (b"Z6", Encoding::Pickle),
            (b"M9", Encoding::Msgpack),
            (b"Z50", Encoding::Pickle),
        ] {
            assert_eq!(choose(announced).unwrap(), chosen, "{announced:?}");
        }
        for refused in [&b""[..], b"5", b"Z", b"Z4", b"Z10", b"Z309", b"Q5"] {
            let error = choose(refused).unwrap_err().to_string();
            assert!(error.contains(&refused.escape_ascii().to_string()), "{error}");
        }
    }
}
