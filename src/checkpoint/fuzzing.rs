//! Fuzz targets of the readers of a checkpoint's files; see [`crate::fuzzing`].

use std::path::Path;

use super::nemo::container::Container;
use super::tar::{Archive, MemberKind};
use super::{generation, hf_config, hugging_face, json, schema};
use crate::fuzzing::check_refusal;
use crate::mmap::MappedFile;

pub use super::nemo::fuzzing::{metadata, nemo, torch_dist, yaml, zarr};
pub use super::torch::fuzzing::{pickle, zip};

/// A tar archive: member names are unique and stay inside it, and each member's data lies in the file, after its own
/// header and the previous member's data.
pub fn tar(bytes: &[u8]) {
    const HEADER_BYTES: usize = 512;
    let path = Path::new("model.nemo");
    let archive = match Archive::read(path, bytes) {
        Ok(archive) => archive,
        Err(error) => return check_refusal(&error),
    };
    let mut end = 0;
    for member in archive.members() {
        let parts_fit = member.name.split('/').all(|part| !matches!(part, "" | "." | ".."));
        assert!(parts_fit && !member.name.contains('\0'), "{:?}", member.name);
        assert_eq!(archive.member(&member.name), Some(member));
        if member.kind == MemberKind::File {
            assert!(member.bytes.start >= end + HEADER_BYTES, "{member:?} is not behind {end}");
            assert!(member.bytes.start <= member.bytes.end && member.bytes.end <= bytes.len(), "{member:?}");
            end = member.bytes.end;
            assert_eq!(archive.file(&member.name).unwrap(), member.bytes);
        } else {
            assert_eq!(member.bytes, 0..0);
            check_refusal(&archive.file(&member.name).unwrap_err());
        }
    }

    let container = Container::of_archive(path, MappedFile::in_memory(path, bytes)).unwrap();
    for member in archive.members() {
        match container.get(&member.name) {
            Ok(place) => assert_eq!(container.bytes(place).unwrap(), &bytes[member.bytes.clone()]),
            Err(error) => {
                assert_ne!(member.kind, MemberKind::File);
                check_refusal(&error);
            }
        }
    }
}

/// JSON of a Hugging Face folder (`config.json`, `generation_config.json`, the index of shards): a parsed object
/// round-trips through its text, and an accepted config describes a valid model.
pub fn json(bytes: &[u8]) {
    let path = Path::new("config.json");
    let object = match json::parse_object(path, bytes) {
        Ok(object) => object,
        Err(error) => return check_refusal(&error),
    };
    let text = serde_json::to_vec(&object).unwrap();
    assert_eq!(json::parse_object(path, &text).unwrap(), object);

    match hf_config::read(path, object.clone()) {
        Ok(config) => {
            config.model.validate().unwrap();
            assert!(config.model.parameters().is_some() && schema::expected(&config.model).is_some());
        }
        Err(error) => check_refusal(&error),
    }
    match generation::read(path, object.clone(), 256_000) {
        Ok(config) => assert!(config.eos_token_ids.iter().all(|id| *id < 256_000)),
        Err(error) => check_refusal(&error),
    }
    match hugging_face::shards(path, object) {
        Ok(shard_of) => assert!(shard_of.values().all(|shard| Path::new(shard).file_name() == Some(shard.as_ref()))),
        Err(error) => check_refusal(&error),
    }
}
