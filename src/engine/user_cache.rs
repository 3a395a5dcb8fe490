//! The user's cache folder.

use std::ffi::OsString;
use std::path::PathBuf;

/// The folder for files that can be made again: `$XDG_CACHE_HOME/aotron`, else `~/.cache/aotron`; `None` without either
/// variable.
pub fn user_cache() -> Option<PathBuf> {
    let folder = |variable: &str| std::env::var_os(variable).filter(|value: &OsString| !value.is_empty());
    let cache = folder("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| folder("HOME").map(|home| PathBuf::from(home).join(".cache")));
    cache.map(|cache| cache.join("aotron"))
}
