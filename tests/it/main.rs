//! Tests that need no root, no network and no kernel feature: seconds on any machine.
//!
//! `suite` holds what every implementation of a trait must do; the other modules are named after what they put to the test.

#![allow(clippy::unwrap_used, clippy::type_complexity, reason = "a test that fails may panic anywhere")]

mod apply;
mod architecture;
mod below;
mod check;
mod chunks;
mod cli;
#[path = "../cold/mod.rs"]
mod cold;
mod content;
mod drivers;
mod faults;
mod fuzz;
mod image;
mod keeper;
mod layer_records;
#[path = "../layers/mod.rs"]
mod layers;
#[path = "../maker/mod.rs"]
mod maker;
mod metadata;
mod model;
mod monitoring;
mod objects;
mod reads;
mod s3;
mod suite;
mod support;
mod units;
