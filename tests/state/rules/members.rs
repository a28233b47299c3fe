//! Members come, go and are known for ever (rules 21 to 25).

use super::*;

fn conf_entry(index: u64, change: &MembershipChange, transition: ConfChangeTransition) -> Entry {
    let mut raft_change = ConfChangeV2::default();
    raft_change.set_transition(transition);
    let ids = |kind, ids: Vec<u64>| ids.into_iter().map(move |id| (kind, id));
    let singles = ids(ConfChangeType::AddLearnerNode, change.add.iter().map(|member| member.id).collect())
        .chain(ids(ConfChangeType::AddNode, change.promote.clone()))
        .chain(ids(ConfChangeType::RemoveNode, change.remove.clone()));
    for (kind, id) in singles {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(kind);
        single.set_node_id(id);
        raft_change.mut_changes().push(single);
    }
    raft_change.context = change.encode_to_vec().into();
    raw_conf_entry(index, &raft_change)
}

fn raw_conf_entry(index: u64, raft_change: &ConfChangeV2) -> Entry {
    let mut entry = Entry::default();
    entry.set_entry_type(EntryType::EntryConfChangeV2);
    (entry.index, entry.term) = (index, TERM);
    entry.data = raft_change.write_to_bytes().unwrap().into();
    entry
}

fn conf_state(voters: &[u64], learners: &[u64], outgoing: &[u64]) -> ConfState {
    let mut conf = ConfState::from((voters.to_vec(), learners.to_vec()));
    conf.set_voters_outgoing(outgoing.to_vec());
    conf
}

fn change() -> MembershipChange {
    MembershipChange {
        proposer: 1,
        boot: 1,
        seq: 1,
        ..MembershipChange::default()
    }
}

impl Node {
    /// Runs a change as raft would; `after` is the configuration it comes to.
    fn change(&mut self, change: &MembershipChange, after: ConfState) -> Result<Success, Refusal> {
        let entry = conf_entry(self.next_index(), change, ConfChangeTransition::Auto);
        let conf = match self.state.begin_conf(&entry).unwrap() {
            ConfDecision::Apply(_) => after,
            ConfDecision::Refuse => self.state.applied().conf_state,
        };
        self.state.finish_conf(&entry, conf).unwrap().unwrap().1.result
    }

    fn member_ids(&self) -> Vec<u64> {
        self.reader().members().iter().map(|member| member.id).collect()
    }
}

fn code_of(result: &Result<Success, Refusal>) -> Option<ConflictCode> {
    match result {
        Err(Refusal::Conflict { code, .. }) => Some(*code),
        _ => None,
    }
}

#[test]
fn a_member_joins_as_a_learner_is_promoted_and_removed_and_its_id_never_comes_back() {
    let mut node = Node::new();
    let add = MembershipChange {
        add: vec![member(4)],
        ..change()
    };
    assert_eq!(node.change(&add, conf_state(&[1, 2, 3], &[4], &[])), Ok(Success::Done));
    assert_eq!(code_of(&node.change(&add, ConfState::default())), Some(ConflictCode::MemberExists));
    let promote = MembershipChange {
        promote: vec![4],
        ..change()
    };
    assert_eq!(node.change(&promote, conf_state(&[1, 2, 3, 4], &[], &[])), Ok(Success::Done));
    assert_eq!(
        code_of(&node.change(&promote, ConfState::default())),
        Some(ConflictCode::NotALearner)
    );
    let remove = MembershipChange {
        remove: vec![4],
        ..change()
    };
    assert_eq!(node.change(&remove, conf_state(&[1, 2, 3], &[], &[])), Ok(Success::Done));
    assert_eq!(node.member_ids(), [1, 2, 3]);
    node.state = State::open(node.store.clone()).unwrap();
    assert!(node.reader().is_removed(4));
    assert_eq!(code_of(&node.change(&add, ConfState::default())), Some(ConflictCode::MemberIdUsed));
    assert_eq!(node.reader().applied().conf_state.voters, [1, 2, 3]);
}

#[test]
fn one_that_leaves_by_joint_consensus_stays_known_until_the_joint_configuration_is_left() {
    let mut node = Node::new();
    node.change(
        &MembershipChange {
            add: vec![member(4)],
            replaces: 2,
            ..change()
        },
        conf_state(&[1, 2, 3], &[4], &[]),
    )
    .unwrap();
    assert_eq!(node.reader().members().last().unwrap().replaces, 2);
    let swap = MembershipChange {
        promote: vec![4],
        remove: vec![2],
        ..change()
    };
    node.change(&swap, conf_state(&[1, 3, 4], &[], &[1, 2, 3])).unwrap();
    assert_eq!((node.member_ids(), node.reader().is_removed(2)), (vec![1, 2, 3, 4], false));
    let meanwhile = MembershipChange {
        add: vec![member(5)],
        ..change()
    };
    assert_eq!(
        code_of(&node.change(&meanwhile, ConfState::default())),
        Some(ConflictCode::ChangeInProgress)
    );
    let leave = raw_conf_entry(node.next_index(), &ConfChangeV2::default());
    assert!(matches!(node.state.begin_conf(&leave).unwrap(), ConfDecision::Apply(_)));
    assert_eq!(node.state.finish_conf(&leave, conf_state(&[1, 3, 4], &[], &[])).unwrap(), None);
    assert_eq!((node.member_ids(), node.reader().is_removed(2)), (vec![1, 3, 4], true));
    assert_eq!(node.reader().members().last().unwrap().replaces, 0);
}

#[test]
fn changes_that_cannot_be_are_refused_and_leave_everything_as_it_was() {
    let mut node = Node::of(std::sync::Arc::new(metcd::store::MemoryStore::new()), &[1]);
    let before = node.records();
    let last = MembershipChange {
        remove: vec![1],
        ..change()
    };
    assert_eq!(code_of(&node.change(&last, ConfState::default())), Some(ConflictCode::UnsafeChange));
    let same_address = MembershipChange {
        add: vec![MemberRecord { id: 9, ..member(1) }],
        ..change()
    };
    assert_eq!(
        code_of(&node.change(&same_address, ConfState::default())),
        Some(ConflictCode::MemberExists)
    );
    let nobody = MembershipChange {
        promote: vec![8],
        ..change()
    };
    assert_eq!(node.change(&nobody, ConfState::default()), Err(Refusal::MemberNotFound { id: 8 }));
    let leave = raw_conf_entry(node.next_index(), &ConfChangeV2::default());
    assert_eq!(node.state.begin_conf(&leave).unwrap(), ConfDecision::Refuse);
    let differs = |after: &metcd::state::Record| after.table != metcd::store::Table::Meta && !before.contains(after);
    assert_eq!(node.records().iter().filter(|record| differs(record)).count(), 0);
    assert_eq!(node.reader().applied().conf_state.voters, [1]);
}

#[test]
fn a_raft_change_that_says_something_else_than_its_membership_change_is_refused() {
    let mut node = Node::new();
    let honest = conf_entry(
        2,
        &MembershipChange {
            add: vec![member(4)],
            ..change()
        },
        ConfChangeTransition::Auto,
    );
    let mut forged = ConfChangeV2::parse_from_bytes(&honest.data).unwrap();
    forged.mut_changes()[0].set_change_type(ConfChangeType::AddNode);
    assert_eq!(node.state.begin_conf(&raw_conf_entry(2, &forged)).unwrap(), ConfDecision::Refuse);
    forged.context = Bytes::new();
    assert_eq!(node.state.begin_conf(&raw_conf_entry(2, &forged)).unwrap(), ConfDecision::Refuse);
    assert!(matches!(node.state.begin_conf(&honest).unwrap(), ConfDecision::Apply(_)));
}

#[test]
fn a_removed_members_late_proposals_are_void() {
    let mut node = Node::new();
    node.apply(&payload(3, 1, 1, vec![command(1, Body::Put(put(b"a", b"1")))]));
    node.change(
        &MembershipChange {
            remove: vec![3],
            ..change()
        },
        conf_state(&[1, 2], &[], &[]),
    )
    .unwrap();
    assert_eq!(node.apply(&payload(3, 1, 1, vec![command(1, Body::Put(put(b"a", b"again")))])), []);
    assert_eq!(node.value(b"a").as_deref(), Some(&b"1"[..]));
}

#[test]
fn a_member_is_bound_to_its_first_data_directory() {
    let mut node = Node::new();
    let bind = |incarnation| {
        Body::MemberUpdate(MemberUpdate {
            id: 2,
            incarnation: Some(incarnation),
            ..MemberUpdate::default()
        })
    };
    assert_eq!(node.run(bind(5)).result, Ok(Success::Done));
    assert_eq!(node.run(bind(5)).result, Ok(Success::Done));
    assert_eq!(code_of(&node.run(bind(6)).result), Some(ConflictCode::MemberIdUsed));
    let unknown = Body::MemberUpdate(MemberUpdate {
        id: 9,
        ..MemberUpdate::default()
    });
    assert_eq!(refusal(&node.run(unknown)), Some(&Refusal::MemberNotFound { id: 9 }));
}

#[test]
fn the_clusters_feature_level_is_the_lowest_of_all_members_and_never_falls() {
    let mut node = Node::new();
    let level = |id, level| {
        Body::MemberUpdate(MemberUpdate {
            id,
            feature_level: Some(level),
            ..MemberUpdate::default()
        })
    };
    node.run(level(1, 3));
    node.run(level(2, 2));
    assert_eq!(node.reader().feature_level(), 1);
    node.run(level(3, 4));
    assert_eq!(node.reader().feature_level(), 2);
    node.run(level(3, 1));
    assert_eq!(node.reader().feature_level(), 2);
}
