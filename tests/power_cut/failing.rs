//! A disk that refuses writes for a moment, under a log that is opened again on the file system as it is.
//!
//! The kernel tells a failed write to one sync, then keeps the page and calls it clean: to the next process it looks as if the disk had it. A
//! log that goes on from there acknowledges entries on top of a gap. So, in each round: writes fail until the process has ended, which it must
//! (rule 5); another one opens the log, which has to hold all that was acknowledged, and goes on; then the power is cut. All that was
//! acknowledged, before and after, has to be there. Were what the kernel kept not dropped when a log is opened, sled and raft-engine would lose
//! entries here.

use std::{sync::Arc, time::Duration};

use super::{Appender, DISK_BYTES, LOST, NO_DISK, PATIENCE, Random, Tally, Task, disk, disk::Disk, verify};

/// As the runner of power cuts.
pub fn run(task: &Task) -> i32 {
    let mut random = Random(task.seed);
    let mut tally = Tally::default();
    let mut content = match disk::format(DISK_BYTES, &task.dir) {
        Ok(content) => content,
        Err(error) => {
            println!("no disk: {error}");
            return NO_DISK;
        }
    };
    let mut floor = 0;
    for number in 1..=task.number {
        match round(task, content, &mut floor, &mut random, &mut tally) {
            Ok((image, verdict)) => {
                let is_whole = verdict.starts_with("whole");
                tally.count(number, &verdict);
                if !is_whole {
                    break;
                }
                content = image;
            }
            Err(error) => {
                println!("no disk: {error}");
                return NO_DISK;
            }
        }
    }
    println!("{} on a disk that fails: {tally:?}", task.engine);
    if tally.refused + tally.silent > 0 { LOST } else { 0 }
}

/// Returns what a power cut left at the end, and the verdict on it. `floor` is what was acknowledged before, and becomes what is acknowledged after.
fn round(task: &Task, content: Vec<u8>, floor: &mut u64, random: &mut Random, tally: &mut Tally) -> std::io::Result<(Vec<u8>, String)> {
    let disk = Arc::new(Disk::new(content));
    let mounted = disk::mount(&disk, &task.dir)?;
    let log = mounted.dir.join("log");
    let mut appender = Appender::start(task, &log);
    appender.wait_for(*floor + 1);
    std::thread::sleep(Duration::from_millis(random.below(700)));
    disk.fail(true);
    let ended = appender.ends_within(PATIENCE);
    let refused = disk.fail(false);
    assert!(ended, "a process whose writes are refused goes on");
    assert!(refused > 0, "no write was refused");
    let before = appender.end_and_count();
    let verdict = verify(task, &log, before, tally);
    if !verdict.starts_with("whole") {
        return Ok((Vec::new(), verdict));
    }

    let mut appender = Appender::start(task, &log);
    if !appender.reaches(before + 1) {
        return Ok((Vec::new(), format!("refused: after operation {before} the log did not go on")));
    }
    std::thread::sleep(Duration::from_millis(random.below(2_000)));
    let acknowledged = appender.acknowledged();
    let (image, unflushed) = disk.cut(random);
    drop(appender);
    tally.cuts += 1;
    tally.operations += acknowledged - *floor;
    tally.unflushed_writes += unflushed as u64;
    tally.flushes += disk.flushes();
    *floor = acknowledged;
    let after = disk::mount_image(&image, &task.dir)?;
    let verdict = verify(task, &after.dir.join("log"), acknowledged, tally);
    Ok((image, verdict))
}
