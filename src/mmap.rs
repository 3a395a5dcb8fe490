//! Memory-mapped files: gigabytes of weights are read by the pages that are touched, never copied whole.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap, MmapMut};

use crate::error::{Error, Result};

/// A regular file mapped read-only, or a copy of one.
///
/// The file must not be truncated or rewritten in place while it is mapped: replacing it by a rename is safe,
/// shortening it makes the operating system kill whoever reads the lost pages. No process can see to that alone, so
/// mapping is `unsafe`, and every safe function that maps hands the duty on in its documentation.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    /// `None` for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps the whole of `path`, following symbolic links. Folders, pipes, sockets and devices are refused.
    ///
    /// # Safety
    /// Nothing may truncate the file or write to it in place for as long as the value lives.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be opened or mapped, [`Error::Format`] if it is not a regular file.
    #[allow(unsafe_code)]
    pub unsafe fn open(path: &Path) -> Result<MappedFile> {
        let file = open_regular(path)?;
        // SAFETY: the caller has taken on the same duty.
        unsafe { MappedFile::of_file(path, &file) }
    }

    /// Maps the whole of an open regular file, which messages call `path`.
    ///
    /// # Safety
    /// As [`MappedFile::open`].
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be mapped.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn of_file(path: &Path, file: &File) -> Result<MappedFile> {
        let bytes = file.metadata().map_err(Error::io("read the size of", path))?.len();
        let map = match bytes {
            0 => None,
            // SAFETY: the mapping is read-only, so nothing here writes through it, and the caller keeps others from it.
            // Values read from a map are validated as untrusted input all the same.
            _ => Some(unsafe { Mmap::map(file) }.map_err(Error::io("map", path))?),
        };
        Ok(MappedFile { path: path.to_path_buf(), map })
    }

    /// Reads the whole of `path` into memory, in huge pages where the system has them. Nothing that happens to the file
    /// afterwards matters.
    ///
    /// # Errors
    /// As [`MappedFile::open`], and [`Error::Io`] if there is not enough memory or the file is shortened meanwhile.
    pub fn copy(path: &Path) -> Result<MappedFile> {
        let mut file = open_regular(path)?;
        let bytes = file.metadata().map_err(Error::io("read the size of", path))?.len();
        let failed = || Error::io("copy into memory", path);
        let map = match usize::try_from(bytes).unwrap_or(usize::MAX) {
            0 => None,
            bytes => {
                let mut memory = MmapMut::map_anon(bytes).map_err(failed())?;
                // Systems without them refuse.
                let _ = memory.advise(Advice::HugePage);
                file.read_exact(&mut memory).map_err(failed())?;
                Some(memory.make_read_only().map_err(failed())?)
            }
        };
        Ok(MappedFile { path: path.to_path_buf(), map })
    }

    /// Bytes in memory, as if they were the content of `path`.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn in_memory(path: &Path, bytes: &[u8]) -> MappedFile {
        let map = (!bytes.is_empty()).then(|| {
            let mut map = memmap2::MmapMut::map_anon(bytes.len()).unwrap();
            map.copy_from_slice(bytes);
            map.make_read_only().unwrap()
        });
        MappedFile { path: path.to_path_buf(), map }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's content.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

/// Opens `path` for reading if it is a regular file (or a link to one).
///
/// The kind is looked up before the opening, which would wait on a pipe, and again on what was opened.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let not_regular = || Error::format(path, "not a regular file");
    if !std::fs::metadata(path).map_err(Error::io("open", path))?.is_file() {
        return Err(not_regular());
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    match file.metadata().map_err(Error::io("read the size of", path))?.is_file() {
        true => Ok(file),
        false => Err(not_regular()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Maps a file of a test's own folder.
    #[allow(unsafe_code)]
    fn open(path: &Path) -> Result<MappedFile> {
        // SAFETY: the tests leave what they have mapped alone.
        unsafe { MappedFile::open(path) }
    }

    #[test]
    fn maps_and_copies_content_and_the_empty_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"content").unwrap();
        assert_eq!(open(&path).unwrap().bytes(), b"content");
        let copy = MappedFile::copy(&path).unwrap();
        std::fs::write(&path, b"").unwrap();
        assert_eq!((copy.bytes(), copy.path()), (&b"content"[..], &*path));
        assert_eq!(open(&path).unwrap().bytes(), b"");
        assert_eq!(MappedFile::copy(&path).unwrap().bytes(), b"");
    }

    #[test]
    fn refuses_what_is_not_a_regular_file() {
        let folder = tempfile::tempdir().unwrap();
        for error in [open(folder.path()).unwrap_err(), MappedFile::copy(folder.path()).unwrap_err()] {
            assert!(error.to_string().contains("not a regular file"), "{error}");
        }
        let error = open(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(error.contains("/dev/zero: not a regular file"), "{error}");
        // Opening a pipe would wait for a writer.
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let error = open(&pipe).unwrap_err().to_string();
        assert!(error.contains("pipe: not a regular file"), "{error}");
        let error = open(&folder.path().join("absent")).unwrap_err().to_string();
        assert!(error.contains("cannot open") && error.contains("absent"), "{error}");
    }
}
