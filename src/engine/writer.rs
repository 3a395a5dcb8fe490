//! Writes a package so that it appears whole or not at all.
//!
//! Files are written to a folder beside the target, each flushed to disk; the folder is renamed last. A build that
//! dies leaves such a folder behind; the next build to the same target removes it (a lock tells a dead build's
//! folder from a running one's).

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use sha2::{Digest, Sha256};

use super::manifest::{FileInfo, MANIFEST_NAME, Manifest, hex};
use super::package::is_package;
use crate::error::{Error, Result};

/// Folders that running a package may leave in it: kernels compiled for a GPU.
const KEPT_BESIDE: &[&str] = &["kernels"];

/// A package being written. Dropping it unfinished leaves nothing behind.
#[derive(Debug)]
pub struct PackageWriter {
    target: PathBuf,
    building: PathBuf,
    lock: Option<File>,
    replace: bool,
    files: Vec<FileInfo>,
}

impl PackageWriter {
    /// Checks that a package may be written to `target`, without starting one.
    ///
    /// # Errors
    /// [`Error::Package`] as for [`PackageWriter::create`].
    pub fn check_target(target: &Path, replace: bool) -> Result<()> {
        refuse_existing(target, replace)
    }

    /// Starts a package at `target`, creating missing parent folders.
    ///
    /// # Errors
    /// [`Error::Package`] if `target` exists, unless `replace` is set and it is an engine package or an empty folder;
    /// [`Error::Io`] if a folder cannot be created.
    pub fn create(target: &Path, replace: bool) -> Result<PackageWriter> {
        // What a link points to is replaced, not the link; and `.` has a name.
        let resolved = fs::canonicalize(target);
        let target = resolved.as_deref().unwrap_or(target);
        let name = target
            .file_name()
            .and_then(|n| n.to_str())
            .ok_or_else(|| Error::package(target, "the output path must end in a plain folder name"))?;
        let parent = match target.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("."),
        };
        refuse_existing(target, replace)?;
        fs::create_dir_all(parent).map_err(Error::io("create the folder", parent))?;
        let prefix = format!(".{name}.building-");
        remove_leftovers(parent, &prefix);
        let building = parent.join(format!("{prefix}{}", std::process::id()));
        fs::create_dir(&building).map_err(Error::io("create the folder", &building))?;
        let mut writer =
            PackageWriter { target: target.to_path_buf(), building, lock: None, replace, files: Vec::new() };
        let lock = File::open(&writer.building).map_err(Error::io("open", &writer.building))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| Error::io("lock", &writer.building)(e.into()))?;
        writer.lock = Some(lock);
        Ok(writer)
    }

    /// A path on the package's disk for a temporary file. The caller removes the file.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.building.join(name)
    }

    /// Adds a file; `fill` writes its content through the function it is given.
    ///
    /// # Errors
    /// Any error of `fill`, or [`Error::Io`] naming the file (a full disk, say).
    pub fn add(
        &mut self,
        path: &str,
        fill: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let mut file = self.create_file(path)?;
        fill(&mut |piece| file.write(piece))?;
        let info = file.finish()?;
        self.push(info);
        Ok(())
    }

    /// Creates a file, one of several written at once. It becomes part of the package once it is finished and
    /// [pushed](PackageWriter::push).
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn create_file(&self, path: &str) -> Result<PackageFile> {
        let full = self.building.join(path);
        if let Some(folder) = full.parent() {
            fs::create_dir_all(folder).map_err(Error::io("create the folder", folder))?;
        }
        let file = File::create_new(&full).map_err(Error::io("create", &full))?;
        let out = BufWriter::with_capacity(1 << 20, file);
        Ok(PackageFile { path: path.into(), full, out, digest: Sha256::new(), bytes: 0 })
    }

    /// Adds a finished file to the package.
    pub fn push(&mut self, info: FileInfo) {
        self.files.push(info);
    }

    /// Adds a file of another package unchanged: hard-linked where the file system supports it, else copied.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn add_existing(&mut self, package: &Path, info: &FileInfo) -> Result<()> {
        let (from, full) = (package.join(&info.path), self.building.join(&info.path));
        if let Some(folder) = full.parent() {
            fs::create_dir_all(folder).map_err(Error::io("create the folder", folder))?;
        }
        if fs::hard_link(&from, &full).is_err() {
            fs::copy(&from, &full).map_err(Error::io("copy to", &full))?;
            File::open(&full).and_then(|file| file.sync_all()).map_err(Error::io("flush to disk", &full))?;
        }
        self.files.push(info.clone());
        Ok(())
    }

    /// Writes the manifest and moves the package to its target.
    ///
    /// # Errors
    /// [`Error::Io`] if that fails; the target is then unchanged.
    pub fn finish(mut self, manifest: &mut Manifest) -> Result<()> {
        manifest.files = std::mem::take(&mut self.files);
        let text = manifest.seal()?;
        self.add(MANIFEST_NAME, |write| write(text.as_bytes()))?;
        let folders = manifest.files.iter().filter_map(|f| Path::new(&f.path).parent()).map(|p| self.building.join(p));
        for folder in folders {
            sync_folder(&folder)?;
        }
        sync_folder(&self.building)?;
        refuse_existing(&self.target, self.replace)?;
        let rename = |flags| renameat_with(CWD, &self.building, CWD, &self.target, flags);
        if self.target.exists() {
            // The old package takes the building folder's name and is removed by `drop`.
            rename(RenameFlags::EXCHANGE).map_err(|e| Error::io("replace", &self.target)(e.into()))?;
        } else {
            match rename(RenameFlags::NOREPLACE) {
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                    fs::rename(&self.building, &self.target).map_err(Error::io("rename to", &self.target))?;
                }
                Err(e) => return Err(Error::io("rename to", &self.target)(e.into())),
            }
        }
        match self.target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_folder(parent),
            _ => sync_folder(Path::new(".")),
        }
    }
}

/// A file of a package that is being written.
#[derive(Debug)]
pub struct PackageFile {
    path: String,
    full: PathBuf,
    out: BufWriter<File>,
    digest: Sha256,
    bytes: u64,
}

impl PackageFile {
    /// Writes the next bytes.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file (a full disk, say).
    pub fn write(&mut self, piece: &[u8]) -> Result<()> {
        self.digest.update(piece);
        self.bytes += piece.len() as u64;
        self.out.write_all(piece).map_err(Error::io("write", &self.full))
    }

    /// Flushes the file to disk.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn finish(self) -> Result<FileInfo> {
        let PackageFile { path, full, out, digest, bytes } = self;
        let file = out.into_inner().map_err(|e| Error::io("write", &full)(e.into_error()))?;
        file.sync_all().map_err(Error::io("flush to disk", &full))?;
        Ok(FileInfo { path, bytes, sha256: hex(&digest.finalize()) })
    }
}

impl Drop for PackageWriter {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.building);
    }
}

fn refuse_existing(target: &Path, replace: bool) -> Result<()> {
    if !target.exists() {
        return Ok(());
    }
    let empty = fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    if !empty && !is_package(target) {
        return Err(Error::package(target, "the output exists and is not an engine package; choose another folder"));
    }
    if !empty && !replace {
        return Err(Error::package(target, "the output exists; pass --force to replace it"));
    }
    if let Some(other) = foreign_entry(target) {
        let detail = format!("the output has {}, which is not part of the package; move it elsewhere", other.display());
        return Err(Error::package(target, detail));
    }
    Ok(())
}

/// An entry of a package's folder that its manifest does not list, and that replacing the package would delete. Files that
/// belong to no reader of packages are somebody's.
fn foreign_entry(package: &Path) -> Option<PathBuf> {
    // A package of another version is replaced as a whole.
    let files = super::Package::open(package).ok()?.manifest().files.clone();
    let listed: HashSet<&str> = files.iter().filter_map(|file| file.path.split('/').next()).collect();
    let names = fs::read_dir(package).ok()?.flatten().map(|entry| entry.file_name());
    let is_known = |name: &str| name == MANIFEST_NAME || KEPT_BESIDE.contains(&name) || listed.contains(name);
    names.into_iter().find(|name| !name.to_str().is_some_and(is_known)).map(|name| package.join(name))
}

/// Removes leftovers of dead builds. A running build holds its folder's lock.
fn remove_leftovers(parent: &Path, prefix: &str) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix)) {
            continue;
        }
        let Ok(folder) = File::open(entry.path()) else { continue };
        if flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("flush to disk", path))
}
