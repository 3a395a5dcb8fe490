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
    /// something else than a file, such as a folder or a device.
    pub fn create(target: &Path) -> Result<WholeFile> {
        let Some(name) = target.file_name().filter(|_| target.is_file() || !target.exists()) else {
            return Err(Error::Request(format!("cannot write {}: it is not a file", target.display())));
        };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".part-{}", std::process::id()));
        let written_to = target.with_file_name(hidden);
        // Only a process of the same number that died can have left one.
        let _ = fs::remove_file(&written_to);
        let file = File::create_new(&written_to).map_err(Error::io("create", &written_to))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a.json");
        let count = || fs::read_dir(folder.path()).unwrap().count();
        let mut file = WholeFile::create(&target).unwrap();
        file.write(b"half").unwrap();
        assert!(!target.exists());
        drop(file);
        assert_eq!(count(), 0);
        for text in ["one", "two"] {
            let mut file = WholeFile::create(&target).unwrap();
            file.write(text.as_bytes()).unwrap();
            file.finish().unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), text);
        }
        assert_eq!(count(), 1);
    }

    #[test]
    fn what_is_no_file_is_left_alone() {
        for path in ["/dev/null", "/tmp", "/", "nowhere/a.json"] {
            assert!(WholeFile::create(Path::new(path)).is_err(), "{path}");
        }
    }
}
