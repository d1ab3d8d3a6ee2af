//! [`LocalOffer`] and [`ShelfOffer`]: what is on the wire that ZEO does not have, keys of the answer to `get_info`. What they are for:
//! `net/local.rs`, `shelf/mod.rs`.

use crate::pickle::Value;

const KEY: &str = "zeo_rs_local";
const SHELF_KEY: &str = "zeo_rs_shelf";

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
        match take_pair(info, KEY)? {
            [Value::Str(name), Value::Str(client)] => Some(Self { name, client }),
            _ => None,
        }
    }
}

/// What a server tells a client to whom it has handed its shelf, with the bytes of this answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ShelfOffer {
    pub format: u64,
    /// Bytes.
    pub capacity: u64,
}

impl ShelfOffer {
    pub fn into_pair(self) -> (Value, Value) {
        (SHELF_KEY.into(), Value::Tuple(vec![self.format.into(), self.capacity.into()]))
    }

    /// As [`LocalOffer::take`].
    pub fn take(info: &mut Vec<(Value, Value)>) -> Option<Self> {
        match take_pair(info, SHELF_KEY)? {
            [Value::Int(format), Value::Int(capacity)] => {
                Some(Self { format: format.try_into().ok()?, capacity: capacity.try_into().ok()? })
            }
            _ => None,
        }
    }
}

fn take_pair(info: &mut Vec<(Value, Value)>, key: &str) -> Option<[Value; 2]> {
    let at = info.iter().position(|(known, _)| matches!(known, Value::Str(known) if known == key))?;
    let (Value::Tuple(pair) | Value::List(pair)) = info.remove(at).1 else { return None };
    pair.try_into().ok()
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
        assert_eq!(info, std::slice::from_ref(&length), "for nobody else");
        assert_eq!(LocalOffer::take(&mut info), None);
        for nonsense in [Value::None, Value::Tuple(vec![]), Value::Tuple(vec!["n".into(), Value::None])] {
            assert_eq!(LocalOffer::take(&mut vec![(KEY.into(), nonsense.clone())]), None);
            assert_eq!(ShelfOffer::take(&mut vec![(SHELF_KEY.into(), nonsense)]), None);
        }
        let offer = ShelfOffer { format: 1, capacity: 1 << 20 };
        let mut info = vec![length.clone(), offer.into_pair()];
        assert_eq!(ShelfOffer::take(&mut info), Some(offer));
        assert_eq!(info, [length]);
        let negative = Value::Tuple(vec![Value::Int(1), Value::Int(-1)]);
        assert_eq!(ShelfOffer::take(&mut vec![(SHELF_KEY.into(), negative)]), None);
    }
}
