//! Determinism: equal applied index means equal state, on every member and in every life of it (rules 12 and 13).

use std::collections::BTreeMap;

use metcd::state::StateReader;

#[derive(Default)]
pub struct StateOracle {
    /// Applied index → what the state looks like there, and who saw it first.
    seen: BTreeMap<u64, (u64, Looks)>,
    fault: Option<String>,
    pub compared: u64,
}

/// Everything that is cheap to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Looks {
    revision: u64,
    hash: u128,
    compacted: u64,
    cluster_time_ms: u64,
    logical_bytes: u64,
    idempotency: (usize, Option<u64>),
    feature_level: u32,
    leases: u64,
    members: u64,
    voters: Vec<u64>,
}

impl StateOracle {
    pub fn take_fault(&mut self) -> Option<String> {
        self.fault.take()
    }

    pub fn note(&mut self, node: u64, applied_index: u64, reader: &StateReader) {
        let (revision, hash) = match reader.hash(None) {
            Ok(found) => found,
            Err(error) => return self.fault = Some(format!("n{node} cannot tell its hash: {error}")),
        };
        let conf = reader.applied().conf_state;
        let looks = Looks {
            revision,
            hash,
            compacted: reader.compacted_revision(),
            cluster_time_ms: reader.cluster_time_ms(),
            logical_bytes: reader.logical_bytes(),
            idempotency: (reader.idempotency_len(), reader.oldest_idempotency_stamp()),
            feature_level: reader.feature_level(),
            leases: reader.leases().iter().fold(0, |sum, lease| sum ^ (lease.id << 32 | lease.ttl_ms)),
            members: reader.members().iter().fold(reader.removed().iter().sum(), |sum, member| {
                let parts = [
                    member.id,
                    member.incarnation,
                    member.wanted_role as u64,
                    member.replaces,
                    u64::from(member.feature_level),
                ];
                parts.iter().fold(sum, |sum: u64, part| sum.wrapping_mul(0x0100_0000_01b3) ^ part)
            }),
            voters: conf
                .voters
                .iter()
                .chain(&conf.voters_outgoing)
                .chain(&conf.learners)
                .copied()
                .collect(),
        };
        let (first_node, first) = self.seen.entry(applied_index).or_insert_with(|| (node, looks.clone()));
        if *first_node != node {
            self.compared += 1;
        }
        if *first != looks {
            self.fault = Some(format!(
                "the states of n{node} and n{first_node} differ at applied index {applied_index}:\n  {looks:?}\n  {first:?}"
            ));
        }
    }
}
