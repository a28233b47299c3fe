//! The name of one start of a member.
//!
//! A start is counted in the data directory before anything is sent. The count alone would name the starts of two copies of one
//! directory alike: a member that came back on an older copy would propose under the sequence numbers of another run, and be told that
//! they are applied. So 16 random bits follow the count.

const SALT_BITS: u32 = 16;

/// The id of start number `count`, from 1; greater than that of every start before it. `None` if there are no numbers left.
pub(super) fn boot_id(count: u64, salt: u16) -> Option<u64> {
    let id = count << SALT_BITS;
    (id >> SALT_BITS == count).then_some(id | u64::from(salt))
}

/// Whether a member that was started as `own` runs on an older copy of its data directory, given that it was once started as `known`:
/// a later start, or another one of the same number. 0 is no start.
pub fn is_outdated(own: u64, known: u64) -> bool {
    let (own_count, known_count) = (own >> SALT_BITS, known >> SALT_BITS);
    known_count > own_count || (known_count == own_count && known != own && known != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_are_ordered_by_their_number_and_told_apart_by_their_salt() {
        let id = |count, salt| boot_id(count, salt).expect("a number");
        assert!(id(1, u16::MAX) < id(2, 0));
        assert_eq!(boot_id(1 << 48, 0), None);
        assert!(!is_outdated(id(3, 7), 0), "nothing is known");
        assert!(!is_outdated(id(3, 7), id(2, 9)), "an earlier start");
        assert!(!is_outdated(id(3, 7), id(3, 7)), "this one");
        assert!(is_outdated(id(3, 7), id(4, 0)), "a later one");
        assert!(is_outdated(id(3, 7), id(3, 6)), "the same number from another copy");
        assert!(is_outdated(id(3, 7), id(3, 8)), "whichever way round");
    }
}
