//! Layers on the object store: the formats, whose word is taken, publishing and finding again.

mod collect;
mod containerd;
mod documents;
mod index;
mod names;
mod publish;
mod registry;
mod support;
mod traces;
mod trust;
