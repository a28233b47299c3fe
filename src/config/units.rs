//! How durations and sizes are written: `"150ms"`, `"1h30m"`, `"64MiB"`.

use std::time::Duration;

/// Units of a duration in descending order, in milliseconds.
const DURATION_UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Units of a size in bytes; the binary ones come first, in descending order, so that formatting finds the largest that divides.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

/// Reads `150ms`, `10s`, `1.5h`, `1h30m`, `7d`: numbers with a unit of `d`, `h`, `m`, `s` or `ms`, the larger unit first; in milliseconds,
/// rounded down. The one reader for configuration, URLs and command line.
pub fn read_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total_ms: u64 = 0;
    let mut smallest_unit = u64::MAX;
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(unit_at);
        let unit_end = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let (_, scale) = DURATION_UNITS.iter().find(|(name, _)| *name == unit)?;
        if *scale >= smallest_unit {
            return None;
        }
        smallest_unit = *scale;
        total_ms = total_ms.checked_add(scaled(number, *scale)?)?;
        rest = tail;
    }
    (!text.is_empty()).then_some(Duration::from_millis(total_ms))
}

/// A decimal number times `scale`, rounded down.
fn scaled(number: &str, scale: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // Further digits are less than a millisecond, even of a day.
    let fraction = &fraction[..fraction.len().min(9)];
    let part = fraction.parse::<u64>().ok()? * scale / 10u64.pow(fraction.len() as u32);
    whole.parse::<u64>().ok()?.checked_mul(scale)?.checked_add(part)
}

/// Parses a duration of the configuration: see [`read_duration`].
///
/// # Errors
/// A sentence that says how a duration is written.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    read_duration(text.trim())
        .ok_or_else(|| format!("{text:?} is not a duration: write it like \"150ms\", \"10s\", \"5m\", \"1h30m\" or \"7d\""))
}

/// Writes a duration in the largest unit that divides it; anything below a millisecond is cut off.
pub fn format_duration(duration: Duration) -> String {
    let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if ms == 0 {
        return "0s".to_owned();
    }
    let (unit, scale) = DURATION_UNITS
        .iter()
        .find(|(_, scale)| ms.is_multiple_of(*scale))
        .unwrap_or(&("ms", 1));
    format!("{}{unit}", ms / scale)
}

/// Parses `"64MiB"`, `"10MB"`, `"512"`: a whole number with `TiB GiB MiB KiB` (powers of 1024), `TB GB MB KB` (powers of 1000), `B` or nothing.
///
/// # Errors
/// A sentence that says how a size is written.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: write it like \"64MiB\", \"10MB\" or a number of bytes");
    let (number, unit) = split_number(text.trim()).ok_or_else(wrong)?;
    let unit = unit.trim();
    let scale = match unit {
        "" => 1,
        unit => SIZE_UNITS
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(unit))
            .map(|(_, scale)| *scale)
            .ok_or_else(wrong)?,
    };
    number.checked_mul(scale).ok_or_else(wrong)
}

/// Writes a size in the largest binary unit that divides it.
pub fn format_size(bytes: u64) -> String {
    let binary = SIZE_UNITS
        .iter()
        .take(4)
        .find(|(_, scale)| bytes > 0 && bytes.is_multiple_of(*scale));
    match binary {
        Some((unit, scale)) => format!("{}{unit}", bytes / scale),
        None => format!("{bytes}B"),
    }
}

/// Splits leading decimal digits from what follows; `None` if there are none or they do not fit.
fn split_number(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    Some((digits.parse().ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_in_every_unit_and_combined() {
        for (text, ms) in [
            ("150ms", 150),
            ("10s", 10_000),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("1h30m", 5_400_000),
            ("1.5s", 1_500),
            ("0.0019s", 1),
            ("7d", 604_800_000),
            ("0s", 0),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_duration_is_refused() {
        for text in [
            "",
            "10",
            "s",
            "-1s",
            "1..5s",
            ".5s",
            "5.s",
            "1.+5s",
            "1e3s",
            "10 parsecs",
            "30m1h",
            "1s1s",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_read_in_every_unit() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("7B", 7),
            ("1KiB", 1024),
            ("64MiB", 64 << 20),
            ("2GiB", 2 << 30),
            ("10MB", 10_000_000),
            ("1 kb", 1000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in ["", "MiB", "-1", "1.5MiB", "5 apples", "18446744073709551615KiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_written_can_be_read_again() {
        for ms in [0, 1, 150, 1_000, 90_000, 3_600_000, 86_400_000] {
            let duration = Duration::from_millis(ms);
            assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
        for bytes in [0, 1, 1000, 1024, 8 << 20, (1 << 40) + 1] {
            assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }
        assert_eq!(format_duration(Duration::from_secs(90)), "90s");
        assert_eq!(format_size(64 << 20), "64MiB");
    }
}
