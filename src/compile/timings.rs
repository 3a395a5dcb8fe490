//! Timings of kernels that TensorRT 11 measured while it selected them, kept for the plans that follow: those of a build,
//! whose capacity classes share most kernels, and those of later builds.
//!
//! The file is in the user's cache folder and nowhere else, since it decides which kernels are selected, and a package
//! may be anyone's. TensorRT itself rejects timings of another version or GPU; a digest detects damaged files. TensorRT for
//! RTX selects kernels when a plan first runs and has no timings.

use std::path::PathBuf;

use crate::engine::{plain_name, read_digested, user_cache, write_digested};

const MAGIC: &[u8; 8] = b"aotront1";
/// Larger files are ignored.
const MAX_BYTES: u64 = 256 << 20;

/// The timings for a library version on a GPU model.
#[derive(Debug, Clone)]
pub(super) struct KernelTimings {
    /// `None` if the user has no cache folder: then they last for this build.
    file: Option<PathBuf>,
    content: Vec<u8>,
}

impl KernelTimings {
    /// The timings kept for a GPU model and a library version, empty if there are none.
    pub fn of(gpu: &str, version: &str) -> KernelTimings {
        let name = plain_name(&format!("{gpu}-{version}.timings"));
        KernelTimings::in_file(user_cache().map(|cache| cache.join("timings").join(name)))
    }

    fn in_file(file: Option<PathBuf>) -> KernelTimings {
        let content = file.as_deref().and_then(|file| read_digested(file, MAGIC, MAX_BYTES));
        KernelTimings { file, content: content.unwrap_or_default() }
    }

    /// The timings for the next plan.
    pub fn content(&self) -> &[u8] {
        &self.content
    }

    /// Takes the timings that a build ended with, and keeps them if there are more than before.
    ///
    /// # Errors
    /// The reason why they cannot be kept; the next plan gets them all the same.
    pub fn update(&mut self, content: &[u8]) -> Result<(), String> {
        if content.is_empty() || content == self.content {
            return Ok(());
        }
        self.content = content.to_vec();
        let file = self.file.as_ref().ok_or("neither XDG_CACHE_HOME nor HOME names a folder")?;
        let written = write_digested(file, MAGIC, &self.content);
        written.map_err(|error| format!("{}: {error}", file.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timings_are_kept_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cache/H100-11.4.0.timings");
        let mut timings = KernelTimings::in_file(Some(file.clone()));
        assert_eq!(timings.content(), b"");
        timings.update(b"").unwrap();
        assert!(!file.exists(), "a library without timings leaves no file");
        timings.update(b"one plan").unwrap();
        timings.update(b"two plans").unwrap();
        assert_eq!(KernelTimings::in_file(Some(file.clone())).content(), b"two plans");

        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(KernelTimings::in_file(Some(file.clone())).content(), b"");
        let mut nowhere = KernelTimings::in_file(None);
        assert!(nowhere.update(b"plan").unwrap_err().contains("XDG_CACHE_HOME"));
        assert_eq!(nowhere.content(), b"plan", "the next plan of the build has them");
    }
}
