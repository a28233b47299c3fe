//! Completion: commands first, then keys.

use std::rc::Rc;
use std::time::Duration;

use rustyline::completion::Completer;
use rustyline::{Context, Helper, Highlighter, Hinter, Validator};
use tokio::runtime::Runtime;

use super::words::{quoted, unfinished};
use crate::client::{Client, ListOptions, Range};

/// A key that takes longer to find is typed faster.
const PATIENCE: Duration = Duration::from_millis(500);
/// More are no help.
const MOST_KEYS: u64 = 50;
/// Their first argument is a key.
const TAKE_KEYS: [&str; 6] = ["set", "put", "get", "del", "ls", "watch"];

/// What the line editor asks.
#[derive(Helper, Highlighter, Hinter, Validator)]
pub(super) struct Assistant {
    commands: Vec<String>,
    client: Client,
    runtime: Rc<Runtime>,
}

impl Assistant {
    pub(super) fn new(client: &Client, runtime: Rc<Runtime>) -> Assistant {
        let mut commands: Vec<String> = super::command()
            .get_subcommands()
            .map(|command| command.get_name().to_owned())
            .collect();
        commands.push("help".to_owned());
        commands.sort_unstable();
        Assistant {
            commands,
            client: client.clone().with_timeout(PATIENCE),
            runtime,
        }
    }

    /// Keys that begin so, as they are typed: all in quotes if one has to be, so that what they have in common is common.
    fn keys(&self, prefix: &[u8], in_quotes: bool) -> Vec<String> {
        let options = ListOptions {
            limit: Some(MOST_KEYS),
            keys_only: true,
            ..ListOptions::default()
        };
        let range = Range::Prefix(prefix.to_vec());
        let Ok(page) = self.runtime.block_on(self.client.list(&range, &options)) else {
            return Vec::new();
        };
        as_typed(page.kvs.iter().map(|kv| kv.key.as_slice()), in_quotes)
    }
}

fn as_typed<'a>(keys: impl Iterator<Item = &'a [u8]> + Clone, in_quotes: bool) -> Vec<String> {
    let in_quotes = in_quotes || keys.clone().any(|key| quoted(key, false).starts_with('"'));
    keys.map(|key| quoted(key, in_quotes)).collect()
}

impl Completer for Assistant {
    type Candidate = String;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = line.get(..pos).unwrap_or(line);
        let Some(word) = unfinished(typed) else {
            return Ok((pos, Vec::new()));
        };
        let before: Vec<&str> = word.before.iter().filter_map(|word| word.to_str()).collect();
        let in_quotes = typed.get(word.start..).is_some_and(|raw| raw.starts_with(['"', '\'']));
        let candidates = match before.as_slice() {
            [] => {
                let commands = self.commands.iter().filter(|command| command.as_bytes().starts_with(&word.bytes));
                commands.cloned().collect()
            }
            [command] | [command, "--prefix" | "--"] if TAKE_KEYS.contains(command) => self.keys(&word.bytes, in_quotes),
            _ => Vec::new(),
        };
        Ok((word.start, candidates))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_quoted_together() {
        let keys = [&b"a-b"[..], b"a c"];
        assert_eq!(as_typed(keys[..1].iter().copied(), false), ["a-b"]);
        assert_eq!(as_typed(keys.iter().copied(), false), ["\"a-b\"", "\"a c\""]);
        assert_eq!(as_typed(keys[..1].iter().copied(), true), ["\"a-b\""]);
    }
}
