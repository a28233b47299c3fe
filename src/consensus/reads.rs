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
        }
    }

    /// A read waits for the next round: never for one that was sent before it came (rule 16).
    pub fn add(&mut self, token: u64) {
        if mutant!(JoinOldRound)
            && let Some(round) = &mut self.round
        {
            return round.tokens.push(token);
        }
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
                let index = if mutant!(ReadBeforeApplied) { 0 } else { index };
                round.tokens.into_iter().map(|token| (token, index)).collect()
            }
            None => Vec::new(),
        }
    }

    /// Gives up a round that takes too long (its messages may be lost): its readers join the next one.
    pub fn handle_tick(&mut self, tick: u64, patience: u64) {
        if self
            .round
            .as_ref()
            .is_some_and(|round| tick.saturating_sub(round.since_tick) > patience)
        {
            self.give_up();
        }
    }

    /// Another term or leader does not answer the old one's rounds (rule 18).
    pub fn watch_leader(&mut self, term: u64, leader: u64) {
        if self.leadership != (term, leader) {
            self.leadership = (term, leader);
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

    #[test]
    fn a_round_given_up_is_tried_under_a_fresh_context_and_its_late_answer_is_void() {
        let mut reads = Reads::new(1, 1);
        reads.add(10);
        let lost = reads.begin_round(0).unwrap();
        reads.handle_tick(4, 4);
        assert!(!reads.is_idle());
        reads.handle_tick(5, 4);
        let retry = reads.begin_round(5).unwrap();
        assert_ne!(lost, retry);
        assert!(reads.finish_round(&lost, 5).is_empty());
        assert_eq!(reads.finish_round(&retry, 7), [(10, 7)]);
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
