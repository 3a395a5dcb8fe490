//! Ahead of time: a checkpoint becomes an engine package.
pub mod passes;
