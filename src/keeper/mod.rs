//! A second, small process that holds descriptors for the daemon, so that they outlive it.
//!
//! **What.** The kernel ends a FUSE connection when the last descriptor of `/dev/fuse` is closed, and memory that is only
//! a descriptor is gone with it. The daemon therefore leaves a copy of such descriptors with the *keeper* (`speedy keeper`).
//! While the daemon is down, who reads a file that it serves waits; the next daemon takes the descriptors back and goes on.
//!
//! **Where.** [`process`] is the keeper itself, one thread that knows nothing but names and descriptors; [`client`] is the
//! daemon's side; [`protocol`] is what they say to each other, over the messages of [`crate::sys::fdpass`].
//!
//! **Words.** *Owner*: the daemon whose connection counts. *Dead-man time*: how long descriptors wait for a new owner.
//! *Handover*: what a keeper leaves to the program that it becomes in an upgrade.
//!
//! **Invariants.**
//! 1. There is one owner at most. Who says hello is it, at once; its predecessor's connection is closed.
//! 2. What is held is dropped only at the owner's word, at the end of the dead-man time, and at SIGTERM; never by an upgrade.
//! 3. In the last two cases the FUSE connection is aborted first, so that readers get an error and do not wait for ever.
//! 4. Each request has one answer. No peer, whatever it sends or does not read, keeps the keeper from others.
//! 5. The keeper needs no file of its own while it runs, and refuses to run from what may itself need the daemon.
//!
//! **When it fails.** When the keeper dies the daemon still has its descriptors, sees that the connection ended
//! ([`client::Keeper::lost`]), starts another and leaves everything there again. When both die the kernel aborts the
//! connection. An upgrade that fails leaves the keeper as it was.

pub mod circular;
pub mod client;
mod handover;
mod held;
pub mod process;
pub mod protocol;
