//! Every bound on what a peer or a file can make grow, with its reason.

/// Largest frame accepted from a peer unless configured otherwise. ZEO has no limit but the 32-bit length; real
/// transactions send one object a frame, so 1 GiB is generous and still stops a TLS hello read as a length.
pub const MAX_FRAME: usize = 1 << 30;
/// A frame that announces more than this is read piece by piece, never allocated up front.
pub const MAX_PREALLOCATE: usize = 1 << 20;
/// Largest first frame of a client: `Z5`, `M5` or `ruok`, with room for the names of other versions.
pub const MAX_HANDSHAKE: usize = 64;
/// Nesting of decoded values. ZEO's own messages nest 4 deep; transaction extensions rarely more than 10.
pub const MAX_DEPTH: usize = 64;
/// Values in one decoded message (a 10 000 oid invalidation has 10 000).
pub const MAX_VALUES: usize = 16 << 20;
/// The same of a client's message, which a server is to understand from peers that it does not know: it becomes some 50 bytes a
/// value. The largest are an extension, which has at most 65535 bytes in Data.fs, and `iterator_gc`.
pub const MAX_REQUEST_VALUES: usize = 128 << 10;
/// ZEO clamps `new_oids(n)` to this.
pub const MAX_NEW_OIDS: usize = 100;
/// User, description and extension of a transaction each have a 16-bit length in Data.fs.
pub const MAX_TXN_METADATA: usize = 65535;
