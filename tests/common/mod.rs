//! What the simulation and the test of real processes hold the product to alike.

pub mod floor;
pub mod history;
pub mod linear;

/// Microseconds since the beginning of a run, by a clock that never goes back.
pub type Micros = u64;
