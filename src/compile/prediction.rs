//! Predicts the disk space and memory of a build before anything is written.

use std::path::Path;

use crate::error::{Error, Result};

/// Resources that a build needs. Weight sizes are exact up to their headers; the sizes of TensorRT's plans and
/// TensorRT's own memory are estimates from measured builds (docs/gpu-builds.md).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prediction {
    /// Bytes of weights to read.
    pub read_bytes: u64,
    /// The package's large files and their bytes.
    pub files: Vec<(String, u64)>,
    /// Bytes of files that exist only during the build.
    pub scratch_bytes: u64,
    /// Peak private memory. Mapped files do not count: their pages can be evicted.
    pub memory_bytes: u64,
    /// Free space on the output's disk, if the system reports it.
    pub free_disk_bytes: Option<u64>,
    /// Available memory (free or reclaimable), if the system reports it.
    pub available_memory_bytes: Option<u64>,
}

impl Prediction {
    /// Peak disk usage, including temporary files.
    pub fn disk_bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes).sum::<u64>() + self.scratch_bytes
    }

    /// Rejects a build that does not fit this machine.
    ///
    /// # Errors
    /// [`Error::Package`] with what is needed, what is available, and what to do.
    pub fn check(&self, output: &Path) -> Result<()> {
        let disk = self.disk_bytes();
        if let Some(free) = self.free_disk_bytes.filter(|free| *free < disk) {
            let detail = format!(
                "the build needs {disk} bytes of disk space, but only {free} are free; free some space, choose another \
                 output (-o), or build fewer plans at once"
            );
            return Err(Error::package(output, detail));
        }
        let memory = self.memory_bytes;
        if let Some(available) = self.available_memory_bytes.filter(|available| *available < memory) {
            let detail = format!(
                "the build needs about {memory} bytes of memory, but only {available} are available; build fewer plans at \
                 once, or use a precision whose weights are not part of the plan"
            );
            return Err(Error::package(output, detail));
        }
        Ok(())
    }
}

/// Free bytes on the disk that holds `path`, or will hold it once it exists; `None` if the system does not report it.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let absolute = std::path::absolute(path).ok()?;
    let existing = absolute.ancestors().find(|ancestor| ancestor.exists())?;
    let stat = rustix::fs::statvfs(existing).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_does_not_fit() {
        let files = vec![("weights/a".to_owned(), 700), ("weights/b".to_owned(), 200)];
        let fits = Prediction {
            read_bytes: 1000,
            files,
            scratch_bytes: 100,
            memory_bytes: 50,
            free_disk_bytes: Some(1000),
            available_memory_bytes: Some(50),
        };
        let refused = |prediction: Prediction| prediction.check(Path::new("out")).unwrap_err().to_string();
        assert!(fits.check(Path::new("out")).is_ok());
        assert!(
            Prediction { free_disk_bytes: None, available_memory_bytes: None, ..fits.clone() }
                .check(Path::new("out"))
                .is_ok()
        );
        let disk = refused(Prediction { free_disk_bytes: Some(999), ..fits.clone() });
        assert!(disk.contains("out") && disk.contains("needs 1000 bytes") && disk.contains("999 are free"), "{disk}");
        let memory = refused(Prediction { available_memory_bytes: Some(49), ..fits });
        assert!(memory.contains("about 50 bytes of memory, but only 49 are available"), "{memory}");
    }

    #[test]
    fn finds_the_disk_of_a_folder_to_come() {
        let folder = tempfile::tempdir().unwrap();
        let there = free_bytes(folder.path()).unwrap();
        let to_come = free_bytes(&folder.path().join("a/b/c")).unwrap();
        assert!(there > 0 && to_come.abs_diff(there) < 1 << 30);
    }
}
