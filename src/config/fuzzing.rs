//! See [`crate::fuzzing`].

use super::layer::Layer;
use super::load::merge;
use super::show;

/// A configuration file.
pub(crate) fn config_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(loaded) = read(text) else { return };
    let shown = show(&loaded);
    let again = read(&shown).map(|again| show(&again));
    assert_eq!(again.as_deref().map(values), Some(values(&shown)), "what is shown can be read");
}

/// The lines without where their values come from.
fn values(shown: &str) -> Vec<&str> {
    shown.lines().map(|line| line.split("  # ").next().unwrap_or(line)).collect()
}

fn read(text: &str) -> Option<super::Loaded> {
    let file = Layer::from_toml("fuzz", text).ok()?;
    merge(Some(file), Layer::default(), Layer::default()).ok()
}
