//! The flags that all client commands have, and readers of arguments.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::Session;
use super::output::Format;
use crate::cli::CliError;
use crate::client::{Client, DEFAULT_ENDPOINT, DEFAULT_TIMEOUT, Range};
use crate::config::units::read_duration;

const ENDPOINTS_VARIABLE: &str = "METCD_ENDPOINTS";

/// Under which these flags stand in the help.
pub const CLIENT_OPTIONS: &str = "Client options";

/// Flags of the commands that speak to a cluster; they may stand before or after the command.
#[derive(Debug, Clone, Default, Args)]
pub struct ClientArgs {
    /// Client URLs of the cluster, tried in turn [env: METCD_ENDPOINTS] [default: http://127.0.0.1:3379].
    #[arg(long, global = true, value_name = "URL", value_delimiter = ',', help_heading = CLIENT_OPTIONS)]
    endpoints: Vec<String>,
    /// How to print [default: plain].
    #[arg(
        long,
        short = 'o',
        global = true,
        overrides_with = "output",
        value_enum,
        value_name = "FORMAT",
        help_heading = CLIENT_OPTIONS
    )]
    output: Option<Format>,
    /// How long to try, such as 500ms, 5s, 1m; connections that all endpoints refuse are an error at once [default: 5s].
    #[arg(long, global = true, overrides_with = "timeout", value_parser = duration, value_name = "TIME", help_heading = CLIENT_OPTIONS)]
    timeout: Option<Duration>,
    /// Read the answering member's own state: needs no quorum, may be stale.
    #[arg(long, global = true, help_heading = CLIENT_OPTIONS)]
    serializable: bool,
}

impl ClientArgs {
    /// Wrong usage if one of these flags stands with a command that does not speak to a cluster; `--output` may, where there is a choice.
    ///
    /// # Errors
    /// So it does.
    pub fn refuse_elsewhere(&self, has_formats: bool) -> Result<(), CliError> {
        let given = [
            ("--endpoints", !self.endpoints.is_empty()),
            ("--output", self.output.is_some() && !has_formats),
            ("--timeout", self.timeout.is_some()),
            ("--serializable", self.serializable),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((name, _)) => Err(CliError::Usage(format!("{name} belongs to the client commands: see --help"))),
            None => Ok(()),
        }
    }

    /// The base URLs, unchecked.
    pub(super) fn endpoints(&self) -> Vec<String> {
        if !self.endpoints.is_empty() {
            return self.endpoints.clone();
        }
        match std::env::var(ENDPOINTS_VARIABLE) {
            Ok(text) if !text.trim().is_empty() => text.split(',').map(|url| url.trim().to_owned()).collect(),
            _ => vec![DEFAULT_ENDPOINT.to_owned()],
        }
    }

    pub(super) fn session(&self) -> Result<Session, CliError> {
        let client = Client::new(self.endpoints())?
            .with_timeout(self.timeout.unwrap_or(DEFAULT_TIMEOUT))
            .with_serializable_reads(self.serializable);
        Ok(Session {
            client,
            format: self.format(),
            timeout: self.timeout,
        })
    }

    /// What was given as `--timeout`.
    pub(super) fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// How to print.
    pub fn format(&self) -> Format {
        self.output.unwrap_or(Format::Plain)
    }

    pub(super) fn serializable(&self) -> bool {
        self.serializable
    }
}

/// `150ms`, `10s`, `1h30m`, `7d`; a bare number is seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    match duration_or_none(text) {
        Ok(duration) if duration.is_zero() => Err("it must be longer than nothing".to_owned()),
        other => other,
    }
}

/// The same, and `0s`.
pub(super) fn duration_or_none(text: &str) -> Result<Duration, String> {
    let is_bare = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let read = if is_bare {
        read_duration(&format!("{text}s"))
    } else {
        read_duration(text)
    };
    read.ok_or_else(|| "write it like 500ms, 30s, 5m, 1h30m or 7d".to_owned())
}

/// The bytes of a key as the shell gave them: any but NUL.
pub(super) fn bytes(argument: &OsString) -> &[u8] {
    argument.as_bytes()
}

/// A key: not empty.
pub(super) fn key(argument: &OsString) -> Result<&[u8], CliError> {
    match bytes(argument) {
        b"" => Err(CliError::Usage("a key is not empty".to_owned())),
        key => Ok(key),
    }
}

/// All keys that begin so; nothing given is every key.
pub(super) fn prefix(argument: Option<&OsString>) -> Range {
    Range::Prefix(argument.map(|prefix| bytes(prefix).to_vec()).unwrap_or_default())
}

/// A file, or standard input for `-`.
pub(super) fn read_input(file: &Path) -> Result<Vec<u8>, CliError> {
    let mut content = Vec::new();
    let read = if file == Path::new("-") {
        std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut content).map(|_| ())
    } else {
        std::fs::read(file).map(|read| content = read)
    };
    read.map_err(|error| CliError::Failed(format!("cannot read {}: {error}", file.display())))?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("150ms"), Ok(Duration::from_millis(150)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(duration("1d"), Ok(Duration::from_secs(86_400)));
        for bad in ["", "s", "-1s", "1w", "0s", "1e9h", "1..2s", "1h30", "99999999999999999999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert_eq!(duration_or_none("0s"), Ok(Duration::ZERO));
    }
}
