//! Records of passed verifications, so that a plan is verified once for each card, driver and library.
//!
//! Records are in the user's cache, not in the package: a package that came from elsewhere must not bring its own
//! verdict. Without a cache folder a plan is verified each time it is opened.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::engine::user_cache;

/// Larger records are ignored.
const MAX_BYTES: u64 = 1 << 20;

/// Everything that a verdict depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Circumstances {
    /// Name and version of this program.
    pub tool: String,
    /// Target of the plan.
    pub target: String,
    /// Precision of the plan.
    pub precision: String,
    /// The card: NVIDIA's name, compute capability and memory.
    pub gpu: (String, u16, u64),
    /// Version of the driver.
    pub driver: String,
    /// The library and its version.
    pub library: String,
    /// Files of the plan and the package's reference, each with its SHA-256.
    pub files: Vec<(String, String)>,
    /// Sequences that KV memory was reserved for: batch sizes, and so kernels, depend on it.
    pub slots: usize,
    /// Decode runs are launched as CUDA graphs.
    pub graphs: bool,
}

/// A passed verification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    circumstances: Circumstances,
    /// Rows of logits compared.
    rows: usize,
}

impl Circumstances {
    /// The record's file; `None` if the user has no cache folder.
    fn file(&self) -> Option<PathBuf> {
        let text = serde_json::to_vec(self).ok()?;
        let name: String = Sha256::digest(text).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Some(user_cache()?.join("verified").join(format!("{name}.json")))
    }

    /// Returns true if a verification has passed in the same circumstances.
    pub fn have_passed(&self) -> bool {
        let read = || {
            let file = self.file()?;
            let meta = fs::metadata(&file).ok()?;
            let text = (meta.is_file() && meta.len() <= MAX_BYTES).then(|| fs::read(&file).ok())??;
            serde_json::from_slice::<Record>(&text).ok()
        };
        read().is_some_and(|record| record.circumstances == *self)
    }

    /// Records that a verification has passed, after comparing `rows` rows. It also stands for a single sequence, which
    /// is one of the batch sizes.
    ///
    /// # Errors
    /// The reason why the record cannot be written.
    pub fn record(&self, rows: usize) -> Result<(), String> {
        self.write(rows)?;
        Circumstances { slots: 1, ..self.clone() }.write(rows)
    }

    fn write(&self, rows: usize) -> Result<(), String> {
        let file = self.file().ok_or("neither XDG_CACHE_HOME nor HOME is set")?;
        let folder = file.parent().ok_or("the cache has no folder")?;
        let record = Record { circumstances: self.clone(), rows };
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(folder)?;
            let mut out = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(folder)?;
            out.write_all(&serde_json::to_vec_pretty(&record)?)?;
            out.persist(&file)?;
            Ok(())
        };
        write().map_err(|error| format!("{}: {error}", file.display()))
    }
}
