//! The fuzz targets of `fuzz/`: each runs one reader of untrusted files or requests on bytes in memory and checks invariants
//! that hold for any bytes. Refusing the input is fine, with a short message of one line.
//!
//! This is not part of the library's API. It is compiled only for the fuzz targets, which set `cfg(fuzzing)`, and for
//! the tests, which run the same checks on inputs that once failed them (`tests/data/fuzz`). Each module has its own
//! checks.

use crate::error::Error;

pub use crate::backend::fuzzing::plan;
pub use crate::checkpoint::fuzzing::{json, metadata, nemo, pickle, tar, torch_dist, yaml, zarr, zip};
pub use crate::engine::fuzzing::manifest;
#[cfg(feature = "serve")]
pub use crate::serve::fuzzing::{chat, grammar, open_server, tensors};
pub use crate::tensor_file::fuzzing::safetensors;
pub use crate::text::fuzzing::sentencepiece;

/// The longest message: a few names, each clipped to 200 characters, and the words around them.
const MAX_MESSAGE_BYTES: usize = 4096;

/// Checks the message of a refusal: text from the file may neither contain line breaks or terminal escape sequences nor
/// flood the terminal.
pub(crate) fn check_message(message: &str) {
    assert!(!message.is_empty() && message.len() <= MAX_MESSAGE_BYTES, "a message of {} bytes", message.len());
    assert!(!message.chars().any(char::is_control), "a message with control characters: {message:?}");
}

/// Checks the message of an error as [`check_message`] does.
pub(crate) fn check_refusal(error: &Error) {
    check_message(&error.to_string());
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// The check that a target runs on an input.
    type Check = fn(&[u8]);

    /// All targets.
    const TARGETS: &[(&str, Check)] = &[
        #[cfg(feature = "serve")]
        ("chat", super::chat),
        #[cfg(feature = "serve")]
        ("grammar", super::grammar),
        #[cfg(feature = "serve")]
        ("tensors", super::tensors),
        ("json", super::json),
        ("manifest", super::manifest),
        ("metadata", super::metadata),
        ("nemo", super::nemo),
        ("pickle", super::pickle),
        ("plan", super::plan),
        ("safetensors", super::safetensors),
        ("sentencepiece", super::sentencepiece),
        ("tar", super::tar),
        ("torch_dist", super::torch_dist),
        ("yaml", super::yaml),
        ("zarr", super::zarr),
        ("zip", super::zip),
    ];

    /// Runs a target's check on every file in a folder, and returns their number.
    fn run(folder: &Path, check: Check) -> usize {
        let Ok(files) = fs::read_dir(folder) else { return 0 };
        let files = files.map(|file| file.unwrap().path());
        let run = |path: std::path::PathBuf| {
            println!("{}", path.display());
            check(&fs::read(path).unwrap());
        };
        files.map(run).count()
    }

    #[test]
    fn inputs_that_once_failed_and_seeds_pass() {
        for (target, check) in TARGETS {
            let seeds = run(&Path::new("fuzz/seeds").join(target), *check);
            println!(
                "{target}: {seeds} seeds, {} regressions",
                run(&Path::new("tests/data/fuzz").join(target), *check)
            );
        }
        assert!(run(Path::new("tests/data/torch"), super::zip) > 0);
    }
}
