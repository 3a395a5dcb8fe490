//! The CPU backend: the numerical reference, and the default where there is no GPU. At build time a graph is lowered to
//! a [`program::Program`] and packed weights; the executor maps both and runs the program.

pub mod executor;
pub mod kernels;
pub mod lower;
mod observe;
pub mod pack;
pub mod probe;
pub mod program;
mod run;
pub mod streamed;

pub use executor::{CpuExecutor, CpuModel, CpuOptions};
pub use observe::InputObserver;
