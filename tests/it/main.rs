//! Tests that need no root, no network and no kernel feature: seconds on any machine.
//!
//! `suite` holds what every implementation of a trait must do; the other modules are named after what they put to the test.

#![allow(clippy::unwrap_used, reason = "a test that fails may panic anywhere")]

mod architecture;
mod cli;
mod drivers;
mod faults;
mod metadata;
mod model;
mod suite;
mod support;
