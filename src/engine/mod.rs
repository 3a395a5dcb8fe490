//! The engine package: a folder with everything needed to run a model.
//!
//! ```text
//! engine.json          the manifest: what the package is, its plans, every file's size and SHA-256
//! plans/<target>.*     what a target executes
//! weights/*.safetensors  packed weights, mapped and read in place
//! tokenizer.aotron     the tokenizer, in one form whichever file it came from
//! reference.json       what the CPU executor answered at build, see [`crate::verify`]
//! ```

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod limits;
mod manifest;
mod package;
pub mod tensorrt;
mod user_cache;
mod writer;

pub use limits::Limits;
pub use manifest::{
    CheckpointInfo, FORMAT_VERSION, FileInfo, GenerationSettings, MANIFEST_NAME, Manifest, PlanInfo, TokenizerInfo,
};
pub use package::{Package, is_package};
pub use user_cache::user_cache;
pub(crate) use user_cache::{plain_name, read_digested, write_digested};
pub use writer::{PackageFile, PackageWriter};
