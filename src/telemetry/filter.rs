//! The filter's syntax, strictly: the usual parser takes a mistyped level for a target's name and logs everything of it.

use tracing_subscriber::filter::EnvFilter;

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Parses `info`, or `info,metcd::consensus=debug`.
///
/// # Errors
/// A sentence that names the part that is wrong.
pub fn parse_filter(text: &str) -> Result<EnvFilter, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err(format!("an empty filter: write one of {}", LEVELS.join(", ")));
    }
    let directives: Vec<&str> = text.split(',').map(str::trim).collect();
    for directive in &directives {
        let level = directive.rsplit_once('=').map_or(*directive, |(_, level)| level);
        if !LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level)) {
            return Err(wrong_level(level));
        }
    }
    EnvFilter::builder()
        .parse(directives.join(","))
        .map_err(|e| format!("{text:?} is not a log filter: {e}"))
}

fn wrong_level(level: &str) -> String {
    let near = LEVELS
        .iter()
        .map(|known| (strsim::damerau_levenshtein(known, &level.to_lowercase()), known))
        .filter(|(slips, _)| *slips <= 2)
        .min()
        .map(|(_, known)| known);
    let hint = near.map(|near| format!(" (did you mean {near:?}?)")).unwrap_or_default();
    format!(
        "{level:?} is not a level{hint}: write one of {}, or target=level, separated by commas",
        LEVELS.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_targets_are_read() {
        for text in ["info", "OFF", "warn,metcd::consensus=debug", " info , metcd=trace "] {
            assert!(parse_filter(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn a_mistyped_level_is_not_taken_for_a_target() {
        assert!(parse_filter("inf").is_err_and(|e| e.contains("did you mean \"info\"?")));
        assert!(parse_filter("inof").is_err_and(|e| e.contains("did you mean \"info\"?")));
        for text in ["", "metcd", "info,", "metcd=loud", "=", ",,"] {
            assert!(parse_filter(text).is_err(), "{text}");
        }
    }
}
