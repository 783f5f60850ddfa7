//! Conformance: what every implementation of a trait must do.

pub(crate) mod chunk_store;
pub(crate) mod driver;
