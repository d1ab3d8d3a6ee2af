//! [`LocalOffer`]: the one thing on the wire that ZEO does not have, a key of the answer to `get_info`. What it is for: `net/local.rs`.

use crate::pickle::Value;

const KEY: &str = "zeo_rs_local";

/// What a server tells a client that is on its machine.
#[derive(Debug, PartialEq)]
pub struct LocalOffer {
    /// Of the socket; without the NUL that makes it abstract.
    pub name: String,
    /// The client's address as the server sees it.
    pub client: String,
}

impl LocalOffer {
    pub fn into_pair(self) -> (Value, Value) {
        (KEY.into(), Value::Tuple(vec![self.name.into(), self.client.into()]))
    }

    /// Takes the offer out of an answer to `get_info`. The peer's: anything may be in it.
    pub fn take(info: &mut Vec<(Value, Value)>) -> Option<Self> {
        let at = info.iter().position(|(key, _)| matches!(key, Value::Str(key) if key == KEY))?;
        let (Value::Tuple(pair) | Value::List(pair)) = info.remove(at).1 else { return None };
        match <[Value; 2]>::try_from(pair) {
            Ok([Value::Str(name), Value::Str(client)]) => Some(Self { name, client }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_found_again_and_nonsense_is_none() {
        let offer = || LocalOffer { name: "n".into(), client: "127.0.0.1:1".into() };
        let length = ("length".into(), 1_u64.into());
        let mut info = vec![length.clone(), offer().into_pair()];
        assert_eq!(LocalOffer::take(&mut info), Some(offer()));
        assert_eq!(info, [length], "for nobody else");
        assert_eq!(LocalOffer::take(&mut info), None);
        for nonsense in [Value::None, Value::Tuple(vec![]), Value::Tuple(vec!["n".into(), Value::None])] {
            assert_eq!(LocalOffer::take(&mut vec![(KEY.into(), nonsense)]), None);
        }
    }
}
