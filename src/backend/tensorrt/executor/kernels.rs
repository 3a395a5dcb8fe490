//! Kernel cache: kernels that TensorRT for RTX compiled when a plan first ran on a GPU, stored for later processes.
//!
//! The file is in the package's folder, or in the user's cache folder if the package is read-only. The library itself
//! rejects kernels of another version, GPU or driver; a digest detects damaged files.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::engine::{Package, user_cache};

const MAGIC: &[u8; 8] = b"aotronk1";
const DIGEST_BYTES: usize = 32;
/// Larger files are ignored. Kernels of the 8B model take tens of MB.
const MAX_BYTES: u64 = 1 << 30;

/// Kernel cache of one engine.
#[derive(Debug, Clone)]
pub(super) struct KernelCache {
    /// Candidate paths in order of preference.
    files: Vec<PathBuf>,
}

impl KernelCache {
    /// The cache for a plan file on a GPU model with a library version.
    pub(super) fn new(package: &Package, plan: &str, gpu: &str, version: &str) -> KernelCache {
        let name = format!("{plan}-{gpu}-{version}.kernels");
        let name: String = name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
        let digest = package.manifest().sha256.get(..16).unwrap_or_default();
        let beside = package.path().join("kernels").join(&name);
        let cached = user_cache().map(|cache| cache.join("kernels").join(format!("{digest}-{name}")));
        KernelCache { files: std::iter::once(beside).chain(cached).collect() }
    }

    /// Reads the kernels from the first intact file.
    pub(super) fn read(&self) -> Option<Vec<u8>> {
        self.files.iter().find_map(|file| read(file))
    }

    /// Atomically writes the first path that is writable.
    ///
    /// # Errors
    /// The reasons why no path is writable.
    pub(super) fn write(&self, kernels: &[u8]) -> Result<(), String> {
        let mut reasons = Vec::new();
        for file in &self.files {
            match write(file, kernels) {
                Ok(()) => return Ok(()),
                Err(error) => reasons.push(format!("{}: {error}", file.display())),
            }
        }
        Err(reasons.join("; "))
    }
}

fn read(file: &Path) -> Option<Vec<u8>> {
    let meta = fs::metadata(file).ok()?;
    if !meta.is_file() || meta.len() > MAX_BYTES {
        return None;
    }
    let bytes = fs::read(file).ok()?;
    let (digest, kernels) = bytes.strip_prefix(MAGIC)?.split_at_checked(DIGEST_BYTES)?;
    (Sha256::digest(kernels)[..] == *digest).then(|| kernels.to_vec())
}

fn write(file: &Path, kernels: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    // Temporary files are private by default, but whoever may read the package may use its kernels.
    let everyone = fs::Permissions::from_mode(0o666);
    let mut out = tempfile::Builder::new().prefix(".unfinished-").permissions(everyone).tempfile_in(folder)?;
    out.write_all(MAGIC)?;
    out.write_all(&Sha256::digest(kernels))?;
    out.write_all(kernels)?;
    out.as_file().sync_all()?;
    out.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_come_back_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let blocked = folder.path().join("blocked");
        fs::write(&blocked, "a file where a folder is wanted").unwrap();
        let kernel_cache = KernelCache { files: vec![blocked.join("kernels"), folder.path().join("cache/kernels")] };
        assert_eq!(kernel_cache.read(), None);
        kernel_cache.write(b"first").unwrap();
        kernel_cache.write(b"compiled").unwrap();
        assert_eq!(kernel_cache.read().as_deref(), Some(&b"compiled"[..]));
        assert_eq!(fs::read_dir(folder.path().join("cache")).unwrap().count(), 1, "no temporary file is left");

        let file = &kernel_cache.files[1];
        let whole = fs::read(file).unwrap();
        for damaged in [&whole[..whole.len() - 1], &whole[..20], b"", b"aotronk2"] {
            fs::write(file, damaged).unwrap();
            assert_eq!(kernel_cache.read(), None);
        }
        let kernel_cache = KernelCache { files: vec![blocked.join("kernels")] };
        assert!(kernel_cache.write(b"compiled").unwrap_err().contains("blocked"));
    }
}
