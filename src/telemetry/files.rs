//! A log file that is closed and renamed at a size, at the turn of an hour or day (UTC), or at whichever of the two comes first.
//!
//! `metcd.log` is the one being written; closed ones are `metcd-20261121T000000Z.log`, named by the time they were closed, and those of the
//! same second after it `metcd-20261121T000000Z.000001.log` and so on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::config::{LogPeriod, LogRotation};

/// One log.
pub struct RotatingFile {
    directory: PathBuf,
    stem: &'static str,
    rotation: LogRotation,
    keep_files: usize,
    clock: fn() -> SystemTime,
    file: File,
    bytes: u64,
    period: u64,
}

impl RotatingFile {
    /// Opens `<directory>/<stem>.log` for appending; makes the directory.
    pub fn open(directory: &Path, stem: &'static str, rotation: LogRotation, keep_files: usize) -> io::Result<Self> {
        Self::open_with_clock(directory, stem, rotation, keep_files, SystemTime::now)
    }

    fn open_with_clock(
        directory: &Path,
        stem: &'static str,
        rotation: LogRotation,
        keep_files: usize,
        clock: fn() -> SystemTime,
    ) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let file = open_for_append(&directory.join(format!("{stem}.log")))?;
        let meta = file.metadata()?;
        // A file that an earlier run left belongs to the period it was last written in, and is closed at the first line of a later one.
        let last_written = if meta.len() > 0 { meta.modified()? } else { clock() };
        let period = period(rotation, last_written);
        Ok(Self {
            directory: directory.to_owned(),
            stem,
            rotation,
            keep_files,
            clock,
            file,
            bytes: meta.len(),
            period,
        })
    }

    fn is_due(&self, now: SystemTime, next_bytes: u64) -> bool {
        let full = self
            .rotation
            .max_bytes
            .is_some_and(|max| self.bytes.saturating_add(next_bytes) > max);
        self.bytes > 0 && (full || period(self.rotation, now) != self.period)
    }

    fn rotate(&mut self, now: SystemTime) -> io::Result<()> {
        let current = self.directory.join(format!("{}.log", self.stem));
        fs::rename(&current, self.next_name(now)?)?;
        self.file = open_for_append(&current)?;
        self.bytes = 0;
        self.remove_old()
    }

    /// Later than any that is there, also if the clock was set back: which files go is decided by their names.
    fn next_name(&self, now: SystemTime) -> io::Result<PathBuf> {
        let mut closing = Closing {
            stamp: stamp(now),
            counter: 0,
        };
        if let Some(newest) = self.closed()?.pop()
            && newest >= closing
        {
            closing = Closing {
                counter: newest.counter + 1,
                ..newest
            };
        }
        Ok(self.path_of(&closing))
    }

    fn remove_old(&self) -> io::Result<()> {
        let closed = self.closed()?;
        let surplus = closed.len().saturating_sub(self.keep_files);
        closed
            .iter()
            .take(surplus)
            .try_for_each(|closing| fs::remove_file(self.path_of(closing)))
    }

    /// The files that were closed, the oldest first. Nothing else in the directory is ever removed.
    fn closed(&self) -> io::Result<Vec<Closing>> {
        let mut closed: Vec<Closing> = fs::read_dir(&self.directory)?
            .filter_map(|entry| Closing::parse(entry.ok()?.file_name().to_str()?, self.stem))
            .collect();
        closed.sort_unstable();
        Ok(closed)
    }

    fn path_of(&self, closing: &Closing) -> PathBuf {
        let Closing { stamp, counter } = closing;
        let stem = self.stem;
        self.directory.join(match counter {
            0 => format!("{stem}-{stamp}.log"),
            _ => format!("{stem}-{stamp}.{counter:06}.log"),
        })
    }
}

/// When a file was closed, as its name says; ordered by age.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Closing {
    stamp: String,
    /// Of several in one second.
    counter: u64,
}

impl Closing {
    fn parse(name: &str, stem: &str) -> Option<Closing> {
        let rest = name.strip_prefix(stem)?.strip_prefix('-')?.strip_suffix(".log")?;
        let (stamp, counter) = rest.split_once('.').unwrap_or((rest, "0"));
        let is_stamp = stamp.len() == 16 && stamp.bytes().all(|byte| byte.is_ascii_digit() || b"TZ".contains(&byte));
        let counter = counter.parse().ok().filter(|_| counter.bytes().all(|byte| byte.is_ascii_digit()))?;
        is_stamp.then(|| Closing {
            stamp: stamp.to_owned(),
            counter,
        })
    }
}

impl Write for RotatingFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let now = (self.clock)();
        let length = u64::try_from(line.len()).unwrap_or(u64::MAX);
        if self.is_due(now, length)
            && let Err(error) = self.rotate(now)
        {
            // The line matters more than the file it is in; the next period or the next line tries again.
            writeln!(self.file, "metcd: log rotation failed: {error}")?;
        }
        self.period = period(self.rotation, now);
        self.file.write_all(line)?;
        self.bytes = self.bytes.saturating_add(length);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn open_for_append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Number of the hour or day since 1970; the same number for ever if time does not rotate.
fn period(rotation: LogRotation, now: SystemTime) -> u64 {
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    match rotation.period {
        Some(LogPeriod::Hourly) => seconds / 3_600,
        Some(LogPeriod::Daily) => seconds / 86_400,
        None => 0,
    }
}

/// `20261121T001500Z`
fn stamp(now: SystemTime) -> String {
    let utc = time::OffsetDateTime::from(now);
    let (year, month, day) = (utc.year(), u8::from(utc.month()), utc.day());
    format!(
        "{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z",
        utc.hour(),
        utc.minute(),
        utc.second()
    )
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;

    thread_local! {
        static NOW: Cell<u64> = const { Cell::new(1_795_219_140) };
    }

    fn test_clock() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(NOW.get())
    }

    fn open(directory: &Path, rotation: LogRotation, keep_files: usize) -> RotatingFile {
        RotatingFile::open_with_clock(directory, "metcd", rotation, keep_files, test_clock).expect("open")
    }

    fn at(max_bytes: u64) -> LogRotation {
        LogRotation {
            period: None,
            max_bytes: Some(max_bytes),
        }
    }

    fn every(period: LogPeriod) -> LogRotation {
        LogRotation {
            period: Some(period),
            max_bytes: None,
        }
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .expect("read_dir")
            .map(|e| e.expect("entry").file_name().into_string().expect("utf-8"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_full_file_is_closed_before_the_line_that_would_not_fit() {
        let directory = tempfile::tempdir().expect("tempdir");
        let mut log = open(directory.path(), at(10), 14);
        for line in ["12345\n", "1234\n", "abc\n"] {
            log.write_all(line.as_bytes()).expect("write");
        }
        assert_eq!(names(directory.path()).len(), 2, "6 + 5 > 10, 5 + 4 ≤ 10");
        assert_eq!(fs::read_to_string(directory.path().join("metcd.log")).expect("read"), "1234\nabc\n");
    }

    #[test]
    fn the_turn_of_an_hour_or_day_closes_the_file() {
        for (period, seconds) in [(LogPeriod::Hourly, 3_600), (LogPeriod::Daily, 86_400)] {
            let directory = tempfile::tempdir().expect("tempdir");
            let mut log = open(directory.path(), every(period), 14);
            log.write_all(b"before\n").expect("write");
            NOW.set(NOW.get() + seconds);
            log.write_all(b"after\n").expect("write");
            assert_eq!(fs::read_to_string(directory.path().join("metcd.log")).expect("read"), "after\n");
            assert_eq!(names(directory.path()).len(), 2);
        }
    }

    #[test]
    fn of_a_period_and_a_size_whichever_is_reached_first_closes_the_file() {
        let directory = tempfile::tempdir().expect("tempdir");
        let both = LogRotation {
            max_bytes: Some(10),
            ..every(LogPeriod::Daily)
        };
        let mut log = open(directory.path(), both, 14);
        log.write_all(b"12345\n67").expect("write");
        log.write_all(b"89\n").expect("write");
        assert_eq!(names(directory.path()).len(), 2, "8 + 3 > 10");
        NOW.set(NOW.get() + 86_400);
        log.write_all(b"a\n").expect("write");
        assert_eq!(names(directory.path()).len(), 3, "another day");
        assert_eq!(fs::read_to_string(directory.path().join("metcd.log")).expect("read"), "a\n");
    }

    #[test]
    fn only_the_oldest_of_our_own_files_are_removed() {
        let directory = tempfile::tempdir().expect("tempdir");
        for foreign in ["metcd-notes.log", "access-20200101T000000Z.log", "metcd-20200101T000000Z.txt"] {
            fs::write(directory.path().join(foreign), "keep me").expect("write");
        }
        let mut log = open(directory.path(), at(1), 2);
        for line in 0..5 {
            NOW.set(NOW.get() + 1);
            log.write_all(format!("{line}\n").as_bytes()).expect("write");
        }
        let names = names(directory.path());
        assert_eq!(names.len(), 3 + 1 + 2, "{names:?}");
        let newest = fs::read_to_string(directory.path().join("metcd.log")).expect("read");
        assert!(newest.ends_with("4\n"), "{newest}");
    }

    #[test]
    fn of_several_that_were_closed_in_one_second_the_last_ones_stay() {
        let directory = tempfile::tempdir().expect("tempdir");
        let mut log = open(directory.path(), at(1), 3);
        let mut write = |line: u32| log.write_all(format!("{line}\n").as_bytes()).expect("write");
        (0..1_200).for_each(&mut write);
        // A clock that is set back makes no file older.
        NOW.set(NOW.get() - 60);
        (1_200..1_202).for_each(&mut write);
        let mut lines: Vec<String> = names(directory.path())
            .iter()
            .map(|name| fs::read_to_string(directory.path().join(name)).expect("read"))
            .collect();
        lines.sort();
        assert_eq!(lines, ["1198\n", "1199\n", "1200\n", "1201\n"]);
    }

    #[test]
    fn a_file_of_an_earlier_run_is_appended_to() {
        let directory = tempfile::tempdir().expect("tempdir");
        open(directory.path(), LogRotation::default(), 1)
            .write_all(b"one\n")
            .expect("write");
        open(directory.path(), LogRotation::default(), 1)
            .write_all(b"two\n")
            .expect("write");
        assert_eq!(fs::read_to_string(directory.path().join("metcd.log")).expect("read"), "one\ntwo\n");
    }
}
