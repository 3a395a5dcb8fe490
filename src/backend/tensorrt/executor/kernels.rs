//! Kernel cache: kernels that TensorRT for RTX compiled when a plan first ran on a GPU, stored for later processes.
//!
//! The file is in the user's cache folder and nowhere else: kernels are code, and a package may be anyone's. The library
//! itself rejects kernels of another version, GPU or driver; a digest detects damaged files.

use std::path::PathBuf;

use crate::engine::{Package, plain_name, read_digested, user_cache, write_digested};

const MAGIC: &[u8; 8] = b"aotronk1";
/// Larger files are ignored. Kernels of the 8B model take tens of MB.
const MAX_BYTES: u64 = 1 << 30;

/// Kernel cache of one engine.
#[derive(Debug, Clone)]
pub(super) struct KernelCache {
    /// `None` if the user has no cache folder.
    file: Option<PathBuf>,
}

impl KernelCache {
    /// The cache for a plan file on a GPU model with a library version.
    pub(super) fn new(package: &Package, plan: &str, gpu: &str, version: &str) -> KernelCache {
        let name = format!("{}-{plan}-{gpu}-{version}.kernels", package.manifest().sha256);
        KernelCache { file: user_cache().map(|cache| cache.join("kernels").join(plain_name(&name))) }
    }

    /// Reads the kernels if the file is intact.
    pub(super) fn read(&self) -> Option<Vec<u8>> {
        read_digested(self.file.as_deref()?, MAGIC, MAX_BYTES)
    }

    /// Writes the file atomically.
    ///
    /// # Errors
    /// The reason why it cannot be written.
    pub(super) fn write(&self, kernels: &[u8]) -> Result<(), String> {
        let Some(file) = &self.file else {
            return Err("neither XDG_CACHE_HOME nor HOME names a folder".into());
        };
        write_digested(file, MAGIC, kernels).map_err(|error| format!("{}: {error}", file.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn kernels_come_back_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cache/kernels");
        let kernel_cache = KernelCache { file: Some(file.clone()) };
        assert_eq!(kernel_cache.read(), None);
        kernel_cache.write(b"first").unwrap();
        kernel_cache.write(b"compiled").unwrap();
        assert_eq!(kernel_cache.read().as_deref(), Some(&b"compiled"[..]));
        assert_eq!(fs::read_dir(folder.path().join("cache")).unwrap().count(), 1, "no temporary file is left");

        let whole = fs::read(&file).unwrap();
        for damaged in [&whole[..whole.len() - 1], &whole[..20], b"", b"aotronk2"] {
            fs::write(&file, damaged).unwrap();
            assert_eq!(kernel_cache.read(), None);
        }
        let blocked = KernelCache { file: Some(file.join("kernels")) };
        assert!(blocked.write(b"compiled").unwrap_err().contains("cache/kernels/kernels: "));
        let nowhere = KernelCache { file: None };
        assert_eq!(nowhere.read(), None);
        assert!(nowhere.write(b"compiled").unwrap_err().contains("XDG_CACHE_HOME"));
    }

    #[test]
    fn a_planted_link_is_replaced_and_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (precious, link) = (folder.path().join("precious"), folder.path().join("kernels"));
        fs::write(&precious, "mine").unwrap();
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        KernelCache { file: Some(link.clone()) }.write(b"compiled").unwrap();
        assert_eq!(fs::read_to_string(&precious).unwrap(), "mine");
        assert!(!fs::symlink_metadata(&link).unwrap().is_symlink());
    }
}
