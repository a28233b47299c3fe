//! Reading a whole small table, at open.

use std::ops::{Bound, ControlFlow};

use super::StateError;
use crate::store::{KvStore, Order, Table};

/// Takes a record into memory; `None`: it cannot be decoded.
type Take<'a> = dyn FnMut(&[u8], &[u8]) -> Option<()> + 'a;

/// Calls `take` with every record of the table; `None` from it means that the record cannot be decoded.
pub(super) fn read_all(store: &dyn KvStore, table: Table, take: &mut Take<'_>) -> Result<(), StateError> {
    let mut is_damaged = false;
    store.scan(
        table,
        (Bound::Unbounded, Bound::Unbounded),
        Order::Asc,
        &mut |key, record| match take(key, record) {
            Some(()) => ControlFlow::Continue(()),
            None => {
                is_damaged = true;
                ControlFlow::Break(())
            }
        },
    )?;
    if is_damaged {
        Err(StateError::Corrupt(format!("a record of table {table:?} cannot be decoded")))
    } else {
        Ok(())
    }
}
