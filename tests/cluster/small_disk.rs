//! A file system that a test can fill: a tmpfs, for which it takes root.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;

use crate::harness::Cluster;

/// What is in the way.
pub const FILLER: &str = "filler";

pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// A small file system on the data directory of member 1, which must not run yet; or `None` where that is not allowed.
    pub fn mount(cluster: &mut Cluster, megabytes: u64) -> Option<SmallDisk> {
        let disk = cluster.node(1).data_dir.clone();
        std::fs::create_dir_all(&disk).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={megabytes}m"), "tmpfs"])
            .arg(&disk)
            .output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(SmallDisk(disk));
        }
        // Written past the harness, which shows nothing of a test that passes.
        let _ = std::io::stderr().write_all(
            b"!!! NOT TESTED: a full disk. It takes a tmpfs, so run this as root: sudo -E cargo test --test cluster full_disk\n",
        );
        None
    }

    fn free_bytes(&self) -> u64 {
        let free = rustix::fs::statvfs(&self.0).unwrap();
        free.f_bavail * free.f_frsize
    }

    /// Fills it up to the last `leave` bytes.
    pub fn fill(&self, leave: u64) {
        let path = self.0.join(FILLER);
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        let piece = vec![1; 64 << 10];
        while self.free_bytes() > leave {
            let wanted = (self.free_bytes() - leave).min(piece.len() as u64) as usize;
            if file.write(&piece[..wanted]).is_err() {
                return;
            }
        }
    }

    /// Takes away what [`fill`](Self::fill) put there.
    pub fn make_room(&self) {
        std::fs::remove_file(self.0.join(FILLER)).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: on a panic the member still runs.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
