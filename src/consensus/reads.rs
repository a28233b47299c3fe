//! ReadIndex rounds: one in flight, shared by everybody who waits when it begins.

/// The rounds of this member.
#[derive(Debug)]
pub struct Reads {
    member: u64,
    boot: u64,
    counter: u64,
    waiting: Vec<u64>,
    round: Option<Round>,
    leadership: (u64, u64),
    /// Ticks that a round may take, as far as is known from the last ones.
    patience: u64,
    now_tick: u64,
}

#[derive(Debug)]
struct Round {
    context: Vec<u8>,
    tokens: Vec<u64>,
    since_tick: u64,
}

impl Reads {
    pub fn new(member: u64, boot: u64) -> Reads {
        Reads {
            member,
            boot,
            counter: 0,
            waiting: Vec::new(),
            round: None,
            leadership: (0, 0),
            patience: 0,
            now_tick: 0,
        }
    }

    /// A read waits for the next round: never for one that was sent before it came (rule 16).
    pub fn add(&mut self, token: u64) {
        self.waiting.push(token);
    }

    pub fn is_idle(&self) -> bool {
        self.round.is_none()
    }

    /// Begins a round for all that wait and gives its context: fresh for every try (rule 17).
    pub fn begin_round(&mut self, tick: u64) -> Option<Vec<u8>> {
        if self.round.is_some() || self.waiting.is_empty() {
            return None;
        }
        if !mutant!(ReuseReadContext) {
            self.counter += 1;
        }
        let context = [self.member, self.boot, self.counter]
            .iter()
            .flat_map(|part| part.to_be_bytes())
            .collect::<Vec<u8>>();
        self.round = Some(Round {
            context: context.clone(),
            tokens: std::mem::take(&mut self.waiting),
            since_tick: tick,
        });
        Some(context)
    }

    /// A confirmed context: its readers may read at `index`. Contexts of rounds that were given up match nothing.
    pub fn finish_round(&mut self, context: &[u8], index: u64) -> Vec<(u64, u64)> {
        match self.round.take_if(|round| round.context == context) {
            Some(round) => {
                self.patience = 2 * self.now_tick.saturating_sub(round.since_tick);
                let index = if mutant!(ReadBeforeApplied) { 0 } else { index };
                round.tokens.into_iter().map(|token| (token, index)).collect()
            }
            None => Vec::new(),
        }
    }

    /// Gives up a round that takes longer than `least` ticks (its messages may be lost): its readers join the next one. That one may take
    /// twice as long, up to `most`, and later ones twice as long as the last that was confirmed: where the way to the others and back is
    /// long, every round would be given up in vain.
    pub fn handle_tick(&mut self, tick: u64, least: u64, most: u64) {
        self.now_tick = tick;
        let patience = self.patience.min(most).max(least);
        if self
            .round
            .as_ref()
            .is_some_and(|round| tick.saturating_sub(round.since_tick) > patience)
        {
            self.patience = 2 * patience;
            self.give_up();
        }
    }

    /// Another term or leader does not answer the old one's rounds (rule 18).
    pub fn watch_leader(&mut self, term: u64, leader: u64) {
        if self.leadership != (term, leader) {
            self.leadership = (term, leader);
            self.patience = 0;
            self.give_up();
        }
    }

    fn give_up(&mut self) {
        if let Some(round) = self.round.take() {
            let mut tokens = round.tokens;
            tokens.append(&mut self.waiting);
            self.waiting = tokens;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_never_joins_a_round_that_was_sent_before_it_came() {
        let mut reads = Reads::new(1, 1);
        reads.add(10);
        let first = reads.begin_round(0).unwrap();
        reads.add(11);
        assert_eq!(reads.begin_round(0), None);
        assert_eq!(reads.finish_round(&first, 5), [(10, 5)]);
        let second = reads.begin_round(0).unwrap();
        assert_ne!(first, second);
        assert_eq!(reads.finish_round(&second, 6), [(11, 6)]);
    }

    /// Rule 17: an answer that is late, or not this member's, is nobody's.
    #[test]
    fn no_two_members_or_boots_ever_have_the_same_context() {
        let mut contexts: Vec<Vec<u8>> = Vec::new();
        for (member, boot) in [(1, 1), (1, 2), (2, 1), (2, 2)] {
            let mut reads = Reads::new(member, boot);
            for reader in 0..2 {
                reads.add(reader);
                let context = reads.begin_round(0).unwrap();
                reads.finish_round(&context, 5);
                contexts.push(context);
            }
        }
        let count = contexts.len();
        contexts.sort();
        contexts.dedup();
        assert_eq!(contexts.len(), count);
    }

    #[test]
    fn all_that_wait_when_a_round_begins_share_it() {
        let mut reads = Reads::new(1, 1);
        reads.add(10);
        reads.add(11);
        let shared = reads.begin_round(0).unwrap();
        assert_eq!(reads.finish_round(&shared, 5), [(10, 5), (11, 5)]);
        assert_eq!(reads.begin_round(0), None, "nobody is left over");
        // Nor are those that join while it is tried again.
        reads.add(12);
        reads.begin_round(0).unwrap();
        reads.add(13);
        reads.handle_tick(5, 4, 4);
        let retry = reads.begin_round(5).unwrap();
        assert_eq!(reads.finish_round(&retry, 6), [(12, 6), (13, 6)]);
    }

    #[test]
    fn a_round_given_up_is_tried_under_a_fresh_context_and_its_late_answer_is_void() {
        let mut reads = Reads::new(1, 1);
        reads.add(10);
        let lost = reads.begin_round(0).unwrap();
        reads.handle_tick(4, 4, 4);
        assert!(!reads.is_idle());
        reads.handle_tick(5, 4, 4);
        let retry = reads.begin_round(5).unwrap();
        assert_ne!(lost, retry);
        assert!(reads.finish_round(&lost, 5).is_empty());
        assert_eq!(reads.finish_round(&retry, 7), [(10, 7)]);
    }

    #[test]
    fn rounds_that_are_given_up_in_vain_get_more_time() {
        let mut reads = Reads::new(1, 1);
        let took = |reads: &mut Reads, begun: u64, most: u64| {
            let context = reads.begin_round(begun).unwrap();
            let given_up = (begun + 1..).find(|&tick| {
                reads.handle_tick(tick, 4, most);
                reads.is_idle()
            });
            (context, given_up.unwrap() - begun)
        };
        reads.add(10);
        let tries: Vec<u64> = (0..4).map(|n| took(&mut reads, 100 * n, 20).1).collect();
        assert_eq!(tries, [5, 9, 17, 21], "ever more, up to a bound");
        // Confirmed after six ticks: the next one may take twice as long.
        let context = reads.begin_round(500).unwrap();
        reads.handle_tick(506, 4, 20);
        assert_eq!(reads.finish_round(&context, 5), [(10, 5)]);
        reads.add(11);
        assert_eq!(took(&mut reads, 600, 20).1, 13);
        // Another leader may be nearer.
        reads.watch_leader(4, 3);
        assert_eq!(took(&mut reads, 700, 20).1, 5);
    }

    #[test]
    fn another_leader_restarts_the_round() {
        let mut reads = Reads::new(1, 1);
        reads.watch_leader(3, 2);
        reads.add(10);
        reads.begin_round(0).unwrap();
        reads.watch_leader(4, 3);
        assert!(reads.is_idle());
        assert!(reads.begin_round(0).is_some());
    }
}
