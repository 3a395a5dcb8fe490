//! A `.nemo`: what NeMo's training framework saves, as an archive or as the folder it unpacks to.

pub(super) mod artifacts;
pub(super) mod config;
pub(super) mod container;
