//! A block device with a volatile write cache, as a FUSE file under a loop device.
//!
//! The file is served from memory by a thread here, so it is known which writes a flush has covered. A power cut is a copy of what was flushed,
//! plus some of the writes after the last flush: none, all, the first few, or any of them, torn at a 512-byte sector. It can also fail: what
//! is written to files is refused for a while.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::Random;

const MAX_WRITE: usize = 128 * 1024;
const HEADER_BYTES: usize = 40;
const SECTOR_BYTES: usize = 512;
const EIO: i32 = 5;
const ENOSYS: i32 = 38;
/// Behind the file system's tables and its journal, which [`format`] puts in front of all files (but for the blocks of directories, which are
/// written seldom). A file system whose own writes fail takes no more of them, and shows nothing of what a program does with a failed sync.
const FILES_FROM: usize = 32 * 1024 * 1024;
/// For processes that were killed to be gone.
const PATIENCE: Duration = Duration::from_secs(60);

/// The device's memory.
pub struct Disk(Mutex<State>);

struct State {
    /// What reads see.
    current: Vec<u8>,
    /// What a flush covered.
    durable: Vec<u8>,
    /// Writes since the last flush.
    pending: Vec<(usize, Vec<u8>)>,
    flushes: u64,
    /// Writes to files are refused, or will be.
    failing: Failing,
    refused: u64,
    /// Where the last write ended; nothing continues a write before a flush.
    write_end: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Failing {
    No,
    /// From the next write on that does not continue the one before. The kernel hands a long write over in several, and its loop device takes
    /// one of which only the first were taken for done: it would be the disk that lied, which no log survives.
    Soon,
    Yes,
}

impl Disk {
    /// A disk with this content, all of it durable.
    pub fn new(content: Vec<u8>) -> Self {
        Self(Mutex::new(State {
            durable: content.clone(),
            current: content,
            pending: Vec::new(),
            flushes: 0,
            failing: Failing::No,
            refused: 0,
            write_end: None,
        }))
    }

    /// From now on, writes to files are refused, or taken again. Returns how many have been refused.
    pub fn fail(&self, fails: bool) -> u64 {
        let mut state = self.0.lock().unwrap();
        state.failing = if fails { Failing::Soon } else { Failing::No };
        state.refused
    }

    /// What a power cut at this moment leaves, and how many unflushed writes there were.
    pub fn cut(&self, random: &mut Random) -> (Vec<u8>, usize) {
        let state = self.0.lock().unwrap();
        let mut image = state.durable.clone();
        let count = state.pending.len();
        let kept: Vec<bool> = match random.below(4) {
            0 => vec![false; count],
            1 => vec![true; count],
            2 => {
                let first = random.below(count as u64 + 1) as usize;
                (0..count).map(|at| at < first).collect()
            }
            _ => (0..count).map(|_| random.below(2) == 0).collect(),
        };
        for (at, (offset, data)) in state.pending.iter().enumerate().filter(|(at, _)| kept[*at]) {
            let torn = at + 1 == count && random.below(2) == 0;
            let bytes = if torn {
                random.below((data.len() / SECTOR_BYTES) as u64 + 1) as usize * SECTOR_BYTES
            } else {
                data.len()
            };
            image[*offset..offset + bytes].copy_from_slice(&data[..bytes]);
        }
        (image, count)
    }

    /// Flushes the device has been asked for.
    pub fn flushes(&self) -> u64 {
        self.0.lock().unwrap().flushes
    }
}

/// A mounted file system; unmounted when dropped.
pub struct Mounted {
    pub dir: PathBuf,
    fuse: Option<PathBuf>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for path in std::iter::once(&self.dir).chain(&self.fuse) {
            // Processes that were killed hold their files until they are gone. And the process that serves the disk must not end before the file
            // system on it is unmounted: the kernel would wait for it for ever.
            let begun = Instant::now();
            let umount = || Command::new("umount").arg(path).stderr(Stdio::null()).status();
            while !umount().is_ok_and(|status| status.success()) {
                assert!(begun.elapsed() < PATIENCE, "umount {} fails", path.display());
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Mounts the ext4 of `disk` at `place/live`, through a FUSE file `place/disk` and a loop device.
pub fn mount(disk: &Arc<Disk>, place: &Path) -> io::Result<Mounted> {
    let (file, dir) = (place.join("disk"), place.join("live"));
    fs::write(&file, b"")?;
    fs::create_dir_all(&dir)?;
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let options = format!("fd=0,rootmode=100600,user_id=0,group_id=0,max_read={MAX_WRITE}");
    let mount = Command::new("mount")
        .args(["-i", "-n", "-t", "fuse", "-o", &options, "power-cut"])
        .arg(&file)
        .stdin(device.try_clone()?)
        .output()?;
    if !mount.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&mount.stderr).into_owned()));
    }
    let served = Arc::clone(disk);
    std::thread::spawn(move || serve(&served, device));
    mount_loop(&file, &dir)?;
    Ok(Mounted { dir, fuse: Some(file) })
}

/// Writes `image` to `place/cut.img` and mounts it at `place/cut`: the file system's own recovery runs.
pub fn mount_image(image: &[u8], place: &Path) -> io::Result<Mounted> {
    let (file, dir) = (place.join("cut.img"), place.join("cut"));
    write_sparse(image, &file)?;
    fs::create_dir_all(&dir)?;
    mount_loop(&file, &dir)?;
    Ok(Mounted { dir, fuse: None })
}

fn mount_loop(file: &Path, dir: &Path) -> io::Result<()> {
    let done = Command::new("mount")
        .args(["-t", "ext4", "-o", "loop"])
        .arg(file)
        .arg(dir)
        .stdin(Stdio::null())
        .output()?;
    if done.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&done.stderr).into_owned()))
    }
}

/// An empty ext4 of `bytes`.
pub fn format(bytes: u64, place: &Path) -> io::Result<Vec<u8>> {
    let file = place.join("new.img");
    File::create(&file)?.set_len(bytes)?;
    let done = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,packed_meta_blocks=1"])
        .arg(&file)
        .output()?;
    if !done.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&done.stderr).into_owned()));
    }
    let content = fs::read(&file)?;
    fs::remove_file(&file)?;
    Ok(content)
}

fn write_sparse(image: &[u8], path: &Path) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len(image.len() as u64)?;
    for (number, block) in image.chunks(64 * 1024).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, number as u64 * 64 * 1024)?;
        }
    }
    Ok(())
}

/// Answers the kernel until the file is unmounted.
fn serve(disk: &Disk, mut device: File) {
    let mut request = vec![0; MAX_WRITE + 4096];
    loop {
        let bytes = match device.read(&mut request) {
            Ok(bytes) if bytes >= HEADER_BYTES => bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // ENODEV: unmounted.
            _ => return,
        };
        let (header, body) = request[..bytes].split_at(HEADER_BYTES);
        let answer = match u32_at(header, 4) {
            // FORGET, BATCH_FORGET and INTERRUPT have no answer.
            2 | 42 | 36 => continue,
            opcode => disk.answer(opcode, body),
        };
        let (error, content) = match answer {
            Ok(content) => (0, content),
            Err(error) => (-error, Vec::new()),
        };
        let mut reply = ((16 + content.len()) as u32).to_le_bytes().to_vec();
        reply.extend_from_slice(&error.to_le_bytes());
        reply.extend_from_slice(&header[8..16]);
        reply.extend_from_slice(&content);
        // A request that was interrupted takes no answer.
        let _ = device.write(&reply);
    }
}

fn u32_at(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(raw[at..at + 4].try_into().unwrap())
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(raw[at..at + 8].try_into().unwrap())
}

impl Disk {
    /// The content of the answer to one FUSE request, or an errno.
    fn answer(&self, opcode: u32, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut state = self.0.lock().unwrap();
        match opcode {
            // GETATTR, SETATTR: one regular file.
            3 | 4 => Ok(attributes(state.current.len())),
            // OPEN; RELEASE, FLUSH, ACCESS, DESTROY: nothing to do.
            14 => Ok(vec![0; 16]),
            18 | 25 | 34 | 38 => Ok(Vec::new()),
            15 => {
                let (offset, bytes) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
                let end = (offset + bytes).min(state.current.len());
                Ok(state.current[offset.min(end)..end].to_vec())
            }
            16 => {
                let (offset, bytes) = (u64_at(body, 8) as usize, u32_at(body, 16) as usize);
                let continues = state.write_end.replace(offset + bytes) == Some(offset);
                if state.failing == Failing::Soon && !continues {
                    state.failing = Failing::Yes;
                }
                if state.failing == Failing::Yes && offset >= FILES_FROM {
                    state.refused += 1;
                    return Err(EIO);
                }
                let data = body[40..40 + bytes].to_vec();
                state.current[offset..offset + bytes].copy_from_slice(&data);
                state.pending.push((offset, data));
                Ok(((bytes as u64).to_le_bytes()).to_vec())
            }
            20 => {
                state.write_end = None;
                let State {
                    durable, pending, flushes, ..
                } = &mut *state;
                for (offset, data) in pending.drain(..) {
                    durable[offset..offset + data.len()].copy_from_slice(&data);
                }
                *flushes += 1;
                Ok(Vec::new())
            }
            26 => Ok(init()),
            _ => Err(ENOSYS),
        }
    }
}

/// `fuse_init_out`: protocol 7.31, big writes.
fn init() -> Vec<u8> {
    let mut out = Vec::new();
    for field in [7_u32, 31, MAX_WRITE as u32, 1 << 5, 0, MAX_WRITE as u32, 1] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.resize(64, 0);
    out
}

/// `fuse_attr_out` of a regular file of `bytes`.
fn attributes(bytes: usize) -> Vec<u8> {
    let mut out = 3600_u64.to_le_bytes().to_vec();
    out.extend_from_slice(&[0; 8]);
    for field in [1_u64, bytes as u64, bytes.div_ceil(SECTOR_BYTES) as u64, 0, 0, 0] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    for field in [0_u32, 0, 0, 0o100_600, 1, 0, 0, 0, 4096, 0] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out
}
