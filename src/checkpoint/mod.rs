//! Readers of checkpoints: a folder becomes a config and named, validated, memory-mapped tensors.

mod config;

pub use config::ModelConfig;
