//! Rule 4, as the kernel sees it: what is renamed was synced before, under its old name, and its directory is synced afterwards; and the name
//! of everything that is there when the first write is answered is durable by an fsync of the directory that holds it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::traced::{Call, Place, SOON, calls};

const TRACED: &str = "trace=openat,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,fsync,fdatasync,\
                      write,writev,pwrite64,pwritev,ftruncate,fallocate,sendto,sendmsg";
const WRITES: [&str; 6] = ["write", "writev", "pwrite64", "pwritev", "ftruncate", "fallocate"];
/// What only an acknowledged write is answered with.
const ACKNOWLEDGED: &str = "HTTP/1.1 201";

/// Files whose names need not survive, and why.
fn may_vanish(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    // Locked, never read: made again when it is not there.
    let is_lock = name == "LOCK";
    // What RocksDB says of itself, for people.
    let is_rocksdbs_diary = name == "LOG" || name.starts_with("LOG.old");
    is_lock || is_rocksdbs_diary
}

/// What is known after some calls.
#[derive(Default)]
struct Seen {
    /// Every name that there is, and when it came.
    names: BTreeMap<PathBuf, usize>,
    /// When a file was last written to.
    written: BTreeMap<PathBuf, usize>,
    /// When the last sync that succeeded had begun.
    synced: BTreeMap<PathBuf, usize>,
    /// Renames whose directory is not synced yet.
    renamed: Vec<(usize, PathBuf)>,
    faults: Vec<String>,
}

impl Seen {
    fn is_synced_after(&self, path: &Path, moment: usize) -> bool {
        self.synced.get(path).is_some_and(|begun| *begun > moment)
    }

    fn take(&mut self, call: &Call) {
        let creates = call.is_one_of(&["creat", "mkdir", "mkdirat"]) || call.name() == "openat" && call.text.contains("O_CREAT");
        let paths = call.paths();
        if let (true, Some(path)) = (creates, paths.first()) {
            self.names.entry(path.to_path_buf()).or_insert(call.ended);
            if call.text.contains("O_TRUNC") {
                self.written.insert(path.to_path_buf(), call.ended);
            }
        } else if let (true, [from, to]) = (call.name().starts_with("rename"), &paths[..]) {
            let written = self.written.remove(*from).or(self.names.get(*from).copied()).unwrap_or_default();
            if !self.is_synced_after(from, written) {
                self.faults.push(format!("renamed before it was synced: {}", call.text));
            }
            self.names.remove(*from);
            self.names.insert(to.to_path_buf(), call.ended);
            self.renamed.push((call.ended, to.to_path_buf()));
        } else if let (true, Some(path)) = (call.is_one_of(&["unlink", "unlinkat", "rmdir"]), paths.first()) {
            self.names.remove(*path);
        } else if let (true, Some(file)) = (call.is_one_of(&["fsync", "fdatasync"]), call.file()) {
            self.synced.insert(file.to_owned(), call.begun);
            self.renamed
                .retain(|(renamed, to)| to.parent() != Some(file) || call.begun < *renamed);
        } else if let (true, Some(file)) = (call.is_one_of(&WRITES), call.file()) {
            self.written.insert(file.to_owned(), call.ended);
        }
    }

    /// Every name must be durable now.
    fn expect_durable_names(&mut self) {
        for (path, created) in &self.names {
            let parent = path.parent().unwrap_or(path);
            if !may_vanish(path) && !self.is_synced_after(parent, *created) {
                self.faults.push(format!(
                    "{} is there, and {} was not synced since",
                    path.display(),
                    parent.display()
                ));
            }
        }
        self.expect_durable_renames();
    }

    fn expect_durable_renames(&mut self) {
        for (_, to) in self.renamed.drain(..) {
            self.faults.push(format!("{} is a new name that was not synced", to.display()));
        }
    }
}

/// What in a trace, of files at and below `root`, breaks the rule. Names are looked at when the first write is acknowledged, which must happen.
fn faults(trace: &str, root: &Path) -> Vec<String> {
    let mut seen = Seen::default();
    let mut is_acknowledged = false;
    for call in calls(trace) {
        if !is_acknowledged && call.text.contains(ACKNOWLEDGED) {
            is_acknowledged = true;
            seen.expect_durable_names();
        }
        let is_below = |path: &&Path| path.starts_with(root) || Some(*path) == root.parent();
        let is_ours = call.paths().iter().any(is_below) || call.file().as_ref().is_some_and(is_below);
        if is_ours && call.succeeded() {
            seen.take(&call);
        }
    }
    seen.expect_durable_renames();
    if !is_acknowledged {
        seen.faults.push("no write was acknowledged".to_owned());
    }
    seen.faults
}

fn snapshots_written(trace: &str, root: &Path) -> usize {
    let dir = root.join("snapshots");
    let is_snapshot = |call: &&Call| call.name() == "rename" && call.succeeded() && call.paths().iter().all(|path| path.starts_with(&dir));
    calls(trace).iter().filter(is_snapshot).count()
}

/// A first start, and puts until there are so many snapshot files. The founding makes the first one.
fn every_name_is_durable(wal: &str, store: &str, snapshots: usize) {
    let place = Place::new();
    let serve = ["--wal", wal, "--store", store, "--set", "raft.snapshot_entries=20"];
    let traced = place.start(&serve, &["-e".to_owned(), TRACED.to_owned()]);
    let root = place.data();
    let deadline = Instant::now() + SOON;
    let mut puts = 0;
    loop {
        let answer = traced.request(&format!("PUT /k{puts}"), "v").expect("it serves");
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
        puts += 1;
        let trace = place.trace();
        let (written, faults) = (snapshots_written(&trace, &root), faults(&trace, &root));
        // A rename may be the last thing that there is yet.
        if written >= snapshots && faults.is_empty() {
            println!("{wal}, {store}: {written} snapshots, {} calls", calls(&trace).len());
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{written} snapshots after {puts} puts\n{}",
            faults.join("\n")
        );
    }
}

#[test]
fn rule_4_every_name_is_durable_with_sled_and_memory() {
    every_name_is_durable("sled", "memory", 3);
}

#[test]
fn rule_4_every_name_is_durable_with_raft_engine_and_sled() {
    every_name_is_durable("raft-engine", "sled", 3);
}

#[cfg(feature = "rocksdb")]
#[test]
fn rule_4_every_name_is_durable_with_rocksdb() {
    every_name_is_durable("rocksdb", "rocksdb", 1);
}

#[test]
fn this_test_notices_a_name_that_is_not_durable() {
    let root = Path::new("/p/data");
    let found = |lines: &[&str]| faults(&lines.join("\n"), root);
    let made = "7 mkdir(\"/p/data\", 0700) = 0";
    let parent = "7 fsync(9</p>) = 0";
    let opened = "7 openat(AT_FDCWD</x>, \"/p/data/f.tmp\", O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC, 0666) = 9</p/data/f.tmp>";
    let written = "7 write(9</p/data/f.tmp>, \"v\", 1) = 1";
    let file = "7 fsync(9</p/data/f.tmp>) = 0";
    let renamed = "7 rename(\"/p/data/f.tmp\", \"/p/data/f\") = 0";
    let dir = "7 fsync(9</p/data>) = 0";
    let answer = "8 writev(5<socket:[1]>, [{iov_base=\"HTTP/1.1 201 Created\"}], 1) = 50";
    assert_eq!(found(&[made, parent, opened, written, file, renamed, dir, answer]), [""; 0]);
    assert_eq!(found(&[made, parent]).len(), 1, "no answer");
    assert_eq!(found(&[made, answer, parent]).len(), 1, "the directory's own name");
    assert_eq!(found(&[made, parent, opened, written, file, answer, dir]).len(), 1, "a new file");
    assert_eq!(
        found(&[made, parent, opened, file, written, renamed, dir, answer]).len(),
        1,
        "written after its sync"
    );
    assert_eq!(
        found(&[made, parent, opened, written, renamed, dir, answer]).len(),
        1,
        "never synced"
    );
    let failed = "7 fsync(9</p/data/f.tmp>) = -1 EIO (Input/output error)";
    assert_eq!(
        found(&[made, parent, opened, written, failed, renamed, dir, answer]).len(),
        1,
        "not synced"
    );
    let late = [made, parent, opened, written, file, renamed, answer, dir];
    assert!(!found(&late).is_empty(), "the new name after the answer");
    let never = [made, parent, answer, opened, written, file, renamed];
    assert_eq!(found(&never).len(), 1, "a new name of later");
    let (begins, ends) = ("7 fsync(9</p/data> <unfinished ...>", "7 <... fsync resumed>) = 0");
    let early = [
        made,
        parent,
        opened,
        written,
        file,
        begins,
        "8 rename(\"/p/data/f.tmp\", \"/p/data/f\") = 0",
        ends,
        answer,
    ];
    assert!(!found(&early).is_empty(), "a sync that began before the rename");
    let gone = [made, parent, opened, "7 unlink(\"/p/data/f.tmp\") = 0", answer];
    assert_eq!(found(&gone), [""; 0], "what is gone need not be durable");
}
