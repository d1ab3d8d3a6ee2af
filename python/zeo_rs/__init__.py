"""ZEO, the client-server storage of ZODB, in Rust for Python."""
