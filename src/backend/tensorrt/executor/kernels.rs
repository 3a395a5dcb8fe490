//! Kernel cache: kernels that TensorRT for RTX compiled when a plan first ran on a GPU, stored for later processes.
//!
//! With them are the sizes of the runs that they serve, so that a later process does not run them merely to see. A thread
//! writes the file, since a step must not wait for a disk.
//!
//! The file is in the user's cache folder and nowhere else: kernels are code, and a package may be anyone's. The library
//! itself rejects kernels of another version, GPU or driver; a digest detects damaged files.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::backend::tensorrt::GpuReport;
use crate::engine::{Package, plain_name, read_digested, user_cache, write_digested};

const MAGIC: &[u8; 8] = b"aotronk2";
/// Larger files are ignored. Kernels of the 8B model take tens of MB.
const MAX_BYTES: u64 = 1 << 30;

/// Kernels of one engine, and the runs they serve.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StoredKernels {
    /// Profile and size (sequences of a decode run, tokens of a prefill run).
    pub shapes: BTreeSet<(u32, u32)>,
    /// As the library serialized them.
    pub kernels: Vec<u8>,
}

impl StoredKernels {
    /// The number of shapes, the shapes, and the kernels; integers are little-endian, of 4 bytes.
    fn to_bytes(&self) -> Vec<u8> {
        let count = [self.shapes.len() as u32];
        let shapes = self.shapes.iter().flat_map(|(profile, size)| [*profile, *size]);
        let head = count.into_iter().chain(shapes).flat_map(u32::to_le_bytes);
        head.chain(self.kernels.iter().copied()).collect()
    }

    fn of_bytes(bytes: &[u8]) -> Option<StoredKernels> {
        let (count, rest) = bytes.split_first_chunk::<4>()?;
        let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
        let (shapes, kernels) = rest.split_at_checked(count.checked_mul(8)?)?;
        let number = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
        let shapes = shapes.as_chunks::<4>().0.chunks_exact(2).map(|pair| (number(&pair[0]), number(&pair[1])));
        Some(StoredKernels { shapes: shapes.collect(), kernels: kernels.to_vec() })
    }
}

/// Writes kernel caches on a thread of its own. Dropping it waits until all are written.
pub(super) struct KernelWriter {
    jobs: Option<mpsc::Sender<(KernelCache, StoredKernels)>>,
    thread: Option<JoinHandle<()>>,
}

impl KernelWriter {
    /// Starts the thread. That a file cannot be written is reported once.
    pub(super) fn new(report: &GpuReport) -> KernelWriter {
        let (jobs, received) = mpsc::channel::<(KernelCache, StoredKernels)>();
        let report = report.clone();
        let write_all = move || {
            let mut has_failed = false;
            for (kernel_cache, stored) in received {
                let written = if has_failed { Ok(()) } else { kernel_cache.write(&stored) };
                if let Err(reason) = written {
                    has_failed = true;
                    report.fact(&format!(
                        "compiled kernels cannot be cached, so the next start compiles them again: {reason}"
                    ));
                }
            }
        };
        // Without a thread nothing is kept, as without a folder.
        let thread = std::thread::Builder::new().name("kernel cache".into()).spawn(write_all).ok();
        KernelWriter { jobs: Some(jobs), thread }
    }

    /// Hands over what is to be written; returns at once.
    pub(super) fn write(&self, kernel_cache: KernelCache, stored: StoredKernels) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send((kernel_cache, stored));
        }
    }
}

impl Drop for KernelWriter {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

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
    pub(super) fn read(&self) -> Option<StoredKernels> {
        StoredKernels::of_bytes(&read_digested(self.file.as_deref()?, MAGIC, MAX_BYTES)?)
    }

    /// Writes the file atomically.
    ///
    /// # Errors
    /// The reason why it cannot be written.
    fn write(&self, stored: &StoredKernels) -> Result<(), String> {
        let Some(file) = &self.file else {
            return Err("neither XDG_CACHE_HOME nor HOME names a folder".into());
        };
        write_digested(file, MAGIC, &stored.to_bytes()).map_err(|error| format!("{}: {error}", file.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn stored(kernels: &[u8]) -> StoredKernels {
        StoredKernels { shapes: [(0, 64), (1, 4)].into(), kernels: kernels.to_vec() }
    }

    #[test]
    fn kernels_come_back_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cache/kernels");
        let kernel_cache = KernelCache { file: Some(file.clone()) };
        assert_eq!(kernel_cache.read(), None);
        kernel_cache.write(&stored(b"first")).unwrap();
        kernel_cache.write(&stored(b"compiled")).unwrap();
        assert_eq!(kernel_cache.read(), Some(stored(b"compiled")));
        assert_eq!(fs::read_dir(folder.path().join("cache")).unwrap().count(), 1, "no temporary file is left");

        let whole = fs::read(&file).unwrap();
        for damaged in [&whole[..whole.len() - 1], &whole[..20], b"", b"aotronk1"] {
            fs::write(&file, damaged).unwrap();
            assert_eq!(kernel_cache.read(), None);
        }
        let blocked = KernelCache { file: Some(file.join("kernels")) };
        assert!(blocked.write(&stored(b"compiled")).unwrap_err().contains("cache/kernels/kernels: "));
        let nowhere = KernelCache { file: None };
        assert_eq!(nowhere.read(), None);
        assert!(nowhere.write(&stored(b"compiled")).unwrap_err().contains("XDG_CACHE_HOME"));
    }

    #[test]
    fn shapes_are_as_many_as_the_file_says() {
        let bytes = stored(b"compiled").to_bytes();
        assert_eq!(StoredKernels::of_bytes(&bytes), Some(stored(b"compiled")));
        assert_eq!(StoredKernels::of_bytes(&bytes[..19]), None);
        assert_eq!(StoredKernels::of_bytes(&[0xff; 12]), None);
        assert_eq!(StoredKernels::of_bytes(&[0; 4]), Some(StoredKernels::default()));
    }

    #[test]
    fn the_writer_ends_with_all_written_and_complains_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| KernelCache { file: Some(folder.path().join(name)) };
        let heard = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let copy = heard.clone();
        let report = GpuReport::to(move |event| copy.lock().unwrap().push(format!("{event:?}")));
        let writer = KernelWriter::new(&report);
        writer.write(at("a"), stored(b"first"));
        writer.write(at("a"), stored(b"second"));
        drop(writer);
        assert_eq!(at("a").read(), Some(stored(b"second")));
        let writer = KernelWriter::new(&report);
        writer.write(at("a/b"), stored(b"first"));
        writer.write(at("a/c"), stored(b"first"));
        drop(writer);
        let heard = heard.lock().unwrap();
        assert!(heard.len() == 1 && heard[0].contains("compiles them again"), "{heard:?}");
    }

    #[test]
    fn a_planted_link_is_replaced_and_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (precious, link) = (folder.path().join("precious"), folder.path().join("kernels"));
        fs::write(&precious, "mine").unwrap();
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        KernelCache { file: Some(link.clone()) }.write(&stored(b"compiled")).unwrap();
        assert_eq!(fs::read_to_string(&precious).unwrap(), "mine");
        assert!(!fs::symlink_metadata(&link).unwrap().is_symlink());
    }
}
