//! A fleet to try things on, and what a collection refuses. `cli::fsck::tests::month` is what the fleet does for a month.

pub(crate) mod catalogue;
mod publishers;
mod refusals;
