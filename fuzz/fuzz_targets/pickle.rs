//! Any bytes as a pickle: decoded or refused; what was decoded survives being written and read again, with and without
//! memo.

#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use zeo_rs::pickle::{self, Globals};

fuzz_target!(|bytes: &[u8]| {
    let src = Bytes::copy_from_slice(bytes);
    for globals in [Globals::Request, Globals::Any, Globals::Stored] {
        let Ok((value, used)) = pickle::decode_first(&src, globals) else { continue };
        assert!(used <= bytes.len());
        let mut plain = BytesMut::new();
        if pickle::encode(&value, &mut plain).is_err() {
            continue;
        }
        let again = pickle::decode(&plain.clone().freeze(), Globals::Any).expect("what we write we read");
        let mut twice = BytesMut::new();
        pickle::encode(&again, &mut twice).expect("writable once, writable twice");
        assert_eq!(plain, twice);
        let mut memo = BytesMut::new();
        pickle::encode_with_memo(&value, &mut memo).expect("writable with memo");
        let again = pickle::decode(&memo.freeze(), Globals::Any).expect("what we write we read");
        // Text, because NaN is not equal to itself.
        assert_eq!(format!("{again:?}"), format!("{value:?}"));
    }
});
