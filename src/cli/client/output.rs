//! How answers are printed: plain for pipes and people, JSON for programs, tables for eyes.

use std::io::{self, IsTerminal as _, Write as _};

use clap::ValueEnum;
use serde::Serialize;

use crate::cli::{CliError, print, print_bytes};

/// `--output`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Values and keys as they are, one line for the rest.
    Plain,
    /// JSON.
    Json,
    /// A table.
    Table,
}

/// Prints JSON on one line.
pub fn json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string(value).map_err(|error| CliError::Failed(format!("cannot write JSON: {error}")))?;
    print(&format!("{text}\n"))
}

/// Bytes as they are; on a terminal made harmless, and with a line's end.
pub(super) fn value(bytes: &[u8]) -> Result<(), CliError> {
    if !io::stdout().is_terminal() {
        return print_bytes(bytes);
    }
    let text = visible(bytes, true);
    print(&if text.ends_with('\n') { text } else { format!("{text}\n") })
}

/// A key on a line of its own.
pub(super) fn push_key(out: &mut Vec<u8>, key: &[u8]) {
    if io::stdout().is_terminal() {
        out.extend_from_slice(visible(key, false).as_bytes());
    } else {
        out.extend_from_slice(key);
    }
    out.push(b'\n');
}

/// Text that cannot move the cursor: what is not printable is shown as an escape.
pub(super) fn visible(bytes: &[u8], keep_lines: bool) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\n' | '\t' if keep_lines => out.push(c),
                '\n' | '\t' | '\r' => out.extend(c.escape_default()),
                c if c.is_control() => c.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| push_byte(&mut out, byte)),
                c => out.push(c),
            }
        }
        chunk.invalid().iter().for_each(|&byte| push_byte(&mut out, byte));
    }
    out
}

fn push_byte(out: &mut String, byte: u8) {
    out.push_str(&format!("\\x{byte:02x}"));
}

/// Whether escape sequences may go to stdout: it is a terminal, and `NO_COLOR` is not set.
pub(super) fn colours() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    io::stdout().is_terminal() && !refused && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Text in bold, where that is seen.
pub(super) fn bold(text: &str) -> String {
    if colours() {
        format!("\x1b[1m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// A line on stderr.
pub fn warn(text: &str) {
    // Nobody is left to tell if stderr is gone.
    let _ = writeln!(io::stderr(), "metcd: {text}");
}

/// A line for people: on stderr, if that is a terminal. A script knows what it asked for.
pub(super) fn hint(text: &str) {
    if io::stderr().is_terminal() {
        warn(text);
    }
}

/// One row.
pub fn row<const N: usize>(columns: [&'static str; N], cells: [String; N]) -> Result<(), CliError> {
    let mut table = Table::new(&columns);
    table.row(cells);
    table.print()
}

/// Rows in aligned columns.
pub(super) struct Table {
    columns: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(columns: &[&'static str]) -> Table {
        Table {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(super) fn print(&self) -> Result<(), CliError> {
        let text = self.render();
        let (head, body) = text.split_once('\n').unwrap_or((&text, ""));
        print(&format!("{}\n{body}", bold(head)))
    }

    fn render(&self) -> String {
        let header = self.columns.iter().map(|column| (*column).to_owned()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&header).chain(&self.rows).collect();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|column| {
                lines
                    .iter()
                    .filter_map(|line| line.get(column))
                    .map(|cell| width(cell))
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut out = String::new();
        for line in lines {
            out.push_str(&aligned(line, &widths));
            out.push('\n');
        }
        out
    }
}

/// Cells in columns of these widths; a cell that is wider moves the rest of its line.
pub(super) fn aligned(cells: &[String], widths: &[usize]) -> String {
    let mut text = String::new();
    for (cell, column) in cells.iter().zip(widths) {
        text.push_str(cell);
        text.extend(std::iter::repeat_n(' ', column.saturating_sub(width(cell)) + 2));
    }
    text.truncate(text.trim_end().len());
    text
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// `1536` as `1.5 KiB`.
pub(super) fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" {
                format!("{bytes} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// Whole seconds as `2d 3h`, `5m 10s`.
pub(super) fn age(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m {s}s"),
        (0, h, m, _) => format!("{h}h {m}m"),
        (d, h, _, _) => format!("{d}d {h}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_not_padded() {
        let mut table = Table::new(&["ID", "NAME"]);
        table.row(["1".to_owned(), "näme".to_owned()]);
        table.row(["1000".to_owned(), String::new()]);
        assert_eq!(table.render(), "ID    NAME\n1     näme\n1000\n");
    }

    #[test]
    fn nothing_printed_on_a_terminal_can_move_its_cursor() {
        assert_eq!(visible(b"a\x1b[2J\xff\n", false), "a\\x1b[2J\\xff\\n");
        assert_eq!(visible("\0\t\r\u{85}".as_bytes(), false), "\\x00\\t\\r\\xc2\\x85");
        assert_eq!(visible("ä\n".as_bytes(), true), "ä\n");
    }

    #[test]
    fn sizes_and_ages_read_well() {
        assert_eq!(
            (size(1023), size(1536), size(5 << 40)),
            ("1023 B".into(), "1.5 KiB".into(), "5.0 TiB".into())
        );
        assert_eq!(
            (age(59), age(310), age(7260), age(183_600)),
            ("59s".into(), "5m 10s".into(), "2h 1m".into(), "2d 3h".into())
        );
    }
}
