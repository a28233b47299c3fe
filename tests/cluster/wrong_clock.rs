//! A wall clock that a test sets wrong, of one member: libfaketime, which leaves the monotonic clock as it is.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::harness::Cluster;

pub struct WallClock {
    /// Read again whenever the member asks for the time.
    offset: PathBuf,
}

/// Where Debian's package has it, whatever the architecture: the one for programs with threads.
fn library() -> Option<PathBuf> {
    let architectures = std::fs::read_dir("/usr/lib").ok()?;
    let below = |directory: std::fs::DirEntry| directory.path().join("faketime/libfaketimeMT.so.1");
    architectures.flatten().map(below).find(|library| library.exists())
}

impl WallClock {
    /// Of a member that must not run yet, and is right for now; or `None` where there is no libfaketime.
    pub fn of(cluster: &mut Cluster, id: u64) -> Option<WallClock> {
        let Some(library) = library() else {
            // Written past the harness, which shows nothing of a test that passes.
            let _ = std::io::stderr()
                .write_all(b"!!! NOT TESTED: a wrong wall clock. It takes libfaketime: install it, e.g. apt-get install libfaketime\n");
            return None;
        };
        let clock = WallClock {
            offset: cluster.dir().join(format!("clock{id}")),
        };
        clock.set("+0d");
        let node = cluster.node(id);
        node.add_env("LD_PRELOAD", library);
        node.add_env("FAKETIME_TIMESTAMP_FILE", &clock.offset);
        node.add_env("FAKETIME_NO_CACHE", "1");
        // Two names of one switch: of newer and of older versions.
        node.add_env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        node.add_env("DONT_FAKE_MONOTONIC", "1");
        Some(clock)
    }

    /// How far it is off, e.g. `+366d`.
    pub fn set(&self, offset: &str) {
        // As a whole: it may be read at any moment.
        let whole: &Path = &self.offset.with_extension("new");
        std::fs::write(whole, offset).unwrap();
        std::fs::rename(whole, &self.offset).unwrap();
    }
}
