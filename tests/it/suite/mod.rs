//! Conformance: what every implementation of a trait must do.

pub(crate) mod driver;
