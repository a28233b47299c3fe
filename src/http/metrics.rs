//! What `GET /metrics` shows: requests as they were counted, the node and the store as they are at the scrape.
//!
//! Counting is a few relaxed atomic additions: arrays by route and status, no locks and no maps on the way of a request.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::StatusCode;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::App;
use super::route::Route;
use crate::node::{Role, WAL_BUCKETS_US, WalMetrics};

const ROUTES: usize = Route::ALL.len();
/// The statuses this server gives; any other is counted as the last, 0.
const STATUSES: [u16; 23] = [
    200, 201, 202, 204, 304, 400, 403, 404, 405, 408, 409, 410, 412, 413, 414, 422, 429, 431, 500, 503, 504, 507, 0,
];
/// Upper bounds in microseconds; one more bucket takes the rest.
const BOUNDS_MICROS: [u64; 16] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 10_000_000,
];

/// The counters of all routes.
pub(super) struct Metrics([RouteMetrics; ROUTES]);

#[derive(Default)]
struct RouteMetrics {
    by_status: [AtomicU64; STATUSES.len()],
    by_time: [AtomicU64; BOUNDS_MICROS.len() + 1],
    total_micros: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics(std::array::from_fn(|_| RouteMetrics::default()))
    }
}

impl Metrics {
    /// Counts an answer and the time to its head.
    pub(super) fn observe(&self, route: Route, status: StatusCode, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let status = STATUSES
            .iter()
            .position(|&known| known == status.as_u16())
            .unwrap_or(STATUSES.len() - 1);
        let bucket = BOUNDS_MICROS
            .iter()
            .position(|&bound| micros <= bound)
            .unwrap_or(BOUNDS_MICROS.len());
        let route = &self.0[route as usize];
        route.by_status[status].fetch_add(1, Ordering::Relaxed);
        route.by_time[bucket].fetch_add(1, Ordering::Relaxed);
        route.total_micros.fetch_add(micros, Ordering::Relaxed);
    }
}

/// The text of a scrape, in the OpenMetrics format.
pub(super) fn scrape(app: &Arc<App>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("metcd");
    registry.register_collector(Box::new(Scrape(app.clone())));
    let mut page = String::with_capacity(16 << 10);
    text::encode(&mut page, &registry)?;
    Ok(page)
}

/// The same page in Prometheus' older text format, in which a counter's `# HELP` and `# TYPE` carry the `_total` of its samples, and
/// the end has no mark.
pub(super) fn plain(page: &str) -> String {
    let is_counter = |name: &str| page.contains(&format!("# TYPE {name} counter\n"));
    let mut text = String::with_capacity(page.len() + 256);
    for line in page.lines().filter(|line| *line != "# EOF") {
        let described = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE "));
        let name = described.and_then(|rest| rest.split(' ').next());
        match name.filter(|name| is_counter(name)) {
            Some(name) => text.push_str(&line.replacen(name, &format!("{name}_total"), 1)),
            None => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

struct Scrape(Arc<App>);

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encode_requests(&self.0.metrics, &mut encoder)?;
        encode_durations(&self.0.metrics, &mut encoder)?;
        encode_appends(&self.0.node.shared().wal_metrics, &mut encoder)?;
        for (name, help, value) in gauges(&self.0) {
            ConstGauge::new(signed(value)).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        for (name, help, value) in counters(&self.0) {
            ConstCounter::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        let members = self.0.node.status().peers;
        let mut behind = encoder.encode_descriptor(
            "peer_match_index",
            "On the leader: highest index in a member's log",
            None,
            MetricType::Gauge,
        )?;
        for peer in members {
            ConstGauge::new(signed(peer.match_index)).encode(behind.encode_family(&[("id", peer.id.to_string())])?)?;
        }
        Ok(())
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn encode_requests(metrics: &Metrics, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor("http_requests", "Requests answered, by route and status", None, MetricType::Counter)?;
    for route in Route::ALL {
        for (status, count) in STATUSES.iter().zip(&metrics.0[route as usize].by_status) {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                let labels = [("route", route.template().to_owned()), ("status", status.to_string())];
                ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
    }
    Ok(())
}

fn encode_durations(metrics: &Metrics, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let help = "Time from a request's head to the head of its answer";
    let mut family = encoder.encode_descriptor("http_request_duration_seconds", help, None, MetricType::Histogram)?;
    for route in Route::ALL {
        let counted = &metrics.0[route as usize];
        let bounds = BOUNDS_MICROS.iter().map(|&micros| micros as f64 / 1e6).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds
            .zip(&counted.by_time)
            .map(|(bound, count)| (bound, count.load(Ordering::Relaxed)))
            .collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        if count > 0 {
            let sum = counted.total_micros.load(Ordering::Relaxed) as f64 / 1e6;
            family
                .encode_family(&[("route", route.template())])?
                .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
    }
    Ok(())
}

fn encode_appends(wal: &WalMetrics, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let bounds = WAL_BUCKETS_US.iter().map(|&micros| micros as f64 / 1e6).chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds
        .zip(&wal.append_buckets)
        .map(|(bound, count)| (bound, count.load(Ordering::Relaxed)))
        .collect();
    let count = buckets.iter().map(|(_, count)| count).sum();
    let sum = wal.append_us.load(Ordering::Relaxed) as f64 / 1e6;
    let help = "Time of a durable append to the write-ahead log";
    encoder
        .encode_descriptor("wal_append_duration_seconds", help, None, MetricType::Histogram)?
        .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
}

type Row = (&'static str, &'static str, u64);

fn gauges(app: &App) -> Vec<Row> {
    let status = app.node.status();
    let reader = app.node.reader();
    vec![
        ("raft_term", "Current term", status.term),
        ("raft_leader", "Id of the known leader, 0 if none", status.leader.unwrap_or(0)),
        ("raft_is_leader", "1 on the leader", u64::from(status.role == Role::Leader)),
        ("raft_commit_index", "Commit index", status.commit_index),
        ("raft_applied_index", "Applied index", status.applied_index),
        ("raft_last_index", "Last index in the log", status.last_index),
        (
            "proposals_pending",
            "Proposals that wait for their result on this member",
            status.proposals_pending as u64,
        ),
        ("ready", "1 if the member has a leader and is caught up", u64::from(status.ready)),
        (
            "quarantined",
            "1 while the member refuses to serve because its state differs",
            u64::from(status.quarantined.is_some()),
        ),
        ("wal_bytes", "Bytes of the write-ahead log on disk", status.wal_bytes),
        ("store_bytes", "Logical bytes of keys, values and history", reader.logical_bytes()),
        ("store_revision", "Current revision", reader.revision()),
        (
            "store_compacted_revision",
            "Revision below which history is gone",
            reader.compacted_revision(),
        ),
        ("leases", "Leases, those of `?ttl=` too", reader.lease_count() as u64),
        ("connections", "Open connections of clients", app.connections.view().open as u64),
        ("watchers", "Open watches and waits", app.watchers.load(Ordering::Relaxed) as u64),
        ("uptime_seconds", "Seconds since the start", app.started.elapsed().as_secs()),
    ]
}

fn counters(app: &App) -> Vec<Row> {
    let connections = app.connections.view();
    let wal = &app.node.shared().wal_metrics;
    vec![
        ("wal_syncs", "Syncs of the write-ahead log since the start", wal.stats().syncs),
        (
            "wal_entries",
            "Entries appended to the write-ahead log since the start",
            wal.entries.load(Ordering::Relaxed),
        ),
        ("connections_accepted", "Connections of clients served", connections.accepted),
        (
            "connections_turned_away",
            "Connections answered 503 because there were too many",
            connections.turned_away,
        ),
        (
            "connections_accept_errors",
            "Failures of accept that made the listener pause",
            connections.accept_errors,
        ),
        (
            "connections_head_timeouts",
            "Connections ended because a request head did not arrive in time",
            connections.head_timeouts,
        ),
        (
            "connections_write_timeouts",
            "Connections ended because their client did not take its answer",
            connections.write_timeouts,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_text_format_types_a_counter_by_the_name_of_its_samples() {
        let page = "# HELP a_b Bees.\n# TYPE a_b counter\na_b_total{x=\"1\"} 3\n# HELP a A.\n# TYPE a gauge\na 1\n# EOF\n";
        assert_eq!(
            plain(page),
            "# HELP a_b_total Bees.\n# TYPE a_b_total counter\na_b_total{x=\"1\"} 3\n# HELP a A.\n# TYPE a gauge\na 1\n"
        );
    }

    #[test]
    fn an_answer_is_counted_once_under_its_route_status_and_time() {
        let metrics = Metrics::default();
        metrics.observe(Route::Key, StatusCode::CREATED, Duration::from_micros(70));
        metrics.observe(Route::Key, StatusCode::IM_A_TEAPOT, Duration::from_secs(100));
        let counted = &metrics.0[Route::Key as usize];
        let loads = |counters: &[AtomicU64]| counters.iter().map(|counter| counter.load(Ordering::Relaxed)).collect::<Vec<_>>();
        assert_eq!(
            (loads(&counted.by_status)[1], loads(&counted.by_status)[STATUSES.len() - 1]),
            (1, 1)
        );
        assert_eq!((loads(&counted.by_time)[1], loads(&counted.by_time)[BOUNDS_MICROS.len()]), (1, 1));
        assert_eq!(counted.total_micros.load(Ordering::Relaxed), 100_000_070);
    }
}
