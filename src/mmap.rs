//! Memory-mapped files: gigabytes of weights are read by the pages that are touched, never copied whole.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// A regular file mapped read-only.
///
/// The file must not be truncated or rewritten in place while it is mapped: replacing it by a rename is safe,
/// shortening it makes the operating system kill whoever reads the lost pages.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    /// `None` for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps the whole of `path`, following symbolic links. Folders, pipes, sockets and devices are refused.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be opened or mapped, [`Error::Format`] if it is not a regular file.
    pub fn open(path: &Path) -> Result<MappedFile> {
        MappedFile::of_file(path, &open_regular(path)?)
    }

    /// Maps the whole of an open regular file, which messages call `path`.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be mapped.
    pub(crate) fn of_file(path: &Path, file: &File) -> Result<MappedFile> {
        let bytes = file.metadata().map_err(Error::io("read the size of", path))?.len();
        let map = if bytes == 0 { None } else { Some(map_read_only(file).map_err(Error::io("map", path))?) };
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

#[allow(unsafe_code)]
fn map_read_only(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is private to this process and read-only, so nothing here writes through it. What no
    // process can rule out is another one truncating or rewriting the file: the type's documentation makes leaving
    // a mapped file alone the user's duty, and this project itself only ever publishes files by renaming them.
    // Every value read from a map is validated as untrusted input, so changed bytes are at worst wrong numbers.
    unsafe { Mmap::map(file) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_content_and_the_empty_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"content").unwrap();
        assert_eq!(MappedFile::open(&path).unwrap().bytes(), b"content");
        std::fs::write(folder.path().join("empty"), b"").unwrap();
        assert_eq!(MappedFile::open(&folder.path().join("empty")).unwrap().bytes(), b"");
    }

    #[test]
    fn refuses_what_is_not_a_regular_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = MappedFile::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
        let error = MappedFile::open(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(error.contains("/dev/zero: not a regular file"), "{error}");
        // Opening a pipe would wait for a writer.
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let error = MappedFile::open(&pipe).unwrap_err().to_string();
        assert!(error.contains("pipe: not a regular file"), "{error}");
        let error = MappedFile::open(&folder.path().join("absent")).unwrap_err().to_string();
        assert!(error.contains("cannot open") && error.contains("absent"), "{error}");
    }
}
