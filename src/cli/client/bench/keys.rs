//! Which key is next: a generator that costs nanoseconds, uniform or zipf.

/// A fast generator with a seed (SplitMix64); nothing secret depends on it.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    pub(super) fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// In [0, `below`).
    pub(super) fn below(&mut self, below: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(below)) >> 64) as u64
    }
}

/// How keys are chosen from the key space.
#[derive(Debug, Clone)]
pub(super) enum Distribution {
    /// All alike.
    Uniform { keys: u64 },
    /// Few are asked for often.
    Zipf(Zipf),
}

/// Ranks with probability proportional to 1/rank^theta, after Gray et al., "Quickly Generating Billion-Record Synthetic Databases"
/// (SIGMOD 1994).
#[derive(Debug, Clone)]
pub(super) struct Zipf {
    keys: u64,
    alpha: f64,
    eta: f64,
    zeta: f64,
    second: f64,
}

impl Zipf {
    /// `theta` is within (0, 1).
    pub(super) fn new(keys: u64, theta: f64) -> Zipf {
        let zeta: f64 = (1..=keys).map(|rank| (rank as f64).powf(-theta)).sum();
        let zeta2 = 1.0 + 0.5f64.powf(theta);
        Zipf {
            keys,
            alpha: 1.0 / (1.0 - theta),
            eta: (1.0 - (2.0 / keys as f64).powf(1.0 - theta)) / (1.0 - zeta2 / zeta),
            zeta,
            second: zeta2,
        }
    }

    fn rank(&self, fraction: f64) -> u64 {
        let uz = fraction * self.zeta;
        if uz < 1.0 || self.keys < 3 {
            return if uz < 1.0 { 0 } else { self.keys - 1 };
        }
        if uz < self.second {
            return 1;
        }
        let rank = self.keys as f64 * (self.eta * fraction - self.eta + 1.0).powf(self.alpha);
        (rank as u64).min(self.keys - 1)
    }
}

impl Distribution {
    pub(super) fn next(&self, random: &mut Random) -> u64 {
        match self {
            Self::Uniform { keys } => random.below(*keys),
            // Neighbouring ranks are spread over the key space, as hot keys are in life.
            Self::Zipf(zipf) => spread(zipf.rank(random.fraction())) % zipf.keys,
        }
    }
}

fn spread(rank: u64) -> u64 {
    Random::new(rank).next()
}

/// Writes key `number` in `size` bytes: digits with zeros before them. Larger numbers make longer keys.
pub(super) fn push_key(out: &mut Vec<u8>, prefix: &str, number: u64, size: usize) {
    out.extend_from_slice(prefix.as_bytes());
    let mut digits = itoa::Buffer::new();
    let digits = digits.format(number).as_bytes();
    let zeros = size.saturating_sub(prefix.len() + digits.len());
    out.resize(out.len() + zeros, b'0');
    out.extend_from_slice(digits);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_the_size_asked_for() {
        let mut out = Vec::new();
        push_key(&mut out, "bench-", 42, 16);
        assert_eq!(out, b"bench-0000000042");
    }

    #[test]
    fn zipf_prefers_few_and_reaches_many() {
        let keys = 1000;
        let distribution = Distribution::Zipf(Zipf::new(keys, 0.99));
        let mut random = Random::new(7);
        let mut counts = vec![0u32; keys as usize];
        for _ in 0..100_000 {
            counts[distribution.next(&mut random) as usize] += 1;
        }
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let hottest: u32 = counts.iter().take(10).sum();
        assert!((30_000..55_000).contains(&hottest), "the ten hottest of 1000 keys got {hottest}");
        assert!(counts.iter().filter(|&&count| count > 0).count() > 500);
    }

    #[test]
    fn uniform_reaches_every_key_and_tiny_key_spaces_work() {
        let mut random = Random::new(1);
        let mut counts = [0u32; 16];
        for _ in 0..16_000 {
            counts[Distribution::Uniform { keys: 16 }.next(&mut random) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (800..1200).contains(count)), "{counts:?}");
        for keys in [1, 2, 3] {
            let zipf = Distribution::Zipf(Zipf::new(keys, 0.99));
            assert!((0..1000).all(|_| zipf.next(&mut random) < keys));
        }
    }
}
