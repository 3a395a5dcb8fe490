//! A file that appears whole or not at all: written beside its place and renamed when it is complete.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use aotron::{Error, Result};

/// A file being written. Dropped before [`WholeFile::finish`], it leaves nothing.
pub struct WholeFile {
    target: PathBuf,
    written_to: PathBuf,
    out: BufWriter<File>,
}

impl WholeFile {
    /// Starts the file that will be at `target`, in place of what is there.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no such folder or it cannot be written to; [`Error::Request`] for a path that names
    /// a folder.
    pub fn create(target: &Path) -> Result<WholeFile> {
        let Some(name) = target.file_name().filter(|_| !target.is_dir()) else {
            return Err(Error::Request(format!("{} is not a file's path", target.display())));
        };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".part-{}", std::process::id()));
        let written_to = target.with_file_name(hidden);
        let file = File::create(&written_to).map_err(Error::io("create", &written_to))?;
        Ok(WholeFile { target: target.into(), written_to, out: BufWriter::with_capacity(1 << 20, file) })
    }

    /// Appends to the file.
    ///
    /// # Errors
    /// [`Error::Io`], on a full disk for example.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::io("write", &self.target))
    }

    /// Makes the file appear.
    ///
    /// # Errors
    /// [`Error::Io`]; what was at its place is still there then.
    pub fn finish(mut self) -> Result<()> {
        self.out.flush().map_err(Error::io("write", &self.target))?;
        self.out.get_ref().sync_all().map_err(Error::io("flush to disk", &self.target))?;
        fs::rename(&self.written_to, &self.target).map_err(Error::io("rename to", &self.target))
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        // After a rename there is nothing to remove.
        let _ = fs::remove_file(&self.written_to);
    }
}
