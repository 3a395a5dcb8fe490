//! The CPU backend: the reference for numerics and the default where there is no GPU. A graph is lowered to a
//! [`program::Program`] and packed weights at build time; the executor maps both and runs them.

pub mod executor;
pub mod kernels;
pub mod lower;
pub mod pack;
pub mod program;
mod run;

pub use executor::{CpuExecutor, CpuModel, CpuOptions};
