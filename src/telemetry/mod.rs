//! Logs: set up once by `metcd serve`, before anything else.
//!
//! *Invariants*
//! - Logging never stops the node. Lines go through a bounded queue to a thread of their own; when a slow disk or a blocked pipe
//!   fills it, lines are dropped and counted ([`LogHandle::dropped_lines`]), the raft loop goes on.
//! - Every line names the node.
//! - Requests are events of the target [`ACCESS_TARGET`]. They are apart from the rest: the filter does not touch them,
//!   `log.access_log` turns them on, and with a directory they have a file of their own.

mod files;
mod filter;
mod format;

use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{EnvFilter, FilterExt, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

use crate::config::{LogConfig, LogFormat};
use files::RotatingFile;
pub use filter::parse_filter;
use format::{JsonLines, NodeName, TextLines};

/// Target of the events that are one line of the access log each.
pub const ACCESS_TARGET: &str = "access";

/// Lines that may wait for a slow log disk before lines are dropped.
const QUEUED_LINES: usize = 16_384;

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each field is")]
pub enum TelemetryError {
    /// The directory or a file in it.
    #[error("log.directory {directory}: {source}: create it, or make it writable for this user")]
    Directory { directory: String, source: io::Error },
    /// See [`parse_filter`].
    #[error("log.level: {0}")]
    Filter(String),
    /// Something else in this process logs already.
    #[error("logging is set up already")]
    Twice,
}

type FilterHandle = reload::Handle<EnvFilter, Registry>;
type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Changes logging at run time. Cheap to clone.
#[derive(Clone)]
pub struct LogHandle {
    inner: Arc<Inner>,
}

struct Inner {
    filter: FilterHandle,
    filter_text: Mutex<String>,
    node: NodeName,
    dropped: Vec<ErrorCounter>,
    guards: Mutex<Vec<WorkerGuard>>,
}

impl LogHandle {
    /// The filter in force, as it was written.
    pub fn filter(&self) -> String {
        self.inner.filter_text.lock().clone()
    }

    /// Puts another filter in force.
    ///
    /// # Errors
    /// As [`parse_filter`]; the old filter stays.
    pub fn set_filter(&self, text: &str) -> Result<(), String> {
        let filter = parse_filter(text)?;
        let mut current = self.inner.filter_text.lock();
        self.inner.filter.reload(filter).map_err(|e| e.to_string())?;
        text.trim().clone_into(&mut current);
        Ok(())
    }

    /// The name on every following line, for a joiner that was just told its id.
    pub fn set_node(&self, name: &str) {
        name.clone_into(&mut self.inner.node.write());
    }

    /// Lines lost since the start because the log's disk or pipe was too slow.
    pub fn dropped_lines(&self) -> usize {
        self.inner.dropped.iter().map(ErrorCounter::dropped_lines).sum()
    }

    /// Writes out what is queued and ends logging; takes at most about a second. To be called before the process ends.
    pub fn close(&self) {
        self.inner.guards.lock().clear();
    }
}

/// Sets up logging for the process as `config` says.
///
/// # Errors
/// See [`TelemetryError`].
pub fn init(config: &LogConfig, node: &str) -> Result<LogHandle, TelemetryError> {
    let (layers, handle) = layers(config, node)?;
    tracing_subscriber::registry()
        .with(layers)
        .try_init()
        .map_err(|_| TelemetryError::Twice)?;
    log_panics(handle.clone());
    Ok(handle)
}

/// A panic ends the process at once, in every build: unwinding would run the destructors of engines, and raft-engine's sync a file whose
/// sync has just failed (rule 5). Its text must be in the log first, and the log on disk.
fn log_panics(handle: LogHandle) {
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default_hook(panic);
        tracing::error!(panic = %panic, "a bug: the process ends");
        handle.close();
        std::process::abort();
    }));
}

fn layers(config: &LogConfig, node: &str) -> Result<(Vec<BoxedLayer>, LogHandle), TelemetryError> {
    let filter = parse_filter(&config.level).map_err(TelemetryError::Filter)?;
    let (filter, filter_handle) = reload::Layer::new(filter);
    let node: NodeName = Arc::new(RwLock::new(node.to_owned()));
    let mut outputs = Outputs::default();
    let main_writer = outputs.open(config, "metcd")?;
    let is_access = |meta: &tracing::Metadata<'_>| meta.target() == ACCESS_TARGET;
    let main_filter = filter.and(filter_fn(move |meta| !is_access(meta)));
    let mut layers = vec![line_layer(config, &node, main_writer.clone()).with_filter(main_filter).boxed()];
    if config.access_log {
        let writer = if config.directory.is_some() {
            outputs.open(config, "access")?
        } else {
            main_writer
        };
        layers.push(line_layer(config, &node, writer).with_filter(filter_fn(is_access)).boxed());
    }
    let inner = Inner {
        filter: filter_handle,
        filter_text: Mutex::new(config.level.trim().to_owned()),
        node,
        dropped: outputs.dropped,
        guards: Mutex::new(outputs.guards),
    };
    Ok((layers, LogHandle { inner: Arc::new(inner) }))
}

fn line_layer(config: &LogConfig, node: &NodeName, writer: NonBlocking) -> BoxedLayer {
    let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(writer);
    match config.format {
        LogFormat::Text => layer.event_format(TextLines::new(node.clone())).boxed(),
        LogFormat::Json => layer.json().event_format(JsonLines::new(node.clone())).boxed(),
    }
}

/// The writers' threads.
#[derive(Default)]
struct Outputs {
    dropped: Vec<ErrorCounter>,
    guards: Vec<WorkerGuard>,
}

impl Outputs {
    /// `<directory>/<stem>.log`, or stderr without a directory.
    fn open(&mut self, config: &LogConfig, stem: &'static str) -> Result<NonBlocking, TelemetryError> {
        let builder = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(QUEUED_LINES)
            .thread_name(stem);
        let (writer, guard) = match &config.directory {
            None => builder.finish(io::stderr()),
            Some(directory) => builder.finish(open_file(directory, stem, config)?),
        };
        self.dropped.push(writer.error_counter());
        self.guards.push(guard);
        Ok(writer)
    }
}

fn open_file(directory: &Path, stem: &'static str, config: &LogConfig) -> Result<RotatingFile, TelemetryError> {
    RotatingFile::open(directory, stem, config.rotation, config.keep_files).map_err(|source| TelemetryError::Directory {
        directory: directory.display().to_string(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LogRotation;

    fn config(directory: &Path, format: LogFormat) -> LogConfig {
        LogConfig {
            level: "info".to_owned(),
            format,
            directory: Some(directory.to_owned()),
            rotation: LogRotation::default(),
            keep_files: 1,
            access_log: true,
        }
    }

    /// Logs `emit` into files and returns (metcd.log, access.log).
    fn logged(format: LogFormat, emit: impl FnOnce(&LogHandle)) -> (String, String) {
        let directory = tempfile::tempdir().expect("tempdir");
        let (layers, handle) = layers(&config(directory.path(), format), "node7").expect("layers");
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layers), || emit(&handle));
        handle.close();
        let read = |name: &str| std::fs::read_to_string(directory.path().join(name)).expect(name);
        (read("metcd.log"), read("access.log"))
    }

    #[test]
    fn every_line_names_the_node_and_requests_are_apart() {
        let (log, access) = logged(LogFormat::Text, |handle| {
            tracing::info!(answer = 42, "started");
            tracing::info!(target: ACCESS_TARGET, status = 204, "PUT /a");
            handle.set_node("node9");
            tracing::warn!("renamed");
        });
        let lines: Vec<&str> = log.lines().collect();
        assert_eq!(lines.len(), 2, "{log}");
        assert!(
            lines[0].contains("node7") && lines[0].contains("started") && lines[0].contains("answer=42"),
            "{log}"
        );
        assert!(lines[1].contains("node9") && lines[1].contains("renamed"), "{log}");
        assert!(
            access.lines().count() == 1 && access.contains("PUT /a") && access.contains("status=204"),
            "{access}"
        );
    }

    #[test]
    fn json_lines_are_json_and_name_the_node() {
        let (log, access) = logged(LogFormat::Json, |_| {
            tracing::info!(answer = 42, "started");
            tracing::info!(target: ACCESS_TARGET, status = 204, "PUT /a");
        });
        for (text, message) in [(log, "started"), (access, "PUT /a")] {
            let line: serde_json::Value = serde_json::from_str(text.trim()).expect("one JSON object");
            assert_eq!(line["node"], "node7");
            assert_eq!(line["fields"]["message"], message);
        }
    }

    #[test]
    fn the_filter_changes_at_run_time_and_a_bad_one_changes_nothing() {
        let (log, access) = logged(LogFormat::Text, |handle| {
            tracing::debug!("hidden");
            handle.set_filter("debug").expect("a level");
            tracing::debug!("shown");
            assert!(handle.set_filter("debgu").is_err_and(|e| e.contains("debug")));
            assert_eq!(handle.filter(), "debug");
            handle.set_filter("off").expect("a level");
            tracing::error!("hidden too");
            tracing::info!(target: ACCESS_TARGET, "GET /a");
        });
        assert!(log.lines().count() == 1 && log.contains("shown"), "{log}");
        assert!(access.contains("GET /a"), "the filter does not touch the access log");
    }
}
