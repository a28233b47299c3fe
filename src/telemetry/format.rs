//! Lines that begin with the node's name.

use std::fmt;
use std::sync::Arc;

use parking_lot::RwLock;
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{Format, FormatEvent, FormatFields, Full, Json, JsonFields, Writer};
use tracing_subscriber::registry::LookupSpan;

/// The node's name, which a joiner learns only later.
pub type NodeName = Arc<RwLock<String>>;

/// `node1 2026-11-21T00:15:00.123456Z  INFO metcd::server: message field=value`
pub struct TextLines {
    node: NodeName,
    rest: Format<Full>,
}

impl TextLines {
    /// Lines of `node`.
    pub fn new(node: NodeName) -> Self {
        Self {
            node,
            rest: Format::default(),
        }
    }
}

impl<S, N> FormatEvent<S, N> for TextLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        write!(writer, "{} ", self.node.read())?;
        self.rest.format_event(ctx, writer, event)
    }
}

/// `{"node":"node1","timestamp":…,"level":…,"fields":{…},"target":…}`
pub struct JsonLines {
    node: NodeName,
    rest: Format<Json>,
}

impl JsonLines {
    /// Lines of `node`.
    pub fn new(node: NodeName) -> Self {
        Self {
            node,
            rest: Format::default().json(),
        }
    }
}

impl<S> FormatEvent<S, JsonFields> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, JsonFields>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = String::new();
        self.rest.format_event(ctx, Writer::new(&mut line), event)?;
        let rest = line.strip_prefix('{').ok_or(fmt::Error)?;
        let node = serde_json::to_string(self.node.read().as_str()).map_err(|_| fmt::Error)?;
        write!(writer, "{{\"node\":{node},{rest}")
    }
}
