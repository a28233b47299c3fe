//! One seed from begin to end: a safety phase with faults, a liveness phase without, and the last questions.

use std::panic::{AssertUnwindSafe, catch_unwind};

use metcd::node::Role;

use crate::plan::{SECOND, Settings};
use crate::stats::Stats;
use crate::world::World;

/// How a run ended.
pub struct Report {
    pub stats: Stats,
    pub trace_hash: u64,
    /// What must not be.
    pub violation: Option<String>,
}

/// Runs one seed. A panic anywhere in the product is a violation like any other.
pub fn run(settings: Settings) -> Report {
    #[cfg(feature = "mutants")]
    metcd::mutants::switch(settings.mutant);
    let mut world = World::new(settings);
    let outcome = catch_unwind(AssertUnwindSafe(|| play(&mut world)));
    if let Err(panic) = outcome {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        world.violation(format!("a panic: {}", text.unwrap_or_default()));
    }
    world.stats.simulated = world.now;
    world.stats.elections = world.oracle.raft.elections() as u64;
    world.stats.expired = world.oracle.lease.expired;
    world.stats.compared = world.oracle.state.compared;
    Report {
        stats: world.stats.clone(),
        trace_hash: world.trace_hash,
        violation: world.violation.take(),
    }
}

fn play(world: &mut World) {
    world.run_until(world.plan.safety_for);
    world.trace(|| "no more faults".into());
    world.heal();
    let end = world.now + world.plan.liveness_for;
    // Everything outstanding finishes within a bound of time.
    let mut open = Some("nothing was looked at yet".to_owned());
    while world.violation.is_none() && open.is_some() && world.now < end {
        world.run_until(world.now + SECOND);
        open = unfinished(world);
    }
    if let Some(open) = open {
        world.violation(format!(
            "not live {} s after the last fault: {open}",
            world.plan.liveness_for / SECOND
        ));
    }
    if world.violation.is_some() {
        return;
    }
    world.ask_everything();
    world.run_until(world.now + 25 * SECOND);
    if world.violation.is_none() && !world.clients_are_idle() {
        world.violation("a last read was not answered".into());
    }
    if world.violation.is_none() {
        match world.oracle.check_end() {
            Ok(checked) => {
                world.stats.checked = checked.operations;
                world.stats.given_up = checked.given_up;
            }
            Err(fault) => world.violation(fault),
        }
    }
}

/// Why the cluster is not at rest yet.
fn unfinished(world: &World) -> Option<String> {
    if !world.clients_are_idle() {
        return Some("a client waits".into());
    }
    let Some(leader) = world.leader() else {
        return Some("there is no leader".into());
    };
    let Some(process) = world.machines[leader].process.as_ref() else {
        return Some("the leader is gone".into());
    };
    let view = &process.view;
    if view.role != Role::Leader || !view.applied_current_term {
        return Some(format!("n{} does not serve as a leader yet", process.id));
    }
    if view.joint || view.conf_pending {
        return Some("a membership change is under way".into());
    }
    let applied = process.reader.applied_index();
    for &id in view.voters.iter().chain(&view.learners) {
        let machine = &world.machines[id as usize - 1];
        if machine.is_gone {
            continue;
        }
        let Some(follower) = machine.process.as_ref() else {
            return Some(format!("n{id} does not run"));
        };
        // A little behind is as it should be: the leader's own duties go on.
        if follower.reader.applied_index() + 3 < applied {
            return Some(format!("n{id} has applied {} of {applied}", follower.reader.applied_index()));
        }
    }
    let members = process.reader.members();
    let waiting = members
        .iter()
        .find(|member| view.learners.contains(&member.id) && member.wanted_role == 0 && !world.machines[member.id as usize - 1].is_gone);
    if let Some(member) = waiting {
        return Some(format!(
            "n{} is not promoted yet: {:?}, voters {:?}",
            member.id, process.progress, view.voters
        ));
    }
    let revision = process.reader.revision();
    let is_behind = |position: Option<u64>| position.is_some_and(|position| position + 3 < revision);
    if world.watches.iter().any(|watch| is_behind(watch.position)) {
        return Some("a watch is behind".into());
    }
    None
}
