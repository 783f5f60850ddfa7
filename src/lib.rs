//! Speedy, a containerd proxy snapshotter.
//!
//! `speedy serve` answers containerd's snapshots API on a unix socket over overlayfs. See the [README](readme) for what it is
//! to its users and [`design`] for why it has this shape.
//!
//! # The map
//!
//! A module imports only from lower tiers and from its own folder; `tests/it/architecture.rs` proves it.
//!
//! | tier | modules | what |
//! |---|---|---|
//! | 7 assembly | [`cli`], [`daemon`], [`config`] | arguments, composition, settings |
//! | 6 wire | [`service`] | gRPC in, codes out |
//! | 5 domain | [`snapshot`] | use cases, records, filters, reconcile |
//! | 4 mechanisms | [`driver`], [`layer`], [`registry`] | where bytes live on this node: snapshots, layer images; a registry's answers while it is away |
//! | 3 content | [`content`] | layers on the object store: indexes, refs, publishing |
//! | 2 pieces | [`chunk`], [`image`] | where layer images are cut and how they are stored; how a tar becomes one |
//! | 1 servers | [`object`], [`containerd`], [`keeper`] | the object store, containerd, the process that keeps descriptors |
//! | 0 ground | [`oci`], [`sys`], [`telemetry`], [`proto`] | names, the kernel, what the outside sees, generated messages |
//!
//! # A newcomer's path
//!
//! README → [`design::flows`] → [`snapshot`] → [`snapshot::snapshotter`] → [`driver`] → [`driver::overlay`].
//!
//! # Words
//!
//! *key*, *name*, *parent*: an active snapshot, a committed one, the committed one below. *Id*: our stable number beneath a
//! key. *view*, *active*, *committed*: the kinds. *chain ID*, *diff ID*: OCI's. *ref*: the chain ID a Prepare asks for.
//! *upperdir*, *lowerdir*, *workdir*: overlayfs's. *reconcile*: bring records and storage of this node together.

pub mod chunk;
pub mod cli;
pub mod config;
pub mod containerd;
pub mod content;
pub mod daemon;
pub mod design;
pub mod driver;
pub mod image;
pub mod keeper;
pub mod layer;
pub mod object;
pub mod oci;
pub mod registry;
pub mod service;
pub mod snapshot;
pub mod sys;
pub mod telemetry;

#[doc = include_str!("../README.md")]
pub mod readme {}

/// Generated from `proto/` by `build.rs`.
#[allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all, reason = "generated code")]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto.rs"));
}
