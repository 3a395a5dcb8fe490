//! aotron
pub mod backend;
pub mod checkpoint;
pub mod error;
pub mod runtime;
pub mod tensor;
pub mod text;
