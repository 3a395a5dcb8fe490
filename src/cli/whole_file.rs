//! Atomic file output: a file is written next to its destination and renamed once it is complete.

use std::fs::Permissions;
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use aotron::{Error, Result};
use tempfile::NamedTempFile;

/// A file being written. If dropped before [`WholeFile::finish`], it leaves nothing behind.
pub struct WholeFile {
    target: PathBuf,
    out: BufWriter<NamedTempFile>,
}

impl WholeFile {
    /// Starts a file that will replace whatever is at `target`.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder does not exist or cannot be written to; [`Error::Request`] if the path is something
    /// other than a file, such as a folder or a device.
    pub fn create(target: &Path) -> Result<WholeFile> {
        let Some(name) = target.file_name().filter(|_| target.is_file() || !target.exists()) else {
            return Err(Error::Request(format!("cannot write {}: it is not a file", target.display())));
        };
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".part-");
        // Temporary files are created private to their owner; restore the permissions that the umask gives.
        let file = tempfile::Builder::new()
            .prefix(&hidden)
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .map_err(Error::io("create", target))?;
        Ok(WholeFile { target: target.into(), out: BufWriter::with_capacity(1 << 20, file) })
    }

    /// Appends to the file.
    ///
    /// # Errors
    /// [`Error::Io`], for example on a full disk.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::io("write", &self.target))
    }

    /// Moves the file to its destination.
    ///
    /// # Errors
    /// [`Error::Io`]; the destination is unchanged then.
    pub fn finish(self) -> Result<()> {
        let file = self.out.into_inner().map_err(|error| Error::io("write", &self.target)(error.into_error()))?;
        file.as_file().sync_all().map_err(Error::io("flush to disk", &self.target))?;
        file.persist(&self.target).map_err(|error| Error::io("rename to", &self.target)(error.error))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
            let other = folder.path().join("other");
            fs::write(&other, "").unwrap();
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode(&target), mode(&other), "as any file that this process makes");
            fs::remove_file(other).unwrap();
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
