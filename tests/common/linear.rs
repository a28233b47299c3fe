//! Linearizability by search (Wing and Gong, with Lowe's memory of what was tried), key by key: single-key operations of a linearizable
//! store are linearizable exactly if those of each key are (Herlihy and Wing, locality). No revision is believed here.

use std::collections::{BTreeMap, HashSet};

use super::Micros;

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

impl Linear {
    pub fn note(&mut self, key: &str, begin: Micros, end: Micros, action: Action) {
        self.keys.entry(key.to_owned()).or_default().push(Op { begin, end, action });
    }

    /// Whether each key has an order that explains everything heard of it.
    pub fn check(&self) -> Result<Checked, String> {
        self.check_within(MAX_STEPS)
    }

    fn check_within(&self, max_steps: usize) -> Result<Checked, String> {
        let mut checked = Checked::default();
        for (key, ops) in &self.keys {
            match search(ops, max_steps) {
                Verdict::Linear => checked.operations += ops.len() as u64,
                Verdict::GivenUp => checked.given_up += ops.len() as u64,
                Verdict::Stuck(stuck) => {
                    return Err(format!(
                        "{key} is not linearizable; the longest order found stops before one of:{}\nof all these:{}",
                        listed(&stuck),
                        listed(ops)
                    ));
                }
            }
        }
        Ok(checked)
    }
}

/// Operations that [`Linear::check`] has looked at.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    pub operations: u64,
    /// Those of keys whose search took too long: nothing is known of them.
    pub given_up: u64,
}

fn listed(ops: &[Op]) -> String {
    let mut text = String::new();
    for op in ops {
        text.push_str(&format!(
            "\n  {:>12.6}..{:<12} {:?}",
            op.begin as f64 / 1e6,
            if op.end == Micros::MAX {
                "?".to_owned()
            } else {
                format!("{:.6}", op.end as f64 / 1e6)
            },
            op.action
        ));
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

enum Verdict {
    Linear,
    GivenUp,
    /// What was open where the longest order ends.
    Stuck(Vec<Op>),
}

/// Stands for every value that no operation tells from the others: not read, and not asked for by a condition.
const UNSEEN: u64 = u64::MAX;

/// The same operations with [`UNSEEN`] for such values: what differs only in them is one state.
fn merge_unseen(ops: &mut [Op]) {
    let mut seen = HashSet::new();
    for op in &*ops {
        match op.action {
            Action::Read(value) => seen.extend(value),
            Action::Write {
                expect: Expect::Is(value), ..
            } => {
                seen.insert(value);
            }
            Action::Write { .. } => {}
        }
    }
    for op in ops {
        if let Action::Write { to: Some(to), .. } = &mut op.action
            && !seen.contains(to)
        {
            *to = UNSEEN;
        }
    }
}

/// Depth first: any operation that begins before all open ones end may be next. Those of which nobody knows whether they happened come
/// last: most are not needed, and each that is tried in vain doubles what is left to try.
fn search(ops: &[Op], max_steps: usize) -> Verdict {
    let mut originals = ops.to_vec();
    originals.sort_by_key(|op| (op.end == Micros::MAX, op.begin, op.end));
    let mut ops = originals.clone();
    merge_unseen(&mut ops);
    let wanted = ops.iter().filter(|op| op.end != Micros::MAX).count();
    // Of operations that would do the same at any later time the first goes first.
    let twin = |i: usize| (wanted..i).rev().find(|&j| ops[j].action == ops[i].action);
    let twins: Vec<Option<usize>> = (0..ops.len()).map(twin).collect();
    let mut tried: HashSet<(Vec<u64>, Value)> = HashSet::new();
    let mut done = vec![0u64; ops.len() / 64 + 1];
    let mut stack: Vec<(usize, Value)> = Vec::new();
    let (mut value, mut placed, mut best) = (None, 0, 0);
    let mut stuck = Vec::new();
    let mut next = 0;
    loop {
        if placed == wanted {
            return Verdict::Linear;
        }
        let limit = first_end(&ops[..wanted], &done);
        let is_done = |i: usize| done[i / 64] >> (i % 64) & 1 == 1;
        let known = (next..wanted).take_while(|&i| ops[i].begin <= limit);
        let unknown = (next.max(wanted)..ops.len()).take_while(|&i| ops[i].begin <= limit);
        let candidate = known.chain(unknown).find_map(|i| {
            if is_done(i) || twins[i].is_some_and(|twin| !is_done(twin)) {
                return None;
            }
            let after = apply(ops[i].action, value)?;
            // A write of nobody knows that changes nothing need not be placed.
            if i >= wanted && after == value {
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
                placed += usize::from(i < wanted);
                value = after;
                next = 0;
                if tried.len() > max_steps {
                    return Verdict::GivenUp;
                }
            }
            None => {
                if placed >= best {
                    best = placed;
                    stuck = open_at(&originals, &done, limit);
                }
                let Some((i, before)) = stack.pop() else {
                    return Verdict::Stuck(stuck);
                };
                done[i / 64] &= !(1 << (i % 64));
                placed -= usize::from(i < wanted);
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

    fn unknown(to: u64) -> Action {
        Action::Write {
            expect: Expect::Anything,
            to: Some(to),
            happened: None,
            existed: None,
        }
    }

    fn check(ops: &[(Micros, Micros, Action)]) -> bool {
        let mut linear = Linear::default();
        for &(begin, end, action) in ops {
            linear.note("k", begin, end, action);
        }
        linear.check().is_ok_and(|checked| {
            assert_eq!((checked.operations, checked.given_up), (ops.len() as u64, 0));
            true
        })
    }

    #[test]
    fn a_read_may_not_go_back_in_time() {
        assert!(check(&[(0, 1, put(1)), (2, 3, put(2)), (4, 5, Action::Read(Some(2)))]));
        assert!(!check(&[(0, 1, put(1)), (2, 3, put(2)), (4, 5, Action::Read(Some(1)))]));
    }

    #[test]
    fn an_acknowledged_write_may_not_be_lost() {
        assert!(!check(&[(0, 1, put(1)), (2, 3, Action::Read(None))]));
        let remove = Action::Write {
            expect: Expect::Present,
            to: None,
            happened: Some(true),
            existed: Some(true),
        };
        assert!(check(&[(0, 1, put(1)), (2, 3, remove), (4, 5, Action::Read(None))]));
        assert!(!check(&[(0, 1, put(1)), (2, 3, remove), (4, 5, Action::Read(Some(1)))]));
    }

    #[test]
    fn a_write_that_was_not_applied_is_no_operation_and_may_not_be_read() {
        assert!(!check(&[(0, 1, put(1)), (4, 5, Action::Read(Some(2)))]));
    }

    #[test]
    fn a_write_may_not_happen_twice() {
        let reads = [
            (4, 5, Action::Read(Some(1))),
            (6, 7, Action::Read(Some(2))),
            (8, 9, Action::Read(Some(1))),
        ];
        for first in [(0, 1, put(1)), (0, Micros::MAX, unknown(1))] {
            assert!(check(&[first, (2, 6, put(2)), reads[0], reads[1]]));
            assert!(!check(&[first, (2, 6, put(2)), reads[0], reads[1], reads[2]]));
        }
    }

    /// A condition that held shows the second of two writes of which nobody knows.
    #[test]
    fn writes_that_nobody_reads_still_count() {
        let replace = |expect| Action::Write {
            expect,
            to: Some(9),
            happened: Some(true),
            existed: None,
        };
        let never = [(0, Micros::MAX, unknown(1)), (1, Micros::MAX, unknown(2))];
        assert!(check(&[never[0], never[1], (5, 6, replace(Expect::Present))]));
        assert!(check(&[never[0], never[1], (5, 6, replace(Expect::Absent))]));
        assert!(!check(&[(5, 6, replace(Expect::Present)), (7, Micros::MAX, unknown(1))]));
    }

    /// As many as a key of a test ever has, with a reader that goes back in time at the end: found, and not given up.
    #[test]
    fn many_unknown_outcomes_do_not_make_the_search_give_up() {
        let mut ops = Vec::new();
        for n in 0..14 {
            ops.push((10 * n, Micros::MAX, unknown(100 + n)));
            ops.push((10 * n, 10 * n + 25, put(200 + n)));
            ops.push((10 * n + 1, 10 * n + 26, put(300 + n)));
            ops.push((10 * n + 27, 10 * n + 40, Action::Read(Some(200 + n))));
        }
        ops.push((900, 901, put(1)));
        ops.push((902, 903, Action::Read(Some(1))));
        assert!(check(&ops));
        ops.push((904, 905, Action::Read(Some(205))));
        assert!(!check(&ops));
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
        let unknown = unknown(7);
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
        let figures = |checked: Result<Checked, String>| checked.map(|checked| (checked.operations, checked.given_up));
        assert_eq!(figures(linear.check()), Ok((9, 0)));
        assert_eq!(figures(linear.check_within(4)), Ok((1, 8)));
    }
}
