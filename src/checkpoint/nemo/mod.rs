//! A `.nemo`: what NeMo's training framework saves, as an archive or as the folder it unpacks to.

pub(super) mod container;
pub(super) mod zarr;
