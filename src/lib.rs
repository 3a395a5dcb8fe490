//! aotron
pub mod backend;
pub mod checkpoint;
pub mod error;
pub mod tensor;
pub mod text;
