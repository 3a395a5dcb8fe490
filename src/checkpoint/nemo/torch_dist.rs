//! Distributed checkpoints of torch.

use super::container::Container;
use crate::checkpoint::sharded::ShardedTensor;
use crate::error::{Error, Result};

pub(in crate::checkpoint) fn tensors(container: &Container, _: &str) -> Result<Vec<(String, ShardedTensor)>> {
    Err(Error::unsupported(container.path(), "a distributed checkpoint of torch"))
}
