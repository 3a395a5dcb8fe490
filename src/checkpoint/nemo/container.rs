//! The container of a `.nemo`: a mapped tar archive, or the folder that it unpacks to. Either is a list of named
//! locations in mapped files.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::checkpoint::tar::{Archive, MemberKind};
use crate::error::{Error, Result};
use crate::mmap::MappedFile;

/// Maximum number of files in a folder.
const MAX_FILES: usize = 1 << 16;
/// Maximum depth of folders; a distributed checkpoint's chunks lie two or three deep.
const MAX_DEPTH: usize = 8;

/// Location of a member's data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::checkpoint) struct MemberLocation {
    /// Index in [`Container::files`].
    pub file: usize,
    /// Byte range in that file.
    pub bytes: Range<usize>,
}

/// The files of a `.nemo` by name: relative, with `/` between folders, without a leading `./`.
#[derive(Debug)]
pub(in crate::checkpoint) struct Container {
    path: PathBuf,
    is_archive: bool,
    files: Vec<MappedFile>,
    members: BTreeMap<String, MemberLocation>,
    /// Kind of each entry that is neither a file nor a folder, such as a link, which is not followed.
    others: BTreeMap<String, &'static str>,
}

impl Container {
    /// Lists the uncompressed tar archive `file`, called `path` in messages.
    ///
    /// # Errors
    /// As [`Archive::read`].
    pub fn of_archive(path: &Path, file: MappedFile) -> Result<Container> {
        let archive = Archive::read(path, file.bytes())?;
        let (mut members, mut others) = (BTreeMap::new(), BTreeMap::new());
        for member in archive.members() {
            match member.kind {
                MemberKind::File => {
                    members.insert(member.name.clone(), MemberLocation { file: 0, bytes: member.bytes.clone() });
                }
                MemberKind::Other(kind) => {
                    others.insert(member.name.clone(), kind);
                }
                MemberKind::Folder => {}
            }
        }
        Ok(Container { path: path.to_path_buf(), is_archive: true, files: vec![file], members, others })
    }

    /// Maps every file below the folder `path`. Links are not followed, so nothing outside is read.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be mapped; [`Error::Format`] for too many files or too deeply nested
    /// folders.
    pub fn of_folder(path: &Path) -> Result<Container> {
        let mut container = Container {
            path: path.to_path_buf(),
            is_archive: false,
            files: Vec::new(),
            members: BTreeMap::new(),
            others: BTreeMap::new(),
        };
        container.add_folder(path, "", 0)?;
        Ok(container)
    }

    fn add_folder(&mut self, folder: &Path, prefix: &str, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(Error::format(folder, format!("folders are nested deeper than {MAX_DEPTH} levels, the limit")));
        }
        let entries = std::fs::read_dir(folder).map_err(Error::io("list", folder))?;
        for entry in entries {
            let entry = entry.map_err(Error::io("list", folder))?;
            let path = entry.path();
            // No file of a checkpoint has a name that is not UTF-8.
            let Some(name) = entry.file_name().to_str().map(|name| format!("{prefix}{name}")) else { continue };
            let kind = entry.file_type().map_err(Error::io("access", &path))?;
            if kind.is_dir() {
                self.add_folder(&path, &format!("{name}/"), depth + 1)?;
            } else if kind.is_file() {
                if self.files.len() == MAX_FILES {
                    return Err(Error::format(&self.path, format!("more than {MAX_FILES} files")));
                }
                // SAFETY: `Checkpoint` requires its caller not to modify its files while it is open.
                #[allow(unsafe_code)]
                let file = unsafe { MappedFile::open(&path)? };
                let place = MemberLocation { file: self.files.len(), bytes: 0..file.bytes().len() };
                self.files.push(file);
                self.members.insert(name, place);
            } else {
                self.others.insert(name, if kind.is_symlink() { "a symbolic link" } else { "a special file" });
            }
        }
        Ok(())
    }

    /// The archive or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Name of a member in messages.
    pub fn member_path(&self, name: &str) -> PathBuf {
        match self.is_archive {
            true => PathBuf::from(format!("{}: {}", self.path.display(), crate::error::clip(name))),
            false => self.path.join(name),
        }
    }

    /// Every member and its location, sorted by name.
    pub fn members(&self) -> impl Iterator<Item = (&str, &MemberLocation)> {
        self.members.iter().map(|(name, place)| (name.as_str(), place))
    }

    /// The members whose names start with `prefix`, sorted by name, without the prefix.
    pub fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a MemberLocation)> {
        let from = self.members.range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.map_while(move |(name, place)| Some((name.strip_prefix(prefix)?, place)))
    }

    /// Location of the member called `name`, if it exists.
    pub fn find(&self, name: &str) -> Option<&MemberLocation> {
        self.members.get(name)
    }

    /// Location of the member called `name`.
    ///
    /// # Errors
    /// [`Error::Format`] if there is none, or it is not a regular file.
    pub fn get(&self, name: &str) -> Result<&MemberLocation> {
        self.find(name).ok_or_else(|| match self.others.get(name) {
            Some(kind) => Error::format(self.member_path(name), format!("it is {kind}, expected a file")),
            None => Error::format(&self.path, format!("`{}` is missing", crate::error::clip(name))),
        })
    }

    /// Contents of a location in this container.
    ///
    /// # Errors
    /// [`Error::Internal`] for a location outside its file.
    pub fn bytes(&self, place: &MemberLocation) -> Result<&[u8]> {
        let found = self.files.get(place.file).and_then(|file| file.bytes().get(place.bytes.clone()));
        found.ok_or_else(|| {
            let asked = format!("bytes {:?} of file {} of {}", place.bytes, place.file, self.path.display());
            Error::internal(asked, "a location in the container")
        })
    }

    /// The mapped files, for a checkpoint to keep; locations and shards refer to them by index.
    pub fn into_files(self) -> Vec<MappedFile> {
        self.files
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_outside_its_file_is_an_internal_error() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("member"), b"content").unwrap();
        let container = Container::of_folder(folder.path()).unwrap();
        let place = container.get("member").unwrap().clone();
        assert_eq!(container.bytes(&place).unwrap(), b"content");
        for outside in [MemberLocation { file: 1, ..place.clone() }, MemberLocation { bytes: 3..8, ..place }] {
            let error = container.bytes(&outside).unwrap_err();
            assert!(matches!(error, Error::Internal { .. }), "{error}");
        }
    }
}
