//! What separates a page from the one before it: short, and compared without leaving the node of the map that holds it.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;

/// Bytes that need no allocation of their own: the usual keys of up to some thirty bytes.
const INLINE: usize = 38;

/// Ordered as its bytes are.
#[derive(Clone)]
pub(super) enum Separator {
    /// So many bytes of the array.
    Short(u8, [u8; INLINE]),
    Long(Box<[u8]>),
}

impl Separator {
    pub(super) fn new(bytes: &[u8]) -> Separator {
        let mut inline = [0; INLINE];
        match inline.get_mut(..bytes.len()) {
            Some(room) => {
                room.copy_from_slice(bytes);
                Separator::Short(bytes.len() as u8, inline)
            }
            None => Separator::Long(bytes.into()),
        }
    }

    /// The shortest one above `low` and not above `high`, for `low` < `high`.
    pub(super) fn between(low: &[u8], high: &[u8]) -> Separator {
        let common = low.iter().zip(high).take_while(|(low, high)| low == high).count();
        Separator::new(high.get(..=common).unwrap_or(high))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Separator::Short(len, inline) => inline.get(..usize::from(*len)).unwrap_or(inline),
            Separator::Long(bytes) => bytes,
        }
    }

    /// Heap held besides itself.
    pub(super) fn heap(&self) -> usize {
        match self {
            Separator::Short(..) => 0,
            Separator::Long(bytes) => bytes.len(),
        }
    }
}

impl Default for Separator {
    fn default() -> Separator {
        Separator::new(&[])
    }
}

impl Borrow<[u8]> for Separator {
    fn borrow(&self) -> &[u8] {
        self.bytes()
    }
}

impl PartialEq for Separator {
    fn eq(&self, other: &Separator) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Separator {}

impl PartialOrd for Separator {
    fn partial_cmp(&self, other: &Separator) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Separator {
    fn cmp(&self, other: &Separator) -> Ordering {
        self.bytes().cmp(other.bytes())
    }
}

impl fmt::Debug for Separator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Separator").field(&self.bytes()).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(prop_oneof![Just(0u8), Just(1u8), any::<u8>()], 0..60)
    }

    proptest! {
        #[test]
        fn it_is_ordered_as_its_bytes(a in bytes(), b in bytes()) {
            let (first, second) = (Separator::new(&a), Separator::new(&b));
            prop_assert_eq!(first.cmp(&second), a.cmp(&b));
            prop_assert_eq!(first.bytes(), &a[..]);
        }

        #[test]
        fn between_two_keys_it_is_above_the_lower_and_not_above_the_higher(a in bytes(), b in bytes(), common in bytes()) {
            prop_assume!(a != b);
            let (low, high) = if a < b { (a, b) } else { (b, a) };
            let (low, high) = ([&common[..], &low].concat(), [&common[..], &high].concat());
            let separator = Separator::between(&low, &high);
            prop_assert!(separator.bytes() > &low[..] && separator.bytes() <= &high[..]);
        }
    }
}
