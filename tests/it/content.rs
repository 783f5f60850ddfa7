//! Layers on the object store: the formats, whose word is taken, publishing and finding again.

mod containerd;
mod index;
mod names;
mod publish;
mod support;
mod traces;
mod trust;
