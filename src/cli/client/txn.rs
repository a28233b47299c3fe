//! `metcd txn`.

use std::ffi::OsString;
use std::path::Path;

use clap::Args;
use serde_json::Value;

use super::args::{bytes, read_input};
use super::output::{self, Format, Table};
use super::{Session, print};
use crate::cli::CliError;

/// `metcd txn`
#[derive(Debug, Args)]
#[command(after_help = r#"Example:
  metcd txn <<'END'
  {"compare": [{"key": "a", "target": "mod_revision", "op": "=", "value": 3}],
   "then": [{"put": {"key": "a", "value": "new"}}],
   "else": [{"get": {"key": "a"}}]}
  END

Exit code 3: the comparison failed, and the else branch was carried out."#)]
pub struct TxnArgs {
    /// A file with the transaction, or the JSON itself; standard input if left out.
    #[arg(default_value = "-", hide_default_value = true, value_name = "FILE|JSON")]
    source: OsString,
}

pub(super) async fn run(session: &Session, args: &TxnArgs) -> Result<(), CliError> {
    let is_json = bytes(&args.source).trim_ascii_start().starts_with(b"{");
    let text = if is_json {
        bytes(&args.source).to_vec()
    } else {
        read_input(Path::new(&args.source))?
    };
    let txn: Value = serde_json::from_slice(&text).map_err(|error| CliError::Usage(format!("the transaction is not JSON: {error}")))?;
    commit(session, &txn).await
}

/// Commits a transaction and prints its result.
pub(super) async fn commit(session: &Session, txn: &Value) -> Result<(), CliError> {
    let answer = session.client.txn(txn).await?;
    let succeeded = answer.get("succeeded").and_then(Value::as_bool).unwrap_or(false);
    show(session, &answer)?;
    match succeeded {
        true => Ok(()),
        false => Err(CliError::NotMet(
            "the comparison failed: the else branch was carried out".to_owned(),
        )),
    }
}

fn show(session: &Session, answer: &Value) -> Result<(), CliError> {
    let responses = answer
        .get("responses")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    let revision = answer.get("revision").map(Value::to_string).unwrap_or_default();
    match session.format {
        Format::Json => output::json(answer),
        Format::Plain => {
            let lines: String = responses.iter().map(|response| format!("{response}\n")).collect();
            print(&format!("revision {revision}\n{lines}"))
        }
        Format::Table => {
            let mut table = Table::new(&["OPERATION", "RESULT"]);
            for (number, response) in responses.iter().enumerate() {
                table.row([(number + 1).to_string(), response.to_string()]);
            }
            table.print()
        }
    }
}
