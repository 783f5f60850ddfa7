//! Guards of collecting, each by a name, so that a test can take one away and see whether the simulated fleet notices: `GUARDS` in
//! `cli::fsck::tests::month`. What else keeps a collection from harm has tests of its own in `collect::tests`.
//!
//! Outside of tests every guard holds, and [`Guards`] is nothing at all.

/// What must not be left out. [`super::collect`] has the argument that each is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guard {
    /// A collection reads names and refs again before it deletes.
    SecondReading,
    /// Nothing is deleted that is younger than the grace period.
    Grace,
    /// Names are deleted before what they name.
    Order,
    /// The index of a ref that goes is made young before: what only that needs is kept for another grace period.
    RenewIndex,
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
