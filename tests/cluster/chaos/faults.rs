//! What goes wrong, drawn from a seed.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::harness::{Cluster, Seed, eventually};
use crate::small_disk::SmallDisk;

/// Every so many steps three kinds of fault are made to overlap, whatever is drawn.
const STORM_EVERY: u64 = 25;
/// How many kinds must have been in force at one instant.
pub const KINDS_AT_ONCE: usize = 3;
/// The most that a link waits while a member comes and goes: a snapshot has to pass.
const SLOW_FOR_A_SNAPSHOT: Duration = Duration::from_millis(20);
const CHURN_WITHIN: Duration = Duration::from_secs(120);
/// The most that somebody else stands still or is cut off meanwhile.
const DISTURBED_MILLIS: u64 = 1_000;
/// Between two who are, looked at so many times in the middle.
const DISTURBED_EVERY: u64 = 40;

/// Whether a member is gone; not everybody whom one asks can tell.
async fn is_removed(request: reqwest::RequestBuilder) -> bool {
    let Ok(answer) = request.send().await else { return false };
    let is_done = answer.status().is_success();
    let answer: Value = answer.json().await.unwrap_or_default();
    is_done || answer["code"] == "member_not_found"
}

/// What is wrong with a member at the moment.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Killed,
    Paused,
    Isolated,
    /// It cannot send to this one.
    CutTo(u64),
    Full,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Fault::Killed => "kill -9",
            Fault::Paused => "SIGSTOP",
            Fault::Isolated => "isolation",
            Fault::CutTo(_) => "one-way cut",
            Fault::Full => "full disk",
        }
    }
}

const SLOW: &str = "slow links";
const CHURN: &str = "membership churn";

pub struct Faults {
    seed: Seed,
    /// Where member 1 lives, if this may be arranged.
    disk: Option<SmallDisk>,
    /// By member, and until when.
    current: BTreeMap<u64, (Fault, Instant)>,
    /// Members whose links are slow, besides whatever else is wrong with them.
    slow: BTreeMap<u64, Instant>,
    is_churning: bool,
    /// Member 1 has met a full disk since it was started: it may end by itself.
    was_full: bool,
    counts: BTreeMap<&'static str, u64>,
    /// Kinds in force at one instant → how many faults began to make it so many.
    at_once: BTreeMap<usize, u64>,
    steps: u64,
    next_id: u64,
}

impl Faults {
    pub fn new(seed: u64, disk: Option<SmallDisk>) -> Faults {
        Faults {
            seed: Seed(seed),
            disk,
            current: BTreeMap::new(),
            slow: BTreeMap::new(),
            is_churning: false,
            was_full: false,
            counts: BTreeMap::new(),
            at_once: BTreeMap::new(),
            steps: 0,
            next_id: 100,
        }
    }

    /// How long until the next step.
    pub fn pause(&mut self) -> Duration {
        Duration::from_millis(100 + self.seed.below(500))
    }

    pub async fn step(&mut self, cluster: &mut Cluster) {
        let now = Instant::now();
        let over: Vec<u64> = self
            .current
            .iter()
            .filter(|(_, (_, until))| *until <= now)
            .map(|(&id, _)| id)
            .collect();
        for id in over {
            self.end(cluster, id);
        }
        self.end_slow_links(cluster, now);
        self.tend(cluster);
        self.steps += 1;
        if self.steps.is_multiple_of(STORM_EVERY) {
            self.storm(cluster);
            return;
        }
        let id = self.pick(&cluster.ids());
        match self.seed.below(13) {
            0..=2 => self.begin(cluster, id, Fault::Killed),
            3..=4 => self.begin(cluster, id, Fault::Paused),
            5..=6 => self.begin(cluster, id, Fault::Isolated),
            7 => {
                let mut others = cluster.ids();
                others.retain(|&other| other != id);
                let other = self.pick(&others);
                self.begin(cluster, id, Fault::CutTo(other));
            }
            8 => self.churn(cluster).await,
            9 => {
                let url = format!("{}/leader?timeout=2s", cluster.url(id));
                let asked = cluster.http.post(url).json(&json!({ "id": id })).send();
                // Refused without a leader, which is as good. A member that is stopped answers late, and the next fault does not wait.
                tokio::spawn(asked);
                self.count("transfer");
            }
            10..=11 => self.slow_down(cluster, id),
            _ => self.begin(cluster, 1, Fault::Full),
        }
    }

    /// Starts a member that ended because its disk was full. Nobody else ends by himself, but who comes and goes.
    pub fn tend(&mut self, cluster: &mut Cluster) {
        let (current, passing) = (&self.current, self.next_id);
        let well = cluster.ids().into_iter().filter(|&id| id != passing && !current.contains_key(&id));
        for id in well.collect::<Vec<u64>>() {
            let node = cluster.node(id);
            if node.is_running() {
                continue;
            }
            assert!(id == 1 && self.was_full, "member {id} ended by itself");
            self.was_full = false;
            node.kill();
            node.start();
        }
    }

    fn pick(&mut self, ids: &[u64]) -> u64 {
        ids[self.seed.below(ids.len() as u64) as usize]
    }

    /// One kind for each of three members.
    fn storm(&mut self, cluster: &mut Cluster) {
        let mut ids = cluster.ids();
        for &id in &ids {
            self.end(cluster, id);
        }
        let mut next = || ids.swap_remove(self.seed.below(ids.len() as u64) as usize);
        let (first, second, third) = (next(), next(), next());
        let is_even = self.steps.is_multiple_of(2 * STORM_EVERY);
        self.begin(cluster, first, if is_even { Fault::Killed } else { Fault::Paused });
        self.begin(cluster, second, if is_even { Fault::CutTo(third) } else { Fault::Isolated });
        self.slow_down(cluster, third);
    }

    fn begin(&mut self, cluster: &mut Cluster, id: u64, fault: Fault) {
        if self.current.contains_key(&id) {
            return;
        }
        match (fault, &self.disk) {
            (Fault::Killed, _) => cluster.node(id).kill(),
            (Fault::Paused, _) => cluster.node(id).pause(),
            (Fault::Isolated | Fault::CutTo(_), _) => {}
            // Now and then it has room for a little.
            (Fault::Full, Some(disk)) => disk.fill(self.seed.below(3) << 20),
            (Fault::Full, None) => return,
        }
        let millis = 200 + self.seed.below(3_000);
        self.note(cluster, id, fault, millis);
    }

    /// It is in force from now on.
    fn note(&mut self, cluster: &Cluster, id: u64, fault: Fault, millis: u64) {
        self.current.insert(id, (fault, Instant::now() + Duration::from_millis(millis)));
        self.cut_links(cluster);
        self.count(fault.name());
    }

    /// While a member comes or goes: one other at a time, besides the dead one, is paused or cut off for a moment. Draws from a seed of its own,
    /// for how often it is called depends on the machine.
    fn disturb(&mut self, cluster: &mut Cluster, dead: Option<u64>, seed: &mut Seed) {
        let now = Instant::now();
        let disturbed = self.current.iter().find(|(id, _)| Some(**id) != dead);
        if let Some((&id, &(_, until))) = disturbed {
            if until <= now {
                self.end(cluster, id);
            }
            return;
        }
        if seed.below(DISTURBED_EVERY) != 0 {
            return;
        }
        let mut ids = cluster.ids();
        ids.retain(|&id| Some(id) != dead && id != self.next_id);
        let id = ids.swap_remove(seed.below(ids.len() as u64) as usize);
        let fault = match seed.below(3) {
            0 => Fault::Paused,
            1 => Fault::Isolated,
            _ => Fault::CutTo(ids[seed.below(ids.len() as u64) as usize]),
        };
        if fault == Fault::Paused {
            cluster.node(id).pause();
        }
        self.note(cluster, id, fault, 100 + seed.below(DISTURBED_MILLIS));
    }

    fn slow_down(&mut self, cluster: &Cluster, id: u64) {
        let delay = Duration::from_millis(10 + self.seed.below(150));
        cluster.links.slow_down(id, delay);
        let until = Instant::now() + Duration::from_millis(3_200 + self.seed.below(3_000));
        self.slow.insert(id, until);
        self.count(SLOW);
    }

    /// Exactly those that are to be cut now.
    fn cut_links(&self, cluster: &Cluster) {
        let mut cut = HashSet::new();
        for (&id, &(fault, _)) in &self.current {
            match fault {
                Fault::Isolated => {
                    for other in cluster.ids() {
                        cut.extend([(id, other), (other, id)]);
                    }
                }
                Fault::CutTo(other) => {
                    cut.insert((id, other));
                }
                Fault::Killed | Fault::Paused | Fault::Full => {}
            }
        }
        cluster.links.cut_exactly(cut);
    }

    /// Something of this kind has begun.
    fn count(&mut self, name: &'static str) {
        *self.counts.entry(name).or_insert(0) += 1;
        let mut kinds: BTreeSet<&str> = self.current.values().map(|(fault, _)| fault.name()).collect();
        if !self.slow.is_empty() {
            kinds.insert(SLOW);
        }
        if self.is_churning {
            kinds.insert(CHURN);
        }
        *self.at_once.entry(kinds.len()).or_insert(0) += 1;
    }

    /// Everything is well again.
    pub fn end_all(&mut self, cluster: &mut Cluster) {
        for id in cluster.ids() {
            self.end(cluster, id);
        }
        for (id, _) in std::mem::take(&mut self.slow) {
            cluster.links.slow_down(id, Duration::ZERO);
        }
    }

    fn end_slow_links(&mut self, cluster: &Cluster, now: Instant) {
        self.slow.retain(|&id, until| {
            let is_over = *until <= now;
            if is_over {
                cluster.links.slow_down(id, Duration::ZERO);
            }
            !is_over
        });
    }

    fn end(&mut self, cluster: &mut Cluster, id: u64) {
        let Some((fault, _)) = self.current.remove(&id) else { return };
        match fault {
            Fault::Killed => {
                self.was_full &= id != 1;
                cluster.node(id).start();
            }
            Fault::Paused => cluster.node(id).resume(),
            Fault::Isolated | Fault::CutTo(_) => self.cut_links(cluster),
            Fault::Full => {
                if let Some(disk) = &self.disk {
                    disk.make_room();
                }
                // A member whose writes fail ends, perhaps only now.
                self.was_full = true;
                self.tend(cluster);
            }
        }
    }

    /// A member comes, catches up, and goes for ever. That takes a quorum, now and then: one member at the most stays dead meanwhile, links stay
    /// slow, and one after the other of the rest stands still or is cut off for a moment.
    async fn churn(&mut self, cluster: &mut Cluster) {
        let dead = self.current.iter().find(|(_, (fault, _))| *fault == Fault::Killed);
        let dead = dead.map(|(&id, _)| id);
        for id in cluster.ids().into_iter().filter(|&id| Some(id) != dead) {
            self.end(cluster, id);
        }
        for &id in self.slow.keys() {
            cluster.links.slow_down(id, SLOW_FOR_A_SNAPSHOT);
        }
        self.is_churning = true;
        self.count(CHURN);
        let asked = cluster.ids().into_iter().find(|&id| Some(id) != dead).expect("several members");
        self.next_id += 1;
        let id = self.next_id;
        let mut seed = Seed(self.seed.next());
        cluster.joiner(Some(id)).start();
        let readyz = format!("{}/readyz", cluster.url(id));
        eventually(&format!("{id} to be ready"), CHURN_WITHIN, async || {
            self.tend(cluster);
            self.disturb(cluster, dead, &mut seed);
            assert!(cluster.node(id).is_running(), "member {id} ended instead of becoming ready");
            let answer = cluster.http.get(&readyz).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
        // Until the leader has noticed who is dead, and that everybody else is not, it may refuse.
        let url = format!("{}/members/{id}?timeout=20s", cluster.url(asked));
        let mut asking: Option<JoinHandle<bool>> = None;
        eventually(&format!("the removal of {id}"), CHURN_WITHIN, async || {
            self.tend(cluster);
            self.disturb(cluster, dead, &mut seed);
            let request = cluster.http.delete(&url);
            if !asking.get_or_insert_with(|| tokio::spawn(is_removed(request))).is_finished() {
                return None;
            }
            asking.take()?.await.ok()?.then_some(())
        })
        .await;
        eventually(&format!("the end of {id}"), CHURN_WITHIN, async || {
            self.tend(cluster);
            self.disturb(cluster, dead, &mut seed);
            (!cluster.node(id).is_running()).then_some(())
        })
        .await;
        let status = cluster.node(id).ended(CHURN_WITHIN).await;
        assert_eq!(status.code(), Some(1), "removed member {id}");
        cluster.nodes.retain(|node| node.id != id);
        self.is_churning = false;
        for id in cluster.ids().into_iter().filter(|&id| Some(id) != dead) {
            self.end(cluster, id);
        }
    }

    /// Every kind that a short run with this seed is to have.
    pub fn check_kinds(&self, kinds: &[&str]) {
        for kind in kinds {
            assert!(self.counts.contains_key(kind), "no {kind}: {:?}", self.counts);
        }
    }

    pub fn print(&self) {
        println!("faults: {:?}", self.counts);
        println!(
            "kinds of fault in force at once (kinds: times): {:?}; {} times at least {KINDS_AT_ONCE}, at most {}",
            self.at_once,
            self.at_once.range(KINDS_AT_ONCE..).map(|(_, times)| times).sum::<u64>(),
            self.at_once.keys().last().unwrap_or(&0)
        );
    }

    /// If there was occasion.
    pub fn check_overlap(&self) {
        let most = self.at_once.keys().last().copied().unwrap_or(0);
        assert!(
            self.steps < STORM_EVERY || most >= KINDS_AT_ONCE,
            "never more than {most} kinds of fault at once"
        );
    }
}
