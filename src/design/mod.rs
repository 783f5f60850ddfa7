//! The design pages.

#[doc = include_str!("flows.md")]
pub mod flows {}

#[doc = include_str!("decisions.md")]
pub mod decisions {}

#[doc = include_str!("recovery.md")]
pub mod recovery {}
#[doc = include_str!("operations.md")]
pub mod operations {}
