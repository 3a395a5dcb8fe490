//! aotron
pub mod backend;
pub mod checkpoint;
pub mod compile;
pub mod engine;
pub mod error;
pub mod graph;
pub mod mmap;
pub mod model;
pub mod runtime;
pub mod tensor;
pub mod tensor_file;
pub mod text;

pub use error::{Error, Result};
