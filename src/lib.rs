//! aotron
pub mod backend;
pub mod checkpoint;
pub mod compile;
pub mod error;
pub mod graph;
pub mod model;
pub mod tensor;
pub use error::{Error, Result};
