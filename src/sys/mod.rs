//! The kernel's door: the only module that makes raw system calls, and the only one where `unsafe` may appear.
//!
//! Everything here is blocking and knows nothing of snapshots. Callers on the async side go through
//! [`blocking()`].

#![allow(unsafe_code, reason = "raw system calls live here; each block states why it is sound")]

pub mod beneath;
pub mod blockdev;
mod blocking;
pub mod decimal;
pub mod direct;
pub mod extent;
pub mod fdpass;
pub mod fuse;
pub mod fusectl;
pub mod host;
pub mod idmap;
pub mod lease;
pub mod limits;
pub mod lock;
pub mod loopdev;
pub mod memory;
pub mod mount;
pub mod mountinfo;
pub mod program;
pub mod readahead;
pub mod reserve;
pub mod shared;
pub mod signals;
pub mod socket;
pub mod space;
pub mod terminal;
pub mod tree;

pub use blocking::blocking;
