//! Known bugs that can be put back in, one at a time, to prove that the simulation finds them. Only with the feature `mutants`, which a
//! release build refuses; without it `mutant!` is the constant `false`.

#[cfg(all(feature = "mutants", not(debug_assertions)))]
compile_error!("the feature `mutants` puts bugs in: it is for the simulation only, never for a release build");

/// Whether a bug is switched on in this thread.
#[cfg(feature = "mutants")]
macro_rules! mutant {
    ($name:ident) => {
        $crate::mutants::is_on($crate::mutants::Mutant::$name)
    };
}

/// Whether a bug is switched on: never, in this build.
#[cfg(not(feature = "mutants"))]
macro_rules! mutant {
    ($name:ident) => {
        false
    };
}

#[cfg(feature = "mutants")]
pub use switch::*;

#[cfg(feature = "mutants")]
mod switch {
    use std::cell::Cell;

    macro_rules! mutants {
        ($($(#[$doc:meta])* $name:ident,)*) => {
            /// The bugs.
            #[derive(Debug, Clone, Copy, PartialEq, Eq)]
            pub enum Mutant { $($(#[$doc])* $name,)* }
            /// All of them.
            pub const ALL: &[Mutant] = &[$(Mutant::$name,)*];
        };
    }

    mutants! {
        /// Votes and acknowledgements leave before the sync.
        SendBeforeSync,
        /// The own log counts as durable before the sync.
        CountBeforeSync,
        /// Term and vote are not written.
        DropHardState,
        /// A vote is forgotten at a restart.
        ForgetVote,
        /// A ReadIndex context is used again.
        ReuseReadContext,
        /// A read does not wait until its index is applied.
        ReadBeforeApplied,
        /// A read is answered without asking a quorum.
        ReadWithoutQuorum,
        /// A new leader answers reads before anything is committed in its term.
        ReadInAnyTerm,
        /// What is proposed again gets a new sequence.
        NewSequence,
        /// A command that was handed over is reported as never applied.
        CancelAfterHandOver,
        /// The session does not recognise what was applied.
        ApplyTwice,
        /// The idempotency table does not recognise a request.
        ForgetIdempotency,
        /// Nor does it only a delete.
        DeleteAgain,
        /// Nor only a transaction.
        TxnAgain,
        /// A snapshot lacks the sessions.
        SnapshotWithoutSessions,
        /// A snapshot lacks the idempotency records.
        SnapshotWithoutIdempotency,
        /// A snapshot lacks the leases.
        SnapshotWithoutLeases,
        /// A snapshot lacks the removed ids.
        SnapshotWithoutRemoved,
        /// A transaction of several writes takes two revisions.
        TwoRevisions,
        /// A watch delivers a revision twice.
        WatchTwice,
        /// A watch leaves a revision out.
        WatchSkips,
        /// The end of a lease holds in any term.
        ExpireInAnyTerm,
        /// In the simulation's duties: a follower ends leases by its own clock, which hears of no renewal.
        ExpireOnFollowers,
        /// The leap of a clock counts as time that has passed.
        TrustLeaps,
        /// A new leader does not give leases their full ttl.
        ShortLeases,
        /// A lease whose end is proposed is renewed.
        RenewExpiring,
        /// A renewal is answered and does not count.
        RenewNothing,
        /// A configuration change takes effect when it is appended.
        ConfAtAppend,
        /// A failed `If-Match` writes all the same.
        IgnoreConditions,
        /// The second key of a range delete stays.
        DeleteLess,
        /// A committed entry is applied before it is committed: at append.
        ApplyAtAppend,
        /// The log is cut two entries behind what is durable elsewhere.
        CompactTooFar,
        /// In the simulation's driver: the log begins anew before the snapshot is adopted.
        ClearLogFirst,
        /// Put back, in the simulation's driver: a snapshot is installed in front of entries that are on their way to the state machine.
        InstallInFront,
        /// What lies below a session's low-water mark counts as new.
        ForgetLowWater,
        /// After a restart learners count as voters.
        LearnerVotes,
        /// Put back: a snapshot from before a member was added is offered to it.
        OldOffer,
        /// Put back: a configuration change takes effect before it is durable that it is committed.
        LazyConfCommit,
        /// Put back: whoever knows of a removal tells the removed member, needed or not.
        TellEarly,
        /// Put back: the terms of a log are noted twice at a start where its end spans several.
        NoteTermsTwice,
        /// Put back: a removed leader goes on.
        RemovedLeader,
        /// Put back: the end of a wholly applied log is not known at start.
        ForgetLogEnd,
        /// Put back: a learner seems dead just after each check of the quorum.
        ForgetHeard,
    }

    thread_local! {
        static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Switches one on (or all off) in this thread.
    pub fn switch(mutant: Option<Mutant>) {
        ON.set(mutant);
    }

    /// Whether it is on.
    pub fn is_on(mutant: Mutant) -> bool {
        ON.get() == Some(mutant)
    }
}
