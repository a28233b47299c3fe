//! Who may speak to this member: PURE, so that the simulator decides by the same rules. Cluster and receiver were checked before.
//!
//! *Known* (rule 27) is who is in the member table of the state, under the data directory that is noted there. That alone would leave
//! out a member that was away while all others were replaced: it would refuse whoever could bring it up to date, or needs its vote, for
//! ever (rule 28). Raft itself lets any server of the cluster append and ask for votes, whatever the receiver's configuration says
//! (thesis §4.1), so what is missing is only to know that the stranger *is* one. A stranger is therefore asked, at the address it names,
//! for its member table, and counts as known if that table is the future of the own one:
//!
//! - it is of this cluster and of a higher applied index;
//! - it holds the stranger, under the data directory that speaks, and this member, under its own;
//! - nobody whom this member knows is missing in it: each is a member there, or was removed; and whoever was removed here is so there.
//!
//! Nobody is asked by a member that hears its leader: it learns of new members from the log, and strangers get nothing in. What an
//! introduction says is kept in memory and forgotten as soon as the own state is as new.
//!
//! A member that was removed is refused, and stops for good once it is told `member_removed`. It must not be told while somebody may need
//! its vote, and only the leader knows when that is over (`consensus::leaving`). So everybody else says `member_leaving`, which changes
//! nothing for the one that is told, and asks the leader for its member table, which says who is departed.
//!
//! *Missing*: this keeps out members of other clusters, removed ones, and wrong addresses or disks. Whoever forges requests on purpose
//! can also forge an address, an id and a table; only TLS between the peers keeps those out.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::consensus::View;
use crate::state::StateReader;
use crate::state::command::MemberRecord;
use crate::state::reader::Admission;
use crate::transport::{MEMBER_REMOVED, Peer, Refusal, SenderIdentity};

/// The sender's directory is not the one that the cluster knows under its id.
pub const REINCARNATED: &str = "member_reincarnated";
const UNKNOWN: &str = "unknown_member";
/// The sender was removed, and may still be needed by others.
const LEAVING: &str = "member_leaving";

/// `GET /raft/members`: what a member says of its cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberTable {
    /// In hexadecimal.
    pub cluster_id: String,
    /// How much this member has applied; what it says holds for that moment.
    #[serde(default)]
    pub applied_index: u64,
    /// The members.
    pub members: Vec<MemberRecord>,
    /// Ids that were members once.
    #[serde(default)]
    pub removed: Vec<u64>,
    /// Those of them whom nobody needs any more, as the member that says it knows for sure.
    #[serde(default)]
    pub departed: Vec<u64>,
    /// The member that says it is about to stop.
    #[serde(default)]
    pub stopping: bool,
}

impl MemberTable {
    fn incarnation_of(&self, id: u64) -> Option<u64> {
        self.members.iter().find(|member| member.id == id).map(|member| member.incarnation)
    }
}

/// What a stranger's table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Introduction {
    /// The members in it are known from now on.
    Accepted,
    /// It is newer than what this member knows, and this member was removed in it and is not needed any more.
    Removed,
    /// It proves nothing, for this reason.
    Refused(&'static str),
}

/// This member's own side of it.
#[derive(Debug)]
pub struct Admissions {
    id: u64,
    cluster_id: u64,
    incarnation: u64,
    /// Members whose data directory is not in the table yet: the first one seen.
    first_contact: BTreeMap<u64, u64>,
    /// The newest table that was accepted, until the own state is as new.
    introduced: Option<MemberTable>,
    /// The members as they were last looked at, and those who are leaving since.
    seen: BTreeMap<u64, MemberRecord>,
    /// Removed members of whom the leader has said that nobody needs them: true for ever.
    departed: BTreeSet<u64>,
    /// Somebody was refused of whom that is not known.
    wants_departed: bool,
}

impl Admissions {
    /// For the member `id` with this data directory.
    pub fn new(id: u64, cluster_id: u64, incarnation: u64) -> Admissions {
        Admissions {
            id,
            cluster_id,
            incarnation,
            first_contact: BTreeMap::new(),
            introduced: None,
            seen: BTreeMap::new(),
            departed: BTreeSet::new(),
            wants_departed: false,
        }
    }

    /// What this member says of its cluster. `view` is asked after the state: an older one might not name who is leaving.
    pub fn table(&self, reader: &StateReader, view: impl FnOnce() -> View, stopping: bool) -> MemberTable {
        // Read before the members: they are of this index or a later one, never of an earlier.
        let applied_index = reader.applied_index();
        let (members, removed) = (reader.members(), reader.removed());
        let view = view();
        MemberTable {
            cluster_id: format!("{:016x}", reader.cluster_id()),
            applied_index,
            members,
            departed: removed.iter().copied().filter(|&id| self.has_departed(id, &view)).collect(),
            removed,
            stopping,
        }
    }

    fn has_departed(&self, id: u64, view: &View) -> bool {
        self.departed.contains(&id) || (view.knows_the_departed && !view.leaving.contains(&id))
    }

    /// Whether the leader is to be asked for its table. Once for each time that it matters.
    pub fn take_wish_for_departed(&mut self) -> bool {
        std::mem::take(&mut self.wants_departed)
    }

    /// Takes from the leader's table who has departed.
    pub fn learn_departed(&mut self, table: &MemberTable) {
        if u64::from_str_radix(&table.cluster_id, 16) == Ok(self.cluster_id) {
            self.departed.extend(&table.departed);
        }
    }

    /// Whether the sender may speak. `view` is asked after the state: an older one might not name who is leaving.
    pub fn admit(&mut self, reader: &StateReader, sender: &SenderIdentity<'_>, view: impl FnOnce() -> View) -> Result<(), Refusal> {
        let member = sender.member;
        match reader.admission(member) {
            // A joiner knows nobody yet: it believes whoever speaks for its cluster, until its first snapshot tells it the members.
            Admission::Uninitialized => Ok(()),
            Admission::Removed => self.admit_removed(sender, &view()),
            Admission::Unknown => match self.introduced(reader).and_then(|table| table.incarnation_of(member)) {
                Some(incarnation) if incarnation == sender.incarnation => Ok(()),
                Some(_) => refuse(REINCARNATED, reincarnated(member)),
                None => refuse(
                    UNKNOWN,
                    format!("member {member} is not in the cluster, as far as member {} knows", self.id),
                ),
            },
            Admission::Member { incarnation: 0 } => self.admit_unbound(reader, sender),
            Admission::Member { incarnation } if incarnation == sender.incarnation => Ok(()),
            Admission::Member { .. } => refuse(REINCARNATED, reincarnated(member)),
        }
    }

    fn admit_removed(&mut self, sender: &SenderIdentity<'_>, view: &View) -> Result<(), Refusal> {
        let member = sender.member;
        if view.leaving.contains(&member) && self.is_seen(sender) {
            return Ok(());
        }
        if self.has_departed(member, view) || mutant!(TellEarly) {
            return refuse(MEMBER_REMOVED, format!("member {member} was removed from the cluster"));
        }
        self.wants_departed = true;
        refuse(
            LEAVING,
            format!("member {member} was removed from the cluster; it is to wait until the leader says that nobody needs its vote"),
        )
    }

    /// A member whose data directory is not noted yet: the first one that speaks for it. For an id that was added by hand, only one
    /// that comes from the address it was added with.
    fn admit_unbound(&mut self, reader: &StateReader, sender: &SenderIdentity<'_>) -> Result<(), Refusal> {
        let member = sender.member;
        if let Some(record) = reader.members().into_iter().find(|record| record.id == member)
            && record.bound_by_url
            && sender.peer_url != Some(&record.peer_url)
        {
            let named = sender.peer_url.unwrap_or("none");
            return refuse(
                UNKNOWN,
                format!(
                    "member {member} was added with the peer URL {}, and the sender names {named}",
                    record.peer_url
                ),
            );
        }
        let bound = *self.first_contact.entry(member).or_insert(sender.incarnation);
        if bound == sender.incarnation {
            Ok(())
        } else {
            refuse(REINCARNATED, reincarnated(member))
        }
    }

    /// Whether the sender is to be asked who its members are: it is new to this member, or where it says to be is. `is_led`: this
    /// member hears its leader.
    pub fn wants_introduction(&mut self, reader: &StateReader, sender: &SenderIdentity<'_>, is_led: bool) -> bool {
        let Some(url) = sender.peer_url else { return false };
        if is_led && reader.applied_index() > 0 {
            return false;
        }
        let address = match self.introduced(reader) {
            Some(table) => address_in(&table.members, sender.member),
            None => address_in(&reader.members(), sender.member),
        };
        address.as_deref() != Some(url) && !reader.is_removed(sender.member)
    }

    /// Judges the table that a stranger gave at the address it names.
    pub fn introduce(&mut self, reader: &StateReader, stranger: (u64, u64), table: MemberTable) -> Introduction {
        match self.judge(reader, stranger, &table) {
            Err(why) => Introduction::Refused(why),
            Ok(()) if table.departed.contains(&self.id) => Introduction::Removed,
            Ok(()) => {
                let is_newest = self
                    .introduced(reader)
                    .is_none_or(|known| known.applied_index < table.applied_index);
                if is_newest {
                    self.introduced = Some(table);
                }
                Introduction::Accepted
            }
        }
    }

    fn judge(&self, reader: &StateReader, (member, incarnation): (u64, u64), table: &MemberTable) -> Result<(), &'static str> {
        let holds = |holds: bool, otherwise: &'static str| if holds { Ok(()) } else { Err(otherwise) };
        holds(
            u64::from_str_radix(&table.cluster_id, 16) == Ok(self.cluster_id),
            "it is of another cluster",
        )?;
        holds(table.applied_index > reader.applied_index(), "it knows nothing that is new here")?;
        holds(
            incarnation != 0 && table.incarnation_of(member) == Some(incarnation),
            "the sender is not in it under its data directory",
        )?;
        // 0: added by hand or founding, and not bound yet.
        let own = table.incarnation_of(self.id);
        holds(
            own.is_some_and(|own| own == 0 || own == self.incarnation) || table.removed.contains(&self.id),
            "this member is not in it under its data directory",
        )?;
        let present: BTreeSet<u64> = table.members.iter().map(|member| member.id).collect();
        let removed: BTreeSet<u64> = table.removed.iter().copied().collect();
        holds(present.is_disjoint(&removed), "it contradicts itself")?;
        holds(
            reader.removed().iter().all(|id| removed.contains(id)),
            "it lacks ids that were removed before",
        )?;
        holds(
            reader
                .members()
                .iter()
                .all(|member| present.contains(&member.id) || removed.contains(&member.id)),
            "it lacks members that are known here",
        )
    }

    /// Where the members are: as the state says, or as an introduction does that is newer; and where those who are leaving were.
    pub fn peers(&mut self, reader: &StateReader, leaving: &[u64]) -> Vec<Peer> {
        let members = match self.introduced(reader) {
            Some(table) => table.members.clone(),
            None => reader.members(),
        };
        self.seen.retain(|id, _| leaving.contains(id));
        self.seen.extend(members.into_iter().map(|member| (member.id, member)));
        let others = self.seen.values().filter(|member| member.id != self.id);
        let boots = reader.boots();
        let peer = |member: &MemberRecord| Peer {
            id: member.id,
            url: member.peer_url.clone(),
            boot: boots.get(&member.id).copied().unwrap_or(0),
        };
        others.map(peer).collect()
    }

    fn is_seen(&self, sender: &SenderIdentity<'_>) -> bool {
        let record = self.seen.get(&sender.member);
        record.is_some_and(|record| record.incarnation == 0 || record.incarnation == sender.incarnation)
    }

    /// What was introduced and is newer than the own state.
    fn introduced(&mut self, reader: &StateReader) -> Option<&MemberTable> {
        let applied_index = reader.applied_index();
        self.introduced.take_if(|table| table.applied_index <= applied_index);
        self.introduced.as_ref()
    }
}

fn address_in(members: &[MemberRecord], id: u64) -> Option<String> {
    members.iter().find(|member| member.id == id).map(|member| member.peer_url.clone())
}

fn refuse(code: &'static str, detail: String) -> Result<(), Refusal> {
    Err(Refusal { code, detail })
}

fn reincarnated(member: u64) -> String {
    format!(
        "member {member} is known under another data directory; a wiped or copied one may have voted or acknowledged what this one forgot"
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::node::Role;
    use crate::state::State;
    use crate::store::MemoryStore;
    use crate::wal::LogStart;

    const CLUSTER: u64 = 0xc1;
    const OWN: u64 = 1;

    fn url(id: u64) -> String {
        format!("http://10.0.0.{id}:6380")
    }

    fn record(id: u64) -> MemberRecord {
        MemberRecord {
            id,
            peer_url: url(id),
            incarnation: 100 + id,
            ..MemberRecord::default()
        }
    }

    /// Member 1 of the founders 1, 2 and 3, at index 1.
    fn member(founders: &[MemberRecord]) -> (State, Admissions) {
        let mut state = State::open(Arc::new(MemoryStore::new())).expect("opens");
        state.bootstrap(CLUSTER, founders).expect("founds");
        (state, Admissions::new(OWN, CLUSTER, 100 + OWN))
    }

    fn founders() -> [MemberRecord; 3] {
        [record(1), record(2), record(3)]
    }

    fn sender<'a>(id: u64, peer_url: Option<&'a str>) -> SenderIdentity<'a> {
        SenderIdentity {
            cluster_id: CLUSTER,
            member: id,
            incarnation: 100 + id,
            peer_url,
        }
    }

    /// 2 and 3 were replaced by 4 and 5.
    fn newer() -> MemberTable {
        MemberTable {
            cluster_id: format!("{CLUSTER:016x}"),
            applied_index: 50,
            members: vec![record(1), record(4), record(5)],
            removed: vec![2, 3],
            departed: vec![],
            stopping: false,
        }
    }

    fn follower() -> View {
        View {
            role: Role::Follower,
            term: 2,
            leader: Some(2),
            is_led: true,
            commit_index: 1,
            persisted_index: 1,
            log_start: LogStart { index: 1, term: 1 },
            last_index: 1,
            applied_current_term: true,
            transferring: false,
            joint: false,
            conf_pending: false,
            voters: vec![1, 2, 3],
            learners: vec![],
            leaving: vec![],
            knows_the_departed: false,
        }
    }

    fn leader(leaving: &[u64]) -> View {
        View {
            role: Role::Leader,
            leaving: leaving.to_vec(),
            knows_the_departed: true,
            ..follower()
        }
    }

    fn code(result: Result<(), Refusal>) -> &'static str {
        result.map_or_else(|refusal| refusal.code, |()| "admitted")
    }

    #[test]
    fn rule_28_strangers_whose_table_is_the_future_of_the_own_one_are_known() {
        let (state, mut admissions) = member(&founders());
        let reader = state.reader();
        let four = url(4);
        let stranger = sender(4, Some(&four));
        assert_eq!(code(admissions.admit(&reader, &stranger, follower)), UNKNOWN);
        assert!(admissions.wants_introduction(&reader, &stranger, false));
        assert_eq!(admissions.introduce(&reader, (4, 104), newer()), Introduction::Accepted);
        assert_eq!(code(admissions.admit(&reader, &stranger, follower)), "admitted");
        assert_eq!(
            code(admissions.admit(&reader, &sender(5, None), follower)),
            "admitted",
            "and the others of the table"
        );
        let wiped = SenderIdentity {
            incarnation: 9,
            ..stranger
        };
        assert_eq!(code(admissions.admit(&reader, &wiped, follower)), REINCARNATED);
        assert_eq!(
            admissions.peers(&reader, &[]).iter().map(|peer| peer.id).collect::<Vec<_>>(),
            [4, 5]
        );
        assert!(!admissions.wants_introduction(&reader, &stranger, false), "asked once");
    }

    #[test]
    fn rule_27_a_table_that_is_not_the_future_of_the_own_one_introduces_nobody() {
        let (state, mut admissions) = member(&founders());
        let reader = state.reader();
        let tables = [
            MemberTable {
                cluster_id: "00000000000000c2".into(),
                ..newer()
            },
            MemberTable {
                cluster_id: "nonsense".into(),
                ..newer()
            },
            MemberTable {
                applied_index: 1,
                ..newer()
            },
            MemberTable {
                members: vec![record(1), record(5)],
                ..newer()
            },
            MemberTable {
                members: vec![
                    record(1),
                    MemberRecord {
                        incarnation: 9,
                        ..record(4)
                    },
                ],
                ..newer()
            },
            MemberTable {
                members: vec![
                    record(1),
                    MemberRecord {
                        incarnation: 0,
                        ..record(4)
                    },
                ],
                ..newer()
            },
            MemberTable {
                members: vec![record(4), record(5)],
                ..newer()
            },
            MemberTable {
                members: vec![
                    MemberRecord {
                        incarnation: 9,
                        ..record(1)
                    },
                    record(4),
                ],
                ..newer()
            },
            MemberTable {
                removed: vec![2],
                ..newer()
            },
            MemberTable {
                removed: vec![2, 3, 5],
                ..newer()
            },
        ];
        for table in tables {
            let answer = admissions.introduce(&reader, (4, 104), table.clone());
            assert!(matches!(answer, Introduction::Refused(_)), "{table:?}");
        }
        assert_eq!(code(admissions.admit(&reader, &sender(4, None), follower)), UNKNOWN);
        assert_eq!(
            admissions.peers(&reader, &[]).iter().map(|peer| peer.id).collect::<Vec<_>>(),
            [2, 3]
        );
    }

    #[test]
    fn rule_27_a_member_that_hears_its_leader_asks_nobody() {
        let (state, mut admissions) = member(&founders());
        let four = url(4);
        assert!(!admissions.wants_introduction(&state.reader(), &sender(4, Some(&four)), true));
        assert!(
            !admissions.wants_introduction(&state.reader(), &sender(4, None), false),
            "no address to ask at"
        );
        let two = url(2);
        assert!(
            !admissions.wants_introduction(&state.reader(), &sender(2, Some(&two)), false),
            "known, and where it is"
        );
        assert!(
            admissions.wants_introduction(&state.reader(), &sender(2, Some(&four)), false),
            "it has moved"
        );
    }

    #[test]
    fn whoever_was_removed_meanwhile_hears_of_it_from_a_newer_table() {
        let (state, mut admissions) = member(&founders());
        let table = MemberTable {
            members: vec![record(4), record(5)],
            removed: vec![1, 2, 3],
            departed: vec![1, 2],
            ..newer()
        };
        assert_eq!(
            admissions.introduce(&state.reader(), (4, 104), table.clone()),
            Introduction::Removed
        );
        // Somebody there may need its vote: it knows them, so that it can give it, and goes on.
        let early = MemberTable {
            departed: vec![2],
            applied_index: 51,
            ..table
        };
        assert_eq!(admissions.introduce(&state.reader(), (4, 104), early), Introduction::Accepted);
    }

    #[test]
    fn an_id_added_by_hand_is_bound_to_what_comes_from_its_address() {
        let by_hand = MemberRecord {
            incarnation: 0,
            bound_by_url: true,
            ..record(2)
        };
        let (state, mut admissions) = member(&[record(1), by_hand]);
        let reader = state.reader();
        let (right, wrong) = (url(2), url(9));
        for elsewhere in [Some(&*wrong), None] {
            assert_eq!(code(admissions.admit(&reader, &sender(2, elsewhere), follower)), UNKNOWN);
        }
        assert_eq!(code(admissions.admit(&reader, &sender(2, Some(&right)), follower)), "admitted");
        let second = SenderIdentity {
            incarnation: 9,
            ..sender(2, Some(&right))
        };
        assert_eq!(code(admissions.admit(&reader, &second, follower)), REINCARNATED);
    }

    #[test]
    fn a_founder_is_bound_at_first_contact_wherever_it_comes_from() {
        let founder = MemberRecord {
            incarnation: 0,
            ..record(2)
        };
        let (state, mut admissions) = member(&[record(1), founder]);
        let proxy = url(9);
        assert_eq!(
            code(admissions.admit(&state.reader(), &sender(2, Some(&proxy)), follower)),
            "admitted"
        );
    }

    #[test]
    fn a_removed_member_speaks_to_the_leader_that_accompanies_it_and_to_nobody_else() {
        let (state, mut admissions) = member(&[record(1), record(2)]);
        assert_eq!(admissions.peers(&state.reader(), &[]).len(), 1);
        let (after, _) = member(&[record(1), record(3)]);
        // Removing is the state machine's business: another state stands for the time after it.
        assert_eq!(
            admissions
                .peers(&after.reader(), &[2])
                .iter()
                .map(|peer| peer.id)
                .collect::<Vec<_>>(),
            [2, 3]
        );
        assert!(admissions.is_seen(&sender(2, None)));
        let copy = SenderIdentity {
            incarnation: 9,
            ..sender(2, None)
        };
        assert!(!admissions.is_seen(&copy));
        assert_eq!(
            admissions
                .peers(&after.reader(), &[])
                .iter()
                .map(|peer| peer.id)
                .collect::<Vec<_>>(),
            [3]
        );
        assert!(!admissions.is_seen(&sender(2, None)));
    }

    /// Seed 2746 of the simulation: a learner told the member whose vote was needed.
    #[test]
    fn only_who_has_it_from_the_leader_says_that_a_removed_member_is_not_needed() {
        let (_, mut admissions) = member(&founders());
        let gone = sender(2, None);
        assert_eq!(code(admissions.admit_removed(&gone, &follower())), LEAVING);
        assert!(admissions.take_wish_for_departed(), "the leader is asked");
        assert!(!admissions.take_wish_for_departed(), "once");

        let others = MemberTable {
            departed: vec![3],
            ..newer()
        };
        admissions.learn_departed(&others);
        assert_eq!(code(admissions.admit_removed(&gone, &follower())), LEAVING);
        let foreign = MemberTable {
            cluster_id: "c2".to_owned(),
            departed: vec![2],
            ..newer()
        };
        admissions.learn_departed(&foreign);
        assert_eq!(code(admissions.admit_removed(&gone, &follower())), LEAVING);
        let says_so = MemberTable {
            departed: vec![2],
            ..newer()
        };
        admissions.learn_departed(&says_so);
        assert_eq!(code(admissions.admit_removed(&gone, &follower())), MEMBER_REMOVED);
    }

    #[test]
    fn a_leader_says_so_of_those_whom_it_does_not_accompany_any_more() {
        let (state, mut admissions) = member(&founders());
        let gone = sender(2, None);
        admissions.peers(&state.reader(), &[]);
        assert_eq!(code(admissions.admit_removed(&gone, &leader(&[2]))), "admitted");
        assert!(!admissions.has_departed(2, &leader(&[2])));
        assert_eq!(code(admissions.admit_removed(&gone, &leader(&[]))), MEMBER_REMOVED);
        assert!(admissions.has_departed(2, &leader(&[])));
        let fresh = View {
            knows_the_departed: false,
            ..leader(&[])
        };
        assert_eq!(
            code(admissions.admit_removed(&gone, &fresh)),
            LEAVING,
            "nothing of its term is committed"
        );
    }
}
