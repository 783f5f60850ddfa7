//! The guards of collecting and publishing, each by a name, so that a test can take one away and see whether the simulated fleet notices.
//! `GUARDS` in `cli::fsck::tests::month` lists those whose lack it is known to notice. Of the others that is not shown yet.
//!
//! Outside of tests every guard holds, and [`Guards`] is nothing at all.

/// What must not be left out. [`super::collect`] has the argument that each is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guard {
    /// A collection reads names and refs again before it deletes.
    SecondReading,
    /// Nothing is deleted that is younger than the grace period.
    Grace,
    /// Each object is looked at right before it is deleted.
    LastLook,
    /// Names are deleted before what they name.
    Order,
    /// What only a ref needs that goes now is kept for another grace period.
    Decay,
    /// For that its index is made young before the ref goes.
    RenewIndex,
    /// A collector whose clock is wrong deletes nothing.
    Clock,
    /// Publishers wait for a collection that is under way, and look again.
    Notice,
    /// A publisher makes old chunks young that it reuses.
    RenewChunks,
    /// A publisher that was slow looks at everything again.
    LookAgain,
    /// A ref is written after its index and its chunks.
    RefLast,
    /// A name is written after the refs of its layers.
    NameLast,
    /// A ref that a name relies on is made young before the name is written.
    RenewRefs,
    /// A name whose layer has no ref stops a collection: the ref may be brought back.
    LostRefs,
}

/// Which guards hold: all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Guards {
    #[cfg(test)]
    pub(crate) without: Option<Guard>,
}

impl Guards {
    /// Whether this one does.
    #[cfg(test)]
    pub(crate) fn hold(self, guard: Guard) -> bool {
        self.without != Some(guard)
    }

    /// Whether this one does.
    #[cfg(not(test))]
    pub(crate) fn hold(self, _: Guard) -> bool {
        true
    }
}
