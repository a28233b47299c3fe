//! What `config/` has for Prometheus and Grafana: queries that are right, and ask for metrics that there are.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::Command;

use serde_json::Value;

use crate::observability::{names_in, repository};
use crate::promql::{is_duration, metrics_of};

const ALERTS: &str = "config/prometheus/alerts.yml";

/// The texts of all fields of this name.
fn fields(value: &Value, name: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(inner) => {
            found.extend(inner.get(name).and_then(Value::as_str).map(str::to_owned));
            inner.values().for_each(|field| fields(field, name, found));
        }
        Value::Array(elements) => elements.iter().for_each(|element| fields(element, name, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The dashboard's queries, with something for each of Grafana's variables.
fn dashboard() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&repository("config/grafana/metcd.json")).expect("the dashboard is JSON");
    let mut found = Vec::new();
    fields(&dashboard, "expr", &mut found);
    assert!(found.len() > 20, "{found:?}");
    let fill = |text: &String| {
        let text = text.replace("$__rate_interval", "5m").replace("$instance", "a:3379|b:3379");
        text.replace("$job", "metcd")
    };
    let filled: Vec<String> = found.iter().map(fill).collect();
    assert!(filled.iter().all(|text| !text.contains('$')), "another variable: {filled:?}");
    filled
}

/// The rules of the file as it is parsed.
fn rules() -> Vec<Value> {
    let file: Value = serde_norway::from_str(&repository(ALERTS)).expect("YAML");
    let groups = file["groups"].as_array().expect("groups");
    let rules = groups.iter().flat_map(|group| {
        assert!(group["name"].is_string(), "{group}");
        group["rules"].as_array().expect("rules").clone()
    });
    rules.collect()
}

fn expression(rule: &Value) -> String {
    rule["expr"].as_str().unwrap_or_else(|| panic!("{rule}")).to_owned()
}

/// docs/metrics.md has these names, and another test sees to it that a server shows them.
fn is_documented(name: &str, documented: &BTreeSet<String>) -> bool {
    let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
    documented.contains(name) || of_histogram.is_some_and(|base| documented.contains(base))
}

#[test]
fn dashboard_and_alerts_are_queries_for_metrics_that_are_documented() {
    let documented = names_in(&repository("docs/metrics.md"));
    let alerts = rules().iter().map(expression).collect::<Vec<_>>();
    for text in dashboard().into_iter().chain(alerts) {
        let asked = metrics_of(&text).unwrap_or_else(|why| panic!("{why}: {text}"));
        assert!(!asked.is_empty(), "{text}");
        for name in asked {
            // Prometheus makes `up` itself.
            assert!(name == "up" || is_documented(&name, &documented), "{name} in {text}");
        }
    }
    let dashboard: Value = serde_json::from_str(&repository("config/grafana/metcd.json")).unwrap();
    let mut variables = Vec::new();
    fields(&dashboard["templating"], "query", &mut variables);
    let asked = variables.iter().flat_map(|query| names_in(query)).collect::<Vec<_>>();
    assert!(
        !asked.is_empty() && asked.iter().all(|name| is_documented(name, &documented)),
        "{asked:?}"
    );
}

#[test]
fn every_alert_has_what_prometheus_takes_and_whoever_is_woken_needs() {
    let rules = rules();
    let mut names = Vec::new();
    for rule in &rules {
        for key in rule.as_object().expect("a rule").keys() {
            assert!(
                ["alert", "expr", "for", "labels", "annotations"].contains(&key.as_str()),
                "{key} in {rule}"
            );
        }
        names.push(rule["alert"].as_str().expect("a name"));
        assert!(rule["for"].is_null() || rule["for"].as_str().is_some_and(is_duration), "{rule}");
        let severity = rule["labels"]["severity"].as_str().unwrap_or_default();
        assert!(["info", "warning", "critical"].contains(&severity), "{rule}");
        for told in ["summary", "description"] {
            let told = rule["annotations"][told].as_str().unwrap_or_default();
            assert!(
                !told.is_empty() && told.matches("{{").count() == told.matches("}}").count(),
                "{rule}"
            );
        }
    }
    for alert in [
        "MetcdNoLeader",
        "MetcdSlowDisk",
        "MetcdPeerBehind",
        "MetcdDiskFull",
        "MetcdQuarantined",
    ] {
        assert!(names.contains(&alert), "{alert}");
    }
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), rules.len(), "each name once");
}

/// The dashboard's queries as rules of their own, since promtool reads no dashboards.
#[test]
fn promtool_takes_the_alerts_and_the_queries_of_the_dashboard() {
    let mut recorded = "groups:\n  - name: dashboard\n    rules:\n".to_owned();
    for (number, text) in dashboard().iter().enumerate() {
        // A string of JSON is one of YAML.
        let text = serde_json::to_string(text).unwrap();
        recorded.push_str(&format!("      - record: query:{number}\n        expr: {text}\n"));
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), recorded).unwrap();
    let alerts = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(ALERTS);
    let Ok(checked) = Command::new("promtool")
        .args(["check", "rules"])
        .args([file.path(), &alerts])
        .output()
    else {
        // Written past the harness, which shows nothing of a test that passes.
        let _ = writeln!(
            std::io::stderr(),
            "!!! NOT TESTED: what promtool says of config/prometheus and config/grafana. It is not here (package prometheus)"
        );
        return;
    };
    let said = [checked.stdout, checked.stderr].concat();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&said));
}
