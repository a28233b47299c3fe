//! The protocol as a value: PURE `step(input) -> effects` over raft-rs.
