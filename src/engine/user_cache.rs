//! The user's cache folder, and files in it that a digest protects from damage.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const DIGEST_BYTES: usize = 32;

/// The folder for files that can be made again: `$XDG_CACHE_HOME/aotron`, else `~/.cache/aotron`; `None` without either
/// variable.
pub fn user_cache() -> Option<PathBuf> {
    folder(&|variable| std::env::var_os(variable))
}

/// Relative paths are not used, as they would be inside of the current folder.
fn folder(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(cache.join("aotron"))
}

/// Reads a file that [`write_digested`] wrote; `None` if there is none, or if it is larger than `most_bytes`, damaged or
/// of another kind.
pub(crate) fn read_digested(file: &Path, magic: &[u8; 8], most_bytes: u64) -> Option<Vec<u8>> {
    let meta = fs::metadata(file).ok()?;
    if !meta.is_file() || meta.len() > most_bytes {
        return None;
    }
    let bytes = fs::read(file).ok()?;
    let (digest, content) = bytes.strip_prefix(magic)?.split_at_checked(DIGEST_BYTES)?;
    (Sha256::digest(content)[..] == *digest).then(|| content.to_vec())
}

/// Writes a file atomically: `magic`, a digest and the content.
///
/// # Errors
/// The operating system's reason.
pub(crate) fn write_digested(file: &Path, magic: &[u8; 8], content: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    // A new file of a random name, private to the user, that then takes the place of whatever was there, a symbolic link
    // included.
    let mut out = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(folder)?;
    out.write_all(magic)?;
    out.write_all(&Sha256::digest(content))?;
    out.write_all(content)?;
    out.as_file().sync_all()?;
    out.persist(file)?;
    Ok(())
}

/// A file name of these parts: letters, digits and periods, and hyphens for anything else.
pub(crate) fn plain_name(parts: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    parts.chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_the_users_and_absolute() {
        let set = |values: &'static [(&str, &str)]| {
            folder(&move |name| values.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
        };
        assert_eq!(set(&[("XDG_CACHE_HOME", "/c"), ("HOME", "/h")]), Some("/c/aotron".into()));
        assert_eq!(set(&[("XDG_CACHE_HOME", "."), ("HOME", "/h")]), Some("/h/.cache/aotron".into()));
        assert_eq!(set(&[("XDG_CACHE_HOME", ""), ("HOME", "")]), None);
    }
}
