//! What packages the program fits the program: paths, configuration, users. (scripts/package --try installs the real thing.)

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The instructions of the Dockerfile with their arguments, continued lines joined, comments left out.
fn instructions() -> Vec<(String, String)> {
    let text = read("Dockerfile");
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    let instructions = joined.lines().filter_map(|line| line.trim().split_once(' '));
    instructions.map(|(name, rest)| (name.to_owned(), rest.trim().to_owned())).collect()
}

fn assets() -> Vec<(String, String)> {
    let manifest: toml::Table = toml::from_str(&read("Cargo.toml")).expect("Cargo.toml");
    let assets = &manifest["package"]["metadata"]["deb"]["assets"];
    let part = |asset: &toml::Value, at: usize| asset[at].as_str().expect("a string").to_owned();
    let assets = assets.as_array().expect("a list");
    assets.iter().map(|asset| (part(asset, 0), part(asset, 1))).collect()
}

#[test]
fn the_packaged_configurations_are_accepted() {
    for file in ["packaging/metcd.toml", "packaging/docker.toml"] {
        let output = Command::new(env!("CARGO_BIN_EXE_metcd"))
            .env_clear()
            .args(["config", "check"])
            .arg(root().join(file))
            .output()
            .expect("runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{file}: {said}");
    }
}

#[test]
fn the_image_is_slim_not_root_and_asks_the_member_for_its_health() {
    let instructions = instructions();
    let known = [
        "FROM",
        "ARG",
        "RUN",
        "WORKDIR",
        "COPY",
        "LABEL",
        "USER",
        "VOLUME",
        "EXPOSE",
        "HEALTHCHECK",
        "STOPSIGNAL",
        "ENTRYPOINT",
        "CMD",
    ];
    assert!(
        instructions.iter().all(|(name, _)| known.contains(&name.as_str())),
        "{instructions:?}"
    );
    let last = |name: &str| instructions.iter().rfind(|(found, _)| found == name).map(|(_, rest)| rest.as_str());
    assert!(last("FROM").is_some_and(|image| image.ends_with("-slim")), "{:?}", last("FROM"));
    let user = last("USER").and_then(|user| user.split(':').next()?.parse::<u32>().ok());
    assert!(user.is_some_and(|id| id > 0), "{:?}", last("USER"));
    assert!(
        last("HEALTHCHECK").is_some_and(|check| check.contains("/livez")),
        "not a quorum read"
    );
    for name in ["ENTRYPOINT", "CMD"] {
        let words: Vec<String> = serde_json::from_str(last(name).expect(name)).expect("the form without a shell");
        assert!(!words.is_empty());
    }
}

#[test]
fn the_image_copies_what_is_there_and_not_ignored() {
    let ignore = read(".dockerignore");
    let sent: Vec<&str> = ignore.lines().filter_map(|line| line.strip_prefix('!')).collect();
    let copied = instructions()
        .into_iter()
        .filter(|(name, rest)| name == "COPY" && !rest.starts_with("--from"));
    for (_, rest) in copied {
        let source = rest.split(' ').next().expect("a source");
        assert!(root().join(source).exists(), "{source}");
        let is_sent = source == "." || sent.iter().any(|sent| Path::new(source).starts_with(sent));
        assert!(is_sent, "{source} is in .dockerignore");
    }
    for needed in ["Cargo.toml", "Cargo.lock", "src", "config", "benches"] {
        assert!(sent.contains(&needed), "the build reads {needed}");
    }
}

#[test]
fn unit_and_package_agree_on_their_paths() {
    let unit = read("packaging/metcd.service");
    let mut keys: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (key, value) in unit
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
    {
        keys.entry(key).or_default().push(value);
    }
    let assets = assets();
    let destinations: Vec<&str> = assets.iter().map(|(_, destination)| destination.as_str()).collect();
    for destination in ["usr/bin/", "etc/metcd/metcd.toml", "usr/lib/systemd/system/"] {
        assert!(destinations.contains(&destination), "{destination} in {destinations:?}");
    }
    assert_eq!(keys["ExecStart"], ["/usr/bin/metcd serve --config /etc/metcd/metcd.toml"]);
    assert_eq!((&keys["User"], &keys["StateDirectory"]), (&vec!["metcd"], &vec!["metcd"]));
    let config: toml::Table = toml::from_str(&read("packaging/metcd.toml")).expect("TOML");
    assert_eq!(config["node"]["data_dir"].as_str(), Some("/var/lib/metcd"));
    let postinst = read("packaging/debian/postinst");
    assert!(postinst.contains("adduser --system --group") && postinst.contains("/var/lib/metcd"));
    for (source, _) in assets.iter().filter(|(source, _)| !source.starts_with("target/")) {
        let path = root().join(source.trim_end_matches("*.md"));
        assert!(path.exists(), "{source}");
    }
}
