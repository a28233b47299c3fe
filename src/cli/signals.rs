//! Which signals this process was started to ignore, and whether its terminal sends it any.

use tokio::signal::unix::SignalKind;

/// Whether a signal was turned off by whoever started the process, as `nohup` does with SIGHUP. To listen to it would turn it on again.
/// False where that cannot be told.
pub fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    holds(&status, kind)
}

fn holds(status: &str, kind: SignalKind) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    let bit = u32::try_from(kind.as_raw_value() - 1).unwrap_or(u32::MAX);
    mask.checked_shr(bit).is_some_and(|rest| rest & 1 == 1)
}

/// Whether what is typed at the terminal, Ctrl-C as well, goes to this process and those of its group. False where that cannot be told.
pub fn is_in_foreground() -> bool {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    owns_terminal(&stat)
}

fn owns_terminal(stat: &str) -> bool {
    // The name before it may have anything in it, also brackets.
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let group = fields.nth(2);
    let of_terminal = fields.nth(2);
    group.is_some() && group == of_terminal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_has_a_bit_for_each_signal() {
        let status = "Name:\tmetcd\nSigBlk:\tffffffffffffffff\nSigIgn:\t0000000000000001\nSigCgt:\t0000000000000000\n";
        assert!(holds(status, SignalKind::hangup()));
        assert!(!holds(status, SignalKind::interrupt()));
        assert!(!holds("", SignalKind::hangup()));
    }

    #[test]
    fn the_group_in_the_foreground_is_the_terminals() {
        assert!(owns_terminal("100 (a ) b) S 99 100 99 34816 100 4194304 1"));
        assert!(!owns_terminal("100 (metcd) S 99 100 99 34816 99 4194304 1"));
        assert!(!owns_terminal("100 (metcd) S 99 100 99 0 -1 4194304 1"));
        assert!(!owns_terminal(""));
    }
}
