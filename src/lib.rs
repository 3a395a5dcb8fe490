//! aotron
pub mod backend;
pub mod checkpoint;
pub mod error;
pub mod mmap;
pub mod tensor;
pub mod tensor_file;
