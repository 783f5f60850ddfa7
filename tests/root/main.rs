//! Tests of the real binary that need root: overlay mounts, sockets of systemd, kills.
//!
//! Without root every one of them fails with a message that says so: none passes without having run. `contrib/test` counts
//! them as skipped there.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic anywhere and say what it did")]

mod attach;
mod circular;
#[path = "../cold/mod.rs"]
mod cold;
mod crash;
mod disk;
#[cfg(feature = "devicemapper")]
#[path = "../it/suite/driver.rs"]
mod driver_suite;
mod extract;
mod image;
mod keeper;
#[path = "../layers/mod.rs"]
mod layers;
mod lazy;
#[path = "../maker/mod.rs"]
mod maker;
mod mounts;
mod power;
mod process;
mod serve;
mod takeover;
#[cfg(feature = "devicemapper")]
mod thin;
mod unpack;
