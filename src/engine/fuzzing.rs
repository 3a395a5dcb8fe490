//! Fuzz target of the manifest reader; see [`crate::fuzzing`].

use std::collections::HashSet;
use std::path::{Component, Path};

use super::Manifest;
use super::manifest::PlanInfo;
use crate::fuzzing::check_refusal;

/// Parses an `engine.json`, as it is and with its digest corrected: the paths of an accepted one stay inside the
/// package and are unique, every file used is listed, and it round-trips.
pub fn manifest(bytes: &[u8]) {
    let folder = Path::new("engines/package");
    if let Err(error) = Manifest::parse(folder, bytes) {
        check_refusal(&error);
    }
    let Ok(mut sealed) = serde_json::from_slice::<Manifest>(bytes) else { return };
    let Ok(text) = sealed.seal() else { return };
    let mut manifest = match Manifest::parse(folder, text.as_bytes()) {
        Ok(manifest) => manifest,
        Err(error) => {
            let message = error.to_string();
            assert!(!message.contains("digest"), "sealed, yet: {message}");
            return check_refusal(&error);
        }
    };
    assert_eq!(manifest, sealed);
    assert_eq!(manifest.seal().unwrap(), text);

    manifest.model.validate().unwrap();
    let mut paths = HashSet::new();
    for file in &manifest.files {
        let inside = Path::new(&file.path).components().all(|part| matches!(part, Component::Normal(_)));
        assert!(inside && !file.path.is_empty() && paths.insert(file.path.as_str()), "{:?}", file.path);
    }
    for file in manifest.plans.iter().flat_map(PlanInfo::files).chain(manifest.tokenizer.iter().map(|t| &t.file)) {
        assert!(manifest.file(file).is_some());
    }
    for plan in &manifest.plans {
        plan.tensorrt.iter().for_each(|info| {
            info.kv_bytes_per_token();
            info.bindings.iter().for_each(|binding| drop(binding.to_string()));
        });
    }
}
