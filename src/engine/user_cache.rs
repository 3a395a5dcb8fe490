//! The user's cache folder.

use std::ffi::OsString;
use std::path::PathBuf;

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
