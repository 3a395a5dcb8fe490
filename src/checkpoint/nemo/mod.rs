//! A `.nemo`: what NeMo's training framework saves, as an archive or as the folder it unpacks to.

pub(super) mod container;
pub(super) mod torch_dist;
pub(super) mod zarr;

/// Whether `name` is a state of Transformer Engine, which computing with the weights does not need.
fn is_extra_state(name: &str) -> bool {
    name.contains("_extra_state")
}
