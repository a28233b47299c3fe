//! What `GET /metrics` shows: requests as they were counted, the node and the store as they are at the scrape.
//!
//! Counting is a few relaxed atomic additions: arrays by route and status, no locks and no maps on the way of a request.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::StatusCode;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::App;
use super::route::Route;
use crate::node::{Histogram, HistogramView, PeerProgress, Role};
use crate::transport::{LaneMetrics, PeerMetrics};

const ROUTES: usize = Route::ALL.len();
/// The statuses this server gives; any other is counted as the last, 0.
const STATUSES: [u16; 23] = [
    200, 201, 202, 204, 304, 400, 403, 404, 405, 408, 409, 410, 412, 413, 414, 422, 429, 431, 500, 503, 504, 507, 0,
];
/// The counters of all routes.
pub(super) struct Metrics([RouteMetrics; ROUTES]);

#[derive(Default)]
struct RouteMetrics {
    by_status: [AtomicU64; STATUSES.len()],
    by_time: Histogram,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics(std::array::from_fn(|_| RouteMetrics::default()))
    }
}

impl Metrics {
    /// Counts an answer and the time to its head.
    pub(super) fn observe(&self, route: Route, status: StatusCode, took: Duration) {
        let status = STATUSES
            .iter()
            .position(|&known| known == status.as_u16())
            .unwrap_or(STATUSES.len() - 1);
        let route = &self.0[route as usize];
        route.by_status[status].fetch_add(1, Ordering::Relaxed);
        route.by_time.observe(took);
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
        let app = &*self.0;
        encode_build(app, &mut encoder)?;
        encode_requests(&app.metrics, &mut encoder)?;
        encode_durations(&app.metrics, &mut encoder)?;
        encode_node(app, &mut encoder)?;
        encode_peers(app, &mut encoder)?;
        for (name, help, value) in gauges(app) {
            ConstGauge::new(signed(value)).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        for (name, help, value) in counters(app) {
            ConstCounter::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        Ok(())
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn encode_build(app: &App, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let help = "Always 1; the labels say which build runs, on which engines";
    let labels = [
        ("version", env!("CARGO_PKG_VERSION")),
        ("wal", app.config.wal.engine.name()),
        ("store", app.config.store.backend.name()),
    ];
    let mut family = encoder.encode_descriptor("build_info", help, None, MetricType::Gauge)?;
    ConstGauge::new(1i64).encode(family.encode_family(&labels)?)
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
        let counted = metrics.0[route as usize].by_time.view();
        if counted.count > 0 {
            encode_histogram(family.encode_family(&[("route", route.template())])?, &counted)?;
        }
    }
    Ok(())
}

fn encode_histogram(mut encoder: MetricEncoder<'_>, view: &HistogramView) -> Result<(), fmt::Error> {
    encoder.encode_histogram::<NoLabelSet>(view.sum_seconds, view.count, &view.buckets, None)
}

/// What the threads of the node took their time for.
fn encode_node(app: &App, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    let shared = app.node.shared();
    let (wal, node) = (&shared.wal_metrics, &shared.metrics);
    for (name, help, histogram) in [
        (
            "wal_append_duration_seconds",
            "Time of a durable append to the write-ahead log: write and sync",
            &wal.appends,
        ),
        (
            "wal_sync_duration_seconds",
            "Time of the sync of an append (raft-engine, RocksDB: of the one call that writes and syncs)",
            &wal.syncs,
        ),
        (
            "apply_duration_seconds",
            "Time of a batch of committed entries in the state machine and the store",
            &node.applies,
        ),
    ] {
        encode_histogram(
            encoder.encode_descriptor(name, help, None, MetricType::Histogram)?,
            &histogram.view(),
        )?;
    }
    let help = "Time to write the state outside the log, to send a snapshot to a member, to install a received one";
    let mut family = encoder.encode_descriptor("snapshot_duration_seconds", help, None, MetricType::Histogram)?;
    for (kind, histogram) in [
        ("write", &node.snapshots_written),
        ("send", &node.snapshots_sent),
        ("install", &node.snapshots_installed),
    ] {
        encode_histogram(family.encode_family(&[("kind", kind)])?, &histogram.view())?;
    }
    Ok(())
}

/// The other members as this one sees them: as the leader their progress, and the queues to them.
fn encode_peers(app: &App, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    type Figure<'a> = (&'static str, &'static str, &'a dyn Fn(&PeerProgress) -> u64);
    let status = app.node.status();
    let progress = status.peers.iter().filter(|peer| peer.id != status.id);
    let of_peers: [Figure<'_>; 3] = [
        ("peer_match_index", "On the leader: highest index in a member's log", &|peer| {
            peer.match_index
        }),
        (
            "peer_lag_entries",
            "On the leader: entries that a member's log is behind",
            &|peer| status.last_index.saturating_sub(peer.match_index),
        ),
        (
            "peer_active",
            "On the leader: 1 if a member answered within the election timeout",
            &|peer| u64::from(peer.active),
        ),
    ];
    for (name, help, value) in of_peers {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for peer in progress.clone() {
            ConstGauge::new(signed(value(peer))).encode(family.encode_family(&[("id", peer.id.to_string())])?)?;
        }
    }
    encode_queues(&app.node.peer_queues(), encoder)
}

fn encode_queues(queues: &[PeerMetrics], encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
    /// Name, help, whether it is a counter, and its value.
    type Figure = (&'static str, &'static str, bool, fn(&LaneMetrics) -> u64);
    let figures: [Figure; 4] = [
        ("peer_queue_messages", "Messages that wait to be sent to a member", false, |lane| {
            lane.queued as u64
        }),
        ("peer_sent_bytes", "Bytes of messages sent to a member", true, |lane| lane.bytes),
        (
            "peer_dropped_messages",
            "Messages to a member dropped: its queue was full, or it was down",
            true,
            |lane| lane.dropped,
        ),
        ("peer_send_failures", "POSTs to a member that it did not take", true, |lane| {
            lane.failures
        }),
    ];
    for (name, help, is_counter, value) in figures {
        let kind = if is_counter { MetricType::Counter } else { MetricType::Gauge };
        let mut family = encoder.encode_descriptor(name, help, None, kind)?;
        for queue in queues {
            for (lane, metrics) in [("control", &queue.control), ("append", &queue.append)] {
                let labels = [("id", queue.peer.to_string()), ("lane", lane.to_owned())];
                let encoder = family.encode_family(&labels)?;
                if is_counter {
                    ConstCounter::new(value(metrics)).encode(encoder)?;
                } else {
                    ConstGauge::new(signed(value(metrics))).encode(encoder)?;
                }
            }
        }
    }
    Ok(())
}

type Row = (&'static str, &'static str, u64);

fn gauges(app: &App) -> Vec<Row> {
    let mut rows = raft_gauges(app);
    rows.extend(store_gauges(app));
    rows.extend([
        ("connections", "Open connections of clients", app.connections.view().open as u64),
        ("watchers", "Open watches and waits", app.watchers.load(Ordering::Relaxed) as u64),
        ("process_resident_bytes", "Resident memory of the process", resident_bytes()),
        ("uptime_seconds", "Seconds since the start", app.started.elapsed().as_secs()),
    ]);
    rows
}

fn raft_gauges(app: &App) -> Vec<Row> {
    let status = app.node.status();
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
    ]
}

fn store_gauges(app: &App) -> Vec<Row> {
    let reader = app.node.reader();
    let shared = app.node.shared();
    vec![
        ("store_bytes", "Logical bytes of keys, values and history", reader.logical_bytes()),
        (
            "store_limit_bytes",
            "limits.max_store_bytes: at so many logical bytes writes get 507; 0 is no limit",
            shared.max_store_bytes(),
        ),
        (
            "disk_full",
            "1 while writes get 507 because less than limits.min_free_disk is free",
            u64::from(shared.is_refusing_writes()),
        ),
        ("store_revision", "Current revision", reader.revision()),
        (
            "store_compacted_revision",
            "Revision below which history is gone",
            reader.compacted_revision(),
        ),
        ("leases", "Leases that are granted", reader.lease_count() as u64),
        (
            "idempotency_entries",
            "Idempotency keys that are remembered",
            reader.idempotency_len() as u64,
        ),
        (
            "idempotency_limit_entries",
            "idempotency.max_entries: with so many remembered a new one gets 429",
            app.config.idempotency.max_entries,
        ),
    ]
}

/// Resident memory of this process; 0 where the system does not say.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn counters(app: &App) -> Vec<Row> {
    let connections = app.connections.view();
    let shared = app.node.shared();
    let wal = &shared.wal_metrics;
    vec![
        (
            "http_slow_requests",
            "Requests that took more than 100 ms; waits and streams are not among them",
            app.slow.total(),
        ),
        (
            "raft_leader_changes",
            "How often another leader, or none, was known than before",
            shared.metrics.leader_changes.load(Ordering::Relaxed),
        ),
        ("wal_syncs", "Syncs of the write-ahead log since the start", wal.stats().syncs),
        (
            "wal_entries",
            "Entries appended to the write-ahead log since the start",
            wal.entries.load(Ordering::Relaxed),
        ),
        (
            "wal_entry_bytes",
            "Bytes of the entries appended to the write-ahead log since the start",
            wal.entry_bytes.load(Ordering::Relaxed),
        ),
        (
            "log_lines_dropped",
            "Log lines lost because the log's disk or pipe was too slow",
            app.log.as_ref().map_or(0, |log| log.dropped_lines()),
        ),
        ("connections_accepted", "Connections of clients served", connections.accepted),
        (
            "connections_turned_away",
            "Connections answered 429 because there were too many",
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
        let times = counted.by_time.view();
        assert_eq!((times.count, times.sum_seconds), (2, 100.000_07));
    }
}
