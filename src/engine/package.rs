//! Opens a package: small files are checked against their digests, weights against their size (and, on request, their
//! digest).

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::manifest::{FileInfo, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, hex};
use crate::error::{Error, Result};
use crate::mmap::{MappedFile, open_regular};
use crate::text::{ChatFormat, Tokenizer};

/// Returns true if `path` looks like an engine package.
pub fn is_package(path: &Path) -> bool {
    path.join(MANIFEST_NAME).is_file()
}

/// An opened engine package. Open only packages from people you trust: a GPU plan is code for TensorRT, and digests tell
/// damage from what was written, not who wrote it; [`Package::expect`] does. Its files are mapped when they are read and must not be modified while in use, see
/// [`MappedFile`]; replacing the whole folder is safe.
#[derive(Debug, Clone)]
pub struct Package {
    path: PathBuf,
    manifest: Manifest,
}

impl Package {
    /// Opens the package at `path` and checks its manifest and the size of every file. Weights are not read.
    ///
    /// # Errors
    /// [`Error::NoSuchPackage`] or [`Error::NotAPackage`]; [`Error::Package`] naming the file that is missing, truncated, or
    /// of another format version.
    pub fn open(path: &Path) -> Result<Package> {
        if !path.exists() {
            return Err(Error::NoSuchPackage { path: path.to_path_buf() });
        }
        let file = path.join(MANIFEST_NAME);
        if !file.exists() {
            return Err(Error::NotAPackage { path: path.to_path_buf() });
        }
        let mut text = Vec::new();
        let reader = open_regular(&file)?;
        reader.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut text).map_err(Error::io("read", &file))?;
        if text.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(Error::package(
                path,
                format!("{MANIFEST_NAME} is longer than {MAX_MANIFEST_BYTES} bytes, the limit"),
            ));
        }
        let package = Package { manifest: Manifest::parse(path, &text)?, path: path.to_path_buf() };
        for file in &package.manifest.files {
            let found = package.path.join(&file.path);
            match std::fs::metadata(&found) {
                Ok(meta) if meta.is_file() && meta.len() == file.bytes => {}
                Ok(meta) => {
                    let (bytes, found) = (file.bytes, meta.len());
                    return Err(package.refuse(&file.path, &format!("has {found} bytes, expected {bytes}")));
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    return Err(package.refuse(&file.path, "is missing"));
                }
                Err(e) => return Err(Error::io("access", &found)(e)),
            }
        }
        Ok(package)
    }

    fn refuse(&self, file: &str, detail: &str) -> Error {
        Error::package(&self.path, format!("{file} {detail}; copy or build the package again"))
    }

    /// Path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Path of a file of the package.
    pub fn file_path(&self, file: &str) -> PathBuf {
        self.path.join(file)
    }

    #[allow(unsafe_code)]
    fn map(&self, file: &str) -> Result<MappedFile> {
        // SAFETY: [`Package`]'s documentation requires the caller not to modify its files while it is open.
        unsafe { MappedFile::open(&self.file_path(file)) }
    }

    /// Content of a small file, checked against its digest.
    ///
    /// # Errors
    /// [`Error::Package`] if it is not listed, or its digest differs.
    pub fn read(&self, file: &str) -> Result<Vec<u8>> {
        let info = self.manifest.file(file).ok_or_else(|| self.refuse(file, "is not listed in the manifest"))?;
        // Copied first: what is returned is what was checked, even if the file changes.
        let bytes = self.map(file)?.bytes().to_vec();
        self.check(info, &bytes, &|_| {})?;
        Ok(bytes)
    }

    /// A large file, mapped and checked against its digest.
    ///
    /// # Errors
    /// As [`Package::read`].
    pub fn mapped(&self, file: &str) -> Result<MappedFile> {
        let info = self.manifest.file(file).ok_or_else(|| self.refuse(file, "is not listed in the manifest"))?;
        let mapped = self.map(file)?;
        self.check(info, mapped.bytes(), &|_| {})?;
        Ok(mapped)
    }

    /// Checks that this is the package with the given digest, [`Manifest::sha256`] in hexadecimal. The manifest has the
    /// digest of every file; plans and the tokenizer are checked against theirs when they are read, weights by
    /// [`Package::verify`].
    ///
    /// # Errors
    /// [`Error::Package`] with both digests if it is another one.
    pub fn expect(&self, sha256: &str) -> Result<()> {
        let found = &self.manifest.sha256;
        if found.eq_ignore_ascii_case(sha256) {
            return Ok(());
        }
        let detail = format!("its manifest has SHA-256 {found}, expected {sha256}: it is another package");
        Err(Error::package(&self.path, detail))
    }

    /// The package's tokenizer, if it has one, prepared for the package's chat format.
    ///
    /// # Errors
    /// As [`Package::read`], and [`Error::Format`] if it cannot be parsed.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        self.plain_tokenizer()?.map(|tokenizer| self.manifest.chat_format.prepare(tokenizer)).transpose()
    }

    /// The chat format of `choice`, as accepted by [`crate::text::ChatTemplate::choose`], or else the package's own, and
    /// the tokenizer prepared for it. A package without a tokenizer has only its own format.
    ///
    /// # Errors
    /// As [`Package::tokenizer`] and [`ChatFormat::with_choice`].
    pub fn text(&self, choice: Option<&str>) -> Result<(ChatFormat, Option<Tokenizer>)> {
        let own = &self.manifest.chat_format;
        match (choice, self.plain_tokenizer()?) {
            (_, None) => Ok((own.clone(), None)),
            (None, Some(tokenizer)) => Ok((own.clone(), Some(own.prepare(tokenizer)?))),
            (Some(choice), Some(tokenizer)) => {
                let (format, tokenizer) = own.with_choice(choice, tokenizer)?;
                Ok((format, Some(tokenizer)))
            }
        }
    }

    fn plain_tokenizer(&self) -> Result<Option<Tokenizer>> {
        let Some(info) = &self.manifest.tokenizer else { return Ok(None) };
        let bytes = self.read(&info.file)?;
        let tokenizer = Tokenizer::from_package(&self.file_path(&info.file), &bytes)?;
        match tokenizer.vocab_size() {
            found if found == info.vocab_size => Ok(Some(tokenizer)),
            found => {
                let detail = format!("has {found} ids, but the manifest's vocab_size for it is {}", info.vocab_size);
                Err(self.refuse(&info.file, &detail))
            }
        }
    }

    /// The package's chat format, to share between conversations.
    pub fn chat_format(&self) -> Arc<ChatFormat> {
        Arc::new(self.manifest.chat_format.clone())
    }

    /// Checks one file against its digest; `progress` receives byte counts.
    ///
    /// # Errors
    /// [`Error::Package`] if it is not listed, or its digest differs.
    pub fn verify_file(&self, file: &str, progress: &dyn Fn(u64)) -> Result<()> {
        let info = self.manifest.file(file).ok_or_else(|| self.refuse(file, "is not listed in the manifest"))?;
        self.check(info, self.map(file)?.bytes(), progress)
    }

    /// Checks every file against its digest; `progress` receives byte counts.
    ///
    /// # Errors
    /// [`Error::Package`] naming the first file whose digest differs.
    pub fn verify(&self, progress: &dyn Fn(u64)) -> Result<()> {
        self.manifest.files.iter().try_for_each(|info| self.verify_file(&info.path, progress))
    }

    fn check(&self, info: &FileInfo, bytes: &[u8], progress: &dyn Fn(u64)) -> Result<()> {
        let mut digest = Sha256::new();
        for piece in bytes.chunks(1 << 20) {
            digest.update(piece);
            progress(piece.len() as u64);
        }
        if hex(&digest.finalize()) != info.sha256 {
            return Err(self.refuse(&info.path, "does not match its digest: it is damaged"));
        }
        Ok(())
    }
}
