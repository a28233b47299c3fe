//! Counting, and showing what was counted.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::super::output::Table;
use super::super::print;
use crate::cli::CliError;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Put,
    Get,
    /// The way of a change to a watcher.
    Watch,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::Watch => "watch",
        }
    }
}

/// Latencies, in microseconds, and results.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) latencies: BTreeMap<Kind, Latencies>,
    /// By status code, or by the message of the failed connection.
    results: BTreeMap<String, u64>,
    statuses: BTreeMap<u16, u64>,
    pub(super) succeeded: u64,
    pub(super) failed: u64,
    /// Only where it is counted.
    lateness: Option<Lateness>,
}

/// How far a load fell behind its own schedule.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lateness {
    /// Requests that began after they were due.
    pub(super) late: u64,
    /// By how much at most.
    pub(super) most: Duration,
    /// Those whose turn did not come at all.
    pub(super) never_begun: u64,
}

impl Lateness {
    /// One request that began so much after it was due.
    pub(super) fn note(&mut self, late: Duration) {
        self.late += 1;
        self.most = self.most.max(late);
    }
}

/// Microseconds: one minute and three digits, everything above counts as the highest.
#[derive(Debug, Clone)]
pub(super) struct Latencies(Histogram<u64>);

const HIGHEST: u64 = 60_000_000;
const QUANTILES: [(&str, f64); 8] = [
    ("p50", 0.5),
    ("p75", 0.75),
    ("p90", 0.9),
    ("p95", 0.95),
    ("p99", 0.99),
    ("p99.9", 0.999),
    ("p99.99", 0.9999),
    ("max", 1.0),
];

/// Of the table: before the quantiles, and those.
const COLUMNS: [&str; 13] = [
    "KIND",
    "REQUESTS",
    "PER SECOND",
    "MIN",
    "MEAN",
    "P50",
    "P75",
    "P90",
    "P95",
    "P99",
    "P99.9",
    "P99.99",
    "MAX",
];

impl Latencies {
    fn new() -> Option<Latencies> {
        Histogram::new_with_bounds(1, HIGHEST, 3).ok().map(Latencies)
    }

    fn record(&mut self, latency: Duration) {
        self.0
            .saturating_record(u64::try_from(latency.as_micros()).unwrap_or(HIGHEST).max(1));
    }
}

impl Tally {
    pub(super) fn new() -> Tally {
        Tally::default()
    }

    /// One answered or failed request. Failures have no latency.
    pub(super) fn note(&mut self, kind: Kind, result: Result<u16, String>, ok: bool, latency: Duration) {
        match result {
            Ok(status) => *self.statuses.entry(status).or_default() += 1,
            Err(cause) => *self.results.entry(cause).or_default() += 1,
        }
        if !ok {
            self.failed += 1;
            return;
        }
        self.succeeded += 1;
        if let Some(latencies) = self.latencies_of(kind) {
            latencies.record(latency);
        }
    }

    /// The record of the load's own lateness.
    pub(super) fn lateness(&mut self) -> &mut Lateness {
        self.lateness.get_or_insert_default()
    }

    fn latencies_of(&mut self, kind: Kind) -> Option<&mut Latencies> {
        match self.latencies.entry(kind) {
            Entry::Occupied(known) => Some(known.into_mut()),
            Entry::Vacant(new) => Some(new.insert(Latencies::new()?)),
        }
    }

    pub(super) fn add(&mut self, other: &Tally) {
        for (&kind, latencies) in &other.latencies {
            if let Some(own) = self.latencies_of(kind) {
                // Both have the same bounds.
                let _ = own.0.add(&latencies.0);
            }
        }
        for (&status, count) in &other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        for (cause, count) in &other.results {
            *self.results.entry(cause.clone()).or_default() += count;
        }
        self.succeeded += other.succeeded;
        self.failed += other.failed;
    }

    /// The commonest failure.
    pub(super) fn failure(&self) -> Option<String> {
        let statuses = self
            .statuses
            .iter()
            .filter(|(status, _)| **status >= 400)
            .map(|(status, count)| (count, format!("status {status}")));
        let causes = self.results.iter().map(|(cause, count)| (count, cause.clone()));
        statuses.chain(causes).max_by_key(|(count, _)| **count).map(|(_, what)| what)
    }

    /// For programs.
    pub(super) fn to_json(&self, seconds: f64) -> Value {
        let latencies: serde_json::Map<String, Value> = self
            .latencies
            .iter()
            .map(|(kind, Latencies(histogram))| {
                let mut of_kind = json!({"count": histogram.len(), "per_second": round(histogram.len() as f64 / seconds), "min": histogram.min(), "mean": round(histogram.mean())});
                for (name, quantile) in QUANTILES {
                    of_kind[name] = histogram.value_at_quantile(quantile).into();
                }
                (kind.name().to_owned(), of_kind)
            })
            .collect();
        let statuses: serde_json::Map<String, Value> = self
            .statuses
            .iter()
            .map(|(status, count)| (status.to_string(), (*count).into()))
            .collect();
        let mut report = json!({
            "seconds": round(seconds),
            "requests": self.succeeded,
            "failed": self.failed,
            "per_second": round(self.succeeded as f64 / seconds),
            "statuses": statuses,
            "connection_failures": self.results,
            "latency_us": latencies,
        });
        if let Some(Lateness { late, most, never_begun }) = self.lateness {
            report["begun_late"] = json!({"count": late, "max_us": most.as_micros() as u64, "never_begun": never_begun});
        }
        report
    }

    /// For eyes: a row for each kind of request, and one for each kind of failure if there are any.
    pub(super) fn print_tables(&self, seconds: f64) -> Result<(), CliError> {
        let mut table = Table::new(&COLUMNS);
        for (kind, Latencies(histogram)) in &self.latencies {
            let quantiles = QUANTILES.map(|(_, quantile)| time(histogram.value_at_quantile(quantile) as f64));
            let counts = [
                kind.name().to_owned(),
                histogram.len().to_string(),
                format!("{:.0}", histogram.len() as f64 / seconds),
                time(histogram.min() as f64),
                time(histogram.mean()),
            ];
            table.row(counts.into_iter().chain(quantiles));
        }
        table.print()?;
        let troubles = self.troubles();
        if troubles.is_empty() {
            return Ok(());
        }
        let mut table = Table::new(&["TROUBLE", "COUNT"]);
        for (what, count) in troubles {
            table.row([what, count.to_string()]);
        }
        print("\n")?;
        table.print()
    }

    /// What did not go as it should, and how often.
    fn troubles(&self) -> Vec<(String, u64)> {
        let refused = self.statuses.iter().filter(|(status, _)| **status >= 400);
        let refused = refused.map(|(status, count)| (format!("status {status}"), *count));
        let broken = self.results.iter().map(|(cause, count)| (cause.clone(), *count));
        let mut troubles: Vec<_> = refused.chain(broken).collect();
        if let Some(Lateness { late, most, never_begun }) = self.lateness {
            let most = time(most.as_micros() as f64);
            troubles.push((
                format!("begun late, by {most} at most: too much was under way, or this machine is too slow"),
                late,
            ));
            troubles.push(("never begun".to_owned(), never_begun));
        }
        troubles.retain(|(_, count)| *count > 0);
        troubles
    }

    /// For people.
    pub(super) fn to_text(&self, seconds: f64, bold: impl Fn(&str) -> String) -> String {
        let mut out = format!("{} requests in {seconds:.1} s, {} failed\n", self.succeeded, self.failed);
        out.push_str(&format!(
            "{}\n",
            bold(&format!("{:.0} requests/s", self.succeeded as f64 / seconds))
        ));
        for (what, count) in self.troubles() {
            out.push_str(&format!("  {what}: {count}\n"));
        }
        for (kind, Latencies(histogram)) in &self.latencies {
            let per_second = histogram.len() as f64 / seconds;
            let title = format!("{} latency", kind.name());
            out.push_str(&format!("\n{} ({} requests, {per_second:.0}/s)\n", bold(&title), histogram.len()));
            out.push_str(&format!(
                "  min {}   mean {}\n",
                time(histogram.min() as f64),
                time(histogram.mean())
            ));
            for (name, quantile) in QUANTILES {
                out.push_str(&format!("  {name:<7} {:>10}\n", time(histogram.value_at_quantile(quantile) as f64)));
            }
            out.push('\n');
            out.push_str(&draw(histogram));
        }
        out
    }
}

fn round(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

/// Microseconds in the unit that reads best.
pub(super) fn time(micros: f64) -> String {
    match micros {
        m if m < 1000.0 => format!("{m:.0} µs"),
        m if m < 1_000_000.0 => format!("{:.2} ms", m / 1000.0),
        m => format!("{:.2} s", m / 1_000_000.0),
    }
}

/// Bars over latencies that grow by half, from the first to the last that occurred.
fn draw(histogram: &Histogram<u64>) -> String {
    const WIDTH: f64 = 50.0;
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let mut buckets: Vec<(u64, u64)> = Vec::new();
    let (mut high, mut count) = (64, 0);
    for step in histogram.iter_recorded() {
        while step.value_iterated_to() > high {
            buckets.push((high, count));
            (high, count) = (high + high / 2, 0);
        }
        count += step.count_at_value();
    }
    buckets.push((high, count));
    let first = buckets.iter().position(|(_, count)| *count > 0).unwrap_or(0);
    let most = buckets.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    let mut out = String::new();
    for (high, count) in buckets.iter().skip(first) {
        let eighths = (*count as f64 / most as f64 * WIDTH * 8.0).ceil() as usize;
        let bar = "█".repeat(eighths / 8) + EIGHTHS.get(eighths % 8).copied().unwrap_or_default();
        let line = format!("  ≤ {:>9} {count:>9} {bar}", time(*high as f64));
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally() -> Tally {
        let mut tally = Tally::new();
        for micros in 1..=10_000 {
            tally.note(Kind::Put, Ok(204), true, Duration::from_micros(micros));
        }
        tally.note(Kind::Put, Ok(503), false, Duration::from_secs(5));
        tally.note(Kind::Put, Err("connection refused".to_owned()), false, Duration::ZERO);
        tally
    }

    #[test]
    fn percentiles_are_of_what_succeeded() {
        let mut sum = Tally::new();
        sum.add(&tally());
        let report = sum.to_json(2.0);
        assert_eq!((&report["requests"], &report["failed"]), (&10_000.into(), &2.into()));
        assert_eq!(report["per_second"], 5000.0);
        assert_eq!(report["statuses"], json!({"204": 10_000, "503": 1}));
        let put = &report["latency_us"]["put"];
        let p99 = put["p99"].as_u64().unwrap();
        assert!((9890..=9910).contains(&p99) && put["p99.99"].as_u64().unwrap() >= 9990, "{put}");
    }

    #[test]
    fn the_histogram_shows_every_request_once() {
        let tally = tally();
        let text = draw(&tally.latencies[&Kind::Put].0);
        let counts: u64 = text
            .lines()
            .map(|line| line.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap())
            .sum();
        assert_eq!(counts, 10_000, "{text}");
        assert!(text.contains('█'));
    }

    #[test]
    fn an_empty_measurement_has_a_report() {
        assert!(Tally::new().to_text(1.0, str::to_owned).starts_with("0 requests"));
        assert_eq!(tally().failure().unwrap(), "connection refused");
    }

    #[test]
    fn the_table_has_a_column_for_every_quantile() {
        let names = QUANTILES.map(|(name, _)| name.to_uppercase());
        assert_eq!(COLUMNS[5..], names);
    }

    #[test]
    fn lateness_is_told_where_there_was_any() {
        let mut tally = tally();
        *tally.lateness() = Lateness::default();
        assert!(!tally.to_text(1.0, str::to_owned).contains("begun late"));
        assert_eq!(tally.to_json(1.0)["begun_late"], json!({"count": 0, "max_us": 0, "never_begun": 0}));
        tally.lateness().note(Duration::from_millis(340));
        let text = tally.to_text(1.0, str::to_owned);
        assert!(
            text.contains("begun late, by 340.00 ms at most") && !text.contains("never begun"),
            "{text}"
        );
    }

    #[test]
    fn times_read_well() {
        assert_eq!(
            (time(999.0), time(1500.0), time(2_500_000.0)),
            ("999 µs".into(), "1.50 ms".into(), "2.50 s".into())
        );
    }
}
