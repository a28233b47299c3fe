//! Completion: commands first, then keys.

use std::rc::Rc;
use std::time::Duration;

use clap::CommandFactory as _;
use rustyline::completion::Completer;
use rustyline::{Context, Helper, Highlighter, Hinter, Validator};
use tokio::runtime::Runtime;

use super::ShellLine;
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
        let mut commands: Vec<String> = ShellLine::command()
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

    fn keys(&self, prefix: &str) -> Vec<String> {
        let options = ListOptions {
            limit: Some(MOST_KEYS),
            keys_only: true,
            ..ListOptions::default()
        };
        let range = Range::Prefix(prefix.as_bytes().to_vec());
        let Ok(page) = self.runtime.block_on(self.client.list(&range, &options)) else {
            return Vec::new();
        };
        let texts = page.kvs.into_iter().filter_map(|kv| String::from_utf8(kv.key).ok());
        // Only what can be typed without quotes.
        texts
            .filter(|key| !key.chars().any(|c| c.is_whitespace() || c.is_control() || "'\"\\#".contains(c)))
            .collect()
    }
}

impl Completer for Assistant {
    type Candidate = String;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = line.get(..pos).unwrap_or(line);
        let start = typed.rfind([' ', '\t']).map_or(0, |at| at + 1);
        let word = typed.get(start..).unwrap_or_default();
        let before: Vec<&str> = typed.get(..start).unwrap_or_default().split_whitespace().collect();
        let candidates = match before.as_slice() {
            [] => self.commands.iter().filter(|command| command.starts_with(word)).cloned().collect(),
            [command] if TAKE_KEYS.contains(command) => self.keys(word),
            _ => Vec::new(),
        };
        Ok((start, candidates))
    }
}
