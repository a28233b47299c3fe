//! Linearizability by search (Wing and Gong, with Lowe's memory of what was tried), key by key: single-key operations of a linearizable
//! store are linearizable exactly if those of each key are (Herlihy and Wing, locality). No revision is believed here.

use std::collections::{BTreeMap, HashSet};

use crate::plan::Micros;

/// A written value, unique; `None` is absence.
pub type Value = Option<u64>;

/// What must hold for a write to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    Anything,
    Present,
    Absent,
    /// The value that was seen.
    Is(u64),
}

impl Expect {
    fn holds(self, value: Value) -> bool {
        match self {
            Expect::Anything => true,
            Expect::Present => value.is_some(),
            Expect::Absent => value.is_none(),
            Expect::Is(wanted) => value == Some(wanted),
        }
    }
}

/// One operation on one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Read(Value),
    /// `happened` is `None` if nobody knows; `existed` is what the answer said of the key before.
    Write {
        expect: Expect,
        to: Value,
        happened: Option<bool>,
        existed: Option<bool>,
    },
}

#[derive(Debug, Clone, Copy)]
struct Op {
    begin: Micros,
    /// `Micros::MAX`: it may happen at any later time.
    end: Micros,
    action: Action,
}

/// All operations, by key.
#[derive(Default)]
pub struct Linear {
    keys: BTreeMap<String, Vec<Op>>,
}

/// States looked at for one key before the search is given up.
const MAX_STEPS: usize = 3_000_000;

/// How far the searches came.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// Operations of the keys for which an order was found.
    pub operations: u64,
    /// Keys whose search was given up: nothing is known of their operations.
    pub given_up: u64,
}

/// What a search came to.
#[derive(Debug)]
enum Found {
    Order,
    /// None: the longest one stops before one of these.
    Stuck(Vec<Op>),
    GaveUp,
}

impl Linear {
    pub fn note(&mut self, key: &str, begin: Micros, end: Micros, action: Action) {
        self.keys.entry(key.to_owned()).or_default().push(Op { begin, end, action });
    }

    pub fn check(&self) -> Result<Checked, String> {
        self.check_within(MAX_STEPS)
    }

    fn check_within(&self, max_steps: usize) -> Result<Checked, String> {
        let mut checked = Checked::default();
        for (key, ops) in &self.keys {
            match search(ops, max_steps) {
                Found::Order => checked.operations += ops.len() as u64,
                Found::GaveUp => checked.given_up += 1,
                Found::Stuck(stuck) => return Err(not_linearizable(key, &stuck)),
            }
        }
        Ok(checked)
    }
}

fn not_linearizable(key: &str, stuck: &[Op]) -> String {
    let mut text = format!("{key} is not linearizable; the longest order found stops before one of:");
    for op in stuck {
        let end = if op.end == Micros::MAX {
            "?".to_owned()
        } else {
            format!("{:.6}", op.end as f64 / 1e6)
        };
        text.push_str(&format!("\n  {:>12.6}..{end:<12} {:?}", op.begin as f64 / 1e6, op.action));
    }
    text
}

/// The value after an operation, if it can happen there.
fn apply(action: Action, value: Value) -> Option<Value> {
    match action {
        Action::Read(seen) => (seen == value).then_some(value),
        Action::Write {
            expect,
            to,
            happened,
            existed,
        } => match happened {
            Some(true) => (expect.holds(value) && existed.is_none_or(|existed| existed == value.is_some())).then_some(to),
            Some(false) => (!expect.holds(value)).then_some(value),
            None => Some(if expect.holds(value) { to } else { value }),
        },
    }
}

/// Depth first: any operation that begins before all open ones end may be next.
fn search(ops: &[Op], max_steps: usize) -> Found {
    let mut ops = ops.to_vec();
    ops.sort_by_key(|op| (op.begin, op.end));
    let wanted = ops.iter().filter(|op| op.end != Micros::MAX).count();
    let mut tried: HashSet<(Vec<u64>, Value)> = HashSet::new();
    let mut done = vec![0u64; ops.len() / 64 + 1];
    let mut stack: Vec<(usize, Value)> = Vec::new();
    let (mut value, mut placed, mut best) = (None, 0, 0);
    let mut stuck = Vec::new();
    let mut next = 0;
    loop {
        if placed == wanted {
            return Found::Order;
        }
        let limit = first_end(&ops, &done);
        let candidate = (next..ops.len()).take_while(|&i| ops[i].begin <= limit).find_map(|i| {
            if done[i / 64] >> (i % 64) & 1 == 1 {
                return None;
            }
            let after = apply(ops[i].action, value)?;
            // A write of nobody knows that changes nothing need not be placed.
            if ops[i].end == Micros::MAX && after == value {
                return None;
            }
            let mut with = done.clone();
            with[i / 64] |= 1 << (i % 64);
            tried.insert((with, after)).then_some((i, after))
        });
        match candidate {
            Some((i, after)) => {
                stack.push((i, value));
                done[i / 64] |= 1 << (i % 64);
                placed += usize::from(ops[i].end != Micros::MAX);
                value = after;
                next = 0;
                if tried.len() > max_steps {
                    return Found::GaveUp;
                }
            }
            None => {
                if placed >= best {
                    best = placed;
                    stuck = open_at(&ops, &done, limit);
                }
                let Some((i, before)) = stack.pop() else {
                    return Found::Stuck(stuck);
                };
                done[i / 64] &= !(1 << (i % 64));
                placed -= usize::from(ops[i].end != Micros::MAX);
                value = before;
                next = i + 1;
            }
        }
    }
}

fn first_end(ops: &[Op], done: &[u64]) -> Micros {
    let open = ops.iter().enumerate().filter(|(i, _)| done[i / 64] >> (i % 64) & 1 == 0);
    open.map(|(_, op)| op.end).min().unwrap_or(Micros::MAX)
}

fn open_at(ops: &[Op], done: &[u64], limit: Micros) -> Vec<Op> {
    let open = ops.iter().enumerate().filter(|(i, _)| done[i / 64] >> (i % 64) & 1 == 0);
    open.map(|(_, op)| *op).filter(|op| op.begin <= limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(to: u64) -> Action {
        Action::Write {
            expect: Expect::Anything,
            to: Some(to),
            happened: Some(true),
            existed: None,
        }
    }

    fn check(ops: &[(Micros, Micros, Action)]) -> bool {
        let mut linear = Linear::default();
        for &(begin, end, action) in ops {
            linear.note("k", begin, end, action);
        }
        linear.check().is_ok()
    }

    #[test]
    fn a_read_may_not_go_back_in_time() {
        assert!(check(&[(0, 1, put(1)), (2, 3, put(2)), (4, 5, Action::Read(Some(2)))]));
        assert!(!check(&[(0, 1, put(1)), (2, 3, put(2)), (4, 5, Action::Read(Some(1)))]));
    }

    #[test]
    fn concurrent_operations_may_be_ordered_either_way_but_all_agree() {
        let both = [(0, 10, put(1)), (0, 10, put(2))];
        assert!(check(&[both[0], both[1], (11, 12, Action::Read(Some(1)))]));
        assert!(check(&[both[0], both[1], (11, 12, Action::Read(Some(2)))]));
        let flip = [
            (11, 12, Action::Read(Some(1))),
            (13, 14, Action::Read(Some(2))),
            (15, 16, Action::Read(Some(1))),
        ];
        assert!(!check(&[both[0], both[1], flip[0], flip[1], flip[2]]));
    }

    #[test]
    fn a_write_of_unknown_outcome_may_happen_late_or_never() {
        let unknown = Action::Write {
            expect: Expect::Anything,
            to: Some(7),
            happened: None,
            existed: None,
        };
        assert!(check(&[
            (0, Micros::MAX, unknown),
            (5, 6, Action::Read(None)),
            (9, 10, Action::Read(Some(7)))
        ]));
        assert!(!check(&[(8, Micros::MAX, unknown), (5, 6, Action::Read(Some(7)))]));
        assert!(!check(&[
            (0, Micros::MAX, unknown),
            (5, 6, Action::Read(Some(7))),
            (9, 10, Action::Read(None))
        ]));
    }

    #[test]
    fn a_condition_that_failed_must_have_been_false() {
        let failed = |expect| Action::Write {
            expect,
            to: Some(9),
            happened: Some(false),
            existed: None,
        };
        assert!(check(&[(0, 1, put(1)), (2, 3, failed(Expect::Absent))]));
        assert!(!check(&[(0, 1, put(1)), (2, 3, failed(Expect::Is(1)))]));
    }

    #[test]
    fn a_search_that_is_given_up_has_checked_nothing() {
        let mut linear = Linear::default();
        linear.note("a", 0, 1, put(1));
        for value in 0..8 {
            linear.note("b", 0, 10, put(value));
        }
        let all = linear.check();
        assert_eq!(
            all,
            Ok(Checked {
                operations: 9,
                given_up: 0
            })
        );
        let few = linear.check_within(4);
        assert_eq!(
            few,
            Ok(Checked {
                operations: 1,
                given_up: 1
            })
        );
    }
}
