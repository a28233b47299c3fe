use super::*;
use crate::config::{self, StoreBackend, WalEngine};

fn config(path: &Path) -> Config {
    let mut config = Config::default();
    config.node.data_dir = path.to_owned();
    config
}

/// A directory that belongs to member 1 of cluster 17.
fn founded(path: &Path) {
    DataDir::open(&config(path)).expect("open").set_cluster(17, 1).expect("set_cluster");
}

/// How often it was started.
fn started(dir: &DataDir) -> u64 {
    dir.boot() >> 16
}

fn refusal(config: &Config) -> String {
    DataDir::open(config).expect_err("must be refused").to_string()
}

#[test]
fn a_directory_keeps_its_identity_and_counts_its_starts() {
    let root = tempfile::tempdir().expect("tempdir");
    let path = root.path().join("new/data");
    let first = DataDir::open(&config(&path)).expect("open");
    assert!(first.is_new() && started(&first) == 1 && first.node_id() == Some(1));
    let incarnation = first.identity().incarnation;
    drop(first);
    founded(&path);
    let third = DataDir::open(&config(&path)).expect("open");
    assert!(!third.is_new());
    assert_eq!(
        (started(&third), third.identity().incarnation, third.identity().cluster_id),
        (3, incarnation, Some(17))
    );
}

#[test]
fn the_directory_of_a_removed_member_is_refused_by_name() {
    let root = tempfile::tempdir().expect("tempdir");
    founded(root.path());
    let opened = DataDir::open(&config(root.path())).expect("open");
    let starts = started(&opened);
    opened.note_departure().expect("noted");
    drop(opened);
    let refused = refusal(&config(root.path()));
    assert!(refused.contains("member 1, which was removed"), "{refused}");
    let offline = DataDir::open_offline(root.path()).expect("a tool may still look at it");
    assert_eq!(started(&offline), starts, "no start was counted");
}

#[test]
fn a_directory_that_was_found_to_lack_something_is_refused_by_name() {
    let root = tempfile::tempdir().expect("tempdir");
    founded(root.path());
    let opened = DataDir::open(&config(root.path())).expect("open");
    opened.note_outdated().expect("noted");
    drop(opened);
    let refused = refusal(&config(root.path()));
    assert!(refused.contains("metcd member remove 1"), "{refused}");
}

#[test]
fn two_directories_have_different_incarnations() {
    let (a, b) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    let draw = |path: &Path| DataDir::open(&config(path)).expect("open").identity().incarnation;
    assert_ne!(draw(a.path()), draw(b.path()));
}

#[test]
fn one_process_at_a_time_and_the_other_is_named() {
    let root = tempfile::tempdir().expect("tempdir");
    let held = DataDir::open(&config(root.path())).expect("open");
    let refused = refusal(&config(root.path()));
    assert!(refused.contains(&format!("in use by process {}", std::process::id())), "{refused}");
    drop(held);
    assert_eq!(
        started(&DataDir::open(&config(root.path())).expect("open again")),
        2,
        "a refused start is not counted"
    );
}

#[test]
fn a_new_directory_follows_the_configuration_until_it_has_a_cluster() {
    let root = tempfile::tempdir().expect("tempdir");
    drop(DataDir::open(&config(root.path())).expect("open"));
    let mut other = config(root.path());
    (other.cluster.name, other.node.id) = ("other".to_owned(), None);
    let mut reopened = DataDir::open(&other).expect("open");
    assert_eq!((reopened.identity().cluster_name.as_str(), reopened.node_id()), ("other", None));
    reopened.set_cluster(u64::MAX, 4).expect("set_cluster");
    assert!(reopened.set_cluster(u64::MAX, 4).is_ok(), "the same again");
    assert!(
        reopened
            .set_cluster(1, 4)
            .is_err_and(|e| e.to_string().contains("cluster id ffffffffffffffff"))
    );
    assert!(
        reopened
            .set_cluster(u64::MAX, 5)
            .is_err_and(|e| e.to_string().contains("node id 4"))
    );
    drop(reopened);
    let joined = DataDir::open(&other).expect("open");
    assert_eq!((joined.node_id(), joined.identity().cluster_id), (Some(4), Some(u64::MAX)));
}

#[test]
fn a_member_that_joined_is_not_bound_to_a_name_that_nobody_confirmed() {
    let root = tempfile::tempdir().expect("tempdir");
    let mut joining = config(root.path());
    joining.cluster.name = "mistyped".to_owned();
    joining.cluster.join = vec!["http://127.0.0.1:3379".to_owned()];
    DataDir::open(&joining).expect("open").set_cluster(7, 4).expect("set_cluster");
    let mut later = config(root.path());
    later.node.id = Some(4);
    assert_eq!(DataDir::open(&later).expect("open again").identity().cluster_id, Some(7));
}

#[test]
fn what_belongs_to_another_is_refused_with_the_reason() {
    let root = tempfile::tempdir().expect("tempdir");
    founded(root.path());
    let refused = |change: fn(&mut Config)| {
        let mut changed = config(root.path());
        change(&mut changed);
        refusal(&changed)
    };
    assert!(refused(|c| c.cluster.name = "other".to_owned()).contains("a cluster named \"metcd\", the configuration says \"other\""));
    assert!(refused(|c| (c.node.id, c.node.id_is_given) = (Some(2), true)).contains("node id 1, the configuration says 2"));
    assert!(refused(|c| c.wal.engine = WalEngine::RaftEngine).contains("the WAL engine sled, the configuration says raft-engine"));
    assert!(refused(|c| c.store.backend = StoreBackend::Sled).contains("the store backend memory, the configuration says sled"));
    let mut unsaid = config(root.path());
    (unsaid.node.id, unsaid.node.id_is_given) = (Some(9), false);
    assert_eq!(DataDir::open(&unsaid).expect("an id nobody gave does not count").node_id(), Some(1));
}

#[test]
fn founding_members_are_ignored_where_data_is() {
    let root = tempfile::tempdir().expect("tempdir");
    let load = || {
        let flags = [
            ("node.id", "1".to_owned()),
            ("node.data_dir", root.path().display().to_string()),
            ("cluster.members", "2=http://127.0.0.1:2,3=http://127.0.0.1:3".to_owned()),
        ];
        let flags = flags.map(|(key, value)| config::Flag {
            path: key.to_owned(),
            value: config::FlagValue::Text(value),
            origin: key.to_owned(),
        });
        let flags = flags.to_vec();
        config::load(&config::Sources {
            flags,
            ..config::Sources::default()
        })
    };
    assert!(load().is_err_and(|error| error.to_string().contains("is not in cluster.members")));
    founded(root.path());
    let loaded = load().expect("whom the cluster was founded by does not matter any more");
    assert_eq!(DataDir::open(&loaded.config).expect("open").node_id(), Some(1));
}

#[test]
fn a_foreign_directory_is_refused_untouched_and_says_what_it_holds() {
    let root = tempfile::tempdir().expect("tempdir");
    for name in ["d.jpg", "a.jpg", "c.jpg", "b.jpg"] {
        fs::write(root.path().join(name), "photograph").expect("write");
    }
    let refused = refusal(&config(root.path()));
    assert!(
        refused.contains("it holds a.jpg, b.jpg, c.jpg and 1 more and no identity.toml"),
        "{refused}"
    );
    assert_eq!(fs::read_dir(root.path()).expect("read_dir").count(), 4, "nothing was added");
    assert!(DataDir::open_offline(root.path()).is_err_and(|e| e.to_string().contains("not the data directory of a member")));
}

#[test]
fn leftovers_of_a_first_start_and_own_logs_are_not_foreign() {
    let root = tempfile::tempdir().expect("tempdir");
    for name in ["LOCK", "identity.toml.tmp"] {
        fs::write(root.path().join(name), "").expect("write");
    }
    for name in ["lost+found", "logs"] {
        fs::create_dir(root.path().join(name)).expect("mkdir");
    }
    assert!(refusal(&config(root.path())).contains("it holds logs and"));
    let mut with_logs = config(root.path());
    with_logs.log.directory = Some(root.path().join("logs"));
    assert!(DataDir::open(&with_logs).is_ok());
}

#[test]
fn every_flipped_bit_of_the_identity_is_noticed() {
    let root = tempfile::tempdir().expect("tempdir");
    founded(root.path());
    for name in ["identity.toml", "boot"] {
        let path = root.path().join(name);
        let good = fs::read(&path).expect("read");
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &bad).expect("write");
            assert!(DataDir::open(&config(root.path())).is_err(), "{name} bit {bit}");
        }
        fs::write(&path, &good).expect("write");
    }
    assert!(DataDir::open(&config(root.path())).is_ok());
}

#[test]
fn a_newer_format_and_a_missing_boot_count_are_refused() {
    let root = tempfile::tempdir().expect("tempdir");
    founded(root.path());
    let path = root.path().join("identity.toml");
    let good = fs::read_to_string(&path).expect("read");
    fs::write(&path, good.replace("format = 1", "format = 2")).expect("write");
    let refused = refusal(&config(root.path()));
    assert!(refused.contains("has format 2, this program knows formats up to 1"), "{refused}");
    fs::write(&path, good).expect("write");
    fs::remove_file(root.path().join("boot")).expect("remove");
    assert!(refusal(&config(root.path())).contains("boot is damaged (it is missing)"));
}

#[test]
fn the_next_starts_of_two_copies_of_a_directory_are_told_apart() {
    let (root, copy) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    founded(root.path());
    for name in ["identity.toml", "boot"] {
        fs::copy(root.path().join(name), copy.path().join(name)).expect("copy");
    }
    // One of 65,536 pairs has the same salt; three in a row do not.
    let boots = || [&root, &copy].map(|dir| DataDir::open(&config(dir.path())).expect("open").boot());
    let pairs = [boots(), boots(), boots()];
    assert!(pairs.iter().any(|[a, b]| is_outdated(*a, *b) && is_outdated(*b, *a)), "{pairs:?}");
    assert!(pairs.iter().all(|[a, b]| a >> 16 == b >> 16), "{pairs:?}");
}

#[test]
fn a_tool_opens_what_a_member_left_and_counts_nothing() {
    let root = tempfile::tempdir().expect("tempdir");
    founded(root.path());
    let tool = DataDir::open_offline(root.path()).expect("open_offline");
    assert_eq!((started(&tool), tool.node_id()), (1, Some(1)));
    assert!(refusal(&config(root.path())).contains("in use"));
    drop(tool);
    assert_eq!(started(&DataDir::open(&config(root.path())).expect("open")), 2);
}

#[test]
fn founders_agree_on_the_cluster_id_and_others_differ() {
    let member = |id: u64, url: &str| FoundingMember {
        id,
        peer_url: url.to_owned(),
    };
    let (a, b) = (member(1, "http://a:1"), member(2, "http://b:1"));
    let id = founding_cluster_id("metcd", &[a.clone(), b.clone()]);
    assert_eq!(id, founding_cluster_id("metcd", &[b.clone(), a.clone()]));
    assert_ne!(id, founding_cluster_id("other", &[a.clone(), b.clone()]));
    assert_ne!(id, founding_cluster_id("metcd", std::slice::from_ref(&a)));
    assert_ne!(id, founding_cluster_id("metcd", &[a, member(2, "http://c:1")]));
}
