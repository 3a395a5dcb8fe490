//! Checkpoints that torch wrote (tests/data/torch_dist, made by tools/make_torch_dist_fixtures.py), and broken and
//! hostile ones.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::checkpoint::nemo::container::MemberLocation;
use crate::checkpoint::testing::stored_elements;

const FC1: &str = "model.decoder.layers.mlp.linear_fc1.weight";
const EMBEDDING: &str = "model.embedding.word_embeddings.weight";

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new("tests/data/torch_dist").join(name)).unwrap()
}

/// The folder of a checkpoint.
struct SavedFolder(tempfile::TempDir);

impl SavedFolder {
    /// A checkpoint written by torch, copied from the folder `name`.
    fn of(name: &str) -> SavedFolder {
        let folder = SavedFolder(tempfile::tempdir().unwrap());
        fs::create_dir(folder.0.path().join("model_weights")).unwrap();
        for entry in fs::read_dir(Path::new("tests/data/torch_dist").join(name)).unwrap() {
            let path = entry.unwrap().path();
            folder.write(path.file_name().unwrap().to_str().unwrap(), fs::read(&path).unwrap());
        }
        folder
    }

    /// The files of `one-rank` with this metadata.
    fn with(metadata: impl AsRef<[u8]>) -> SavedFolder {
        let folder = SavedFolder::of("one-rank");
        folder.write(".metadata", metadata);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("model_weights").join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    fn container(&self) -> Container {
        Container::of_folder(self.0.path()).unwrap()
    }

    /// Reads it; whatever is read must lie inside the files.
    fn read(&self) -> Result<Vec<(String, ShardedTensor)>> {
        let container = self.container();
        let found = tensors(&container, "model_weights/")?;
        for (_, tensor) in &found {
            for Shard { origin, shape, strides, file, start } in &tensor.shards {
                assert!(origin.iter().zip(shape).zip(&tensor.shape).all(|((at, size), all)| at + size <= *all));
                if !shape.contains(&0) {
                    let last: usize = shape.iter().zip(strides).map(|(size, stride)| (size - 1) * stride).sum();
                    let bytes = start + last * tensor.dtype.bytes()..start + (last + 1) * tensor.dtype.bytes();
                    assert!(!container.bytes(&MemberLocation { file: *file, bytes }).unwrap().is_empty());
                }
            }
        }
        Ok(found)
    }

    /// The message of a refusal, which must name the member and `reason`.
    #[track_caller]
    fn refused(&self, member: &str, reason: &str) -> Error {
        let error = self.read().unwrap_err();
        let message = error.to_string();
        let rest = message.strip_prefix(&format!("{}: ", self.path(member).display()));
        assert!(rest.is_some_and(|rest| rest.contains(reason)), "{message}\nexpected: {member}: {reason}");
        error
    }
}

#[track_caller]
fn check_one(folder: &SavedFolder, expected: &str) {
    let all: Value = serde_json::from_slice(&fixture("expected.json")).unwrap();
    let expected = all[expected].as_object().unwrap();
    let container = folder.container();
    let found = tensors(&container, "model_weights/").unwrap();
    assert_eq!(found.len(), expected.len());
    for (name, tensor) in &found {
        let expected = &expected[name];
        assert_eq!(tensor.dtype.to_string(), expected["dtype"].as_str().unwrap(), "{name}");
        assert_eq!(serde_json::json!(tensor.shape), expected["shape"], "{name}");
        let hex: String = stored_elements(&container, tensor).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected["hex"].as_str().unwrap(), "{name}");
    }
}

#[test]
fn reads_what_torch_saved() {
    check_one(&SavedFolder::of("one-rank"), "one-rank");
    check_one(&SavedFolder::of("two-ranks"), "two-ranks");
    for metadata in ["older.metadata", "megatron-0.15.metadata"] {
        check_one(&SavedFolder::with(fixture(metadata)), "one-rank");
    }
}

#[test]
fn finds_the_chunks_of_layers_and_ranks() {
    let folder = SavedFolder::of("two-ranks");
    let container = folder.container();
    let found = tensors(&container, "model_weights/").unwrap();
    let origins = |name: &str| {
        let (_, tensor) = found.iter().find(|(found, _)| found == name).unwrap();
        let mut origins: Vec<_> = tensor.shards.iter().map(|shard| shard.origin.clone()).collect();
        origins.sort();
        origins
    };
    assert_eq!(origins(FC1), [[0, 0, 0], [0, 2, 0], [1, 0, 0], [1, 2, 0]]);
    assert_eq!(origins("model.decoder.layers.mlp.linear_fc2.weight"), [[0, 0, 0], [0, 0, 2], [1, 0, 0], [1, 0, 2]]);
    assert_eq!(origins(EMBEDDING), [[0, 0], [3, 0]]);
    assert_eq!(origins("model.decoder.final_layernorm.weight"), [[0]]);
    let files: std::collections::HashSet<usize> =
        found.iter().flat_map(|(_, tensor)| tensor.shards.iter().map(|shard| shard.file)).collect();
    assert_eq!(files.len(), 2);
}

#[test]
fn executes_nothing() {
    let error = SavedFolder::with(fixture("hostile.metadata"))
        .refused(".metadata", "imports `posix.system`, which is not allowed");
    assert!(error.to_string().ends_with("may only import its own record types; nothing was executed"), "{error}");
    let pickles: &[(&[u8], &str)] = &[
        (b"\x80\x04cbuiltins\ngetattr\n.", "imports `builtins.getattr`"),
        (b"\x80\x04cbuiltins\neval\n.", "imports `builtins.eval`"),
        (b"\x80\x04ctorch\nload\n.", "imports `torch.load`"),
        (b"\x80\x04ctorch.serialization\nload\n.", "imports `torch.serialization.load`"),
        (b"\x80\x04cpathlib\nPath.unlink\n.", "imports `pathlib.Path.unlink`"),
        (
            b"\x80\x04ctorch.distributed.checkpoint.metadata\nos\n.",
            "imports `torch.distributed.checkpoint.metadata.os`",
        ),
        (b"\x80\x04ctorch.distributed.checkpoint.filesystem\nFileSystemWriter\n.", "filesystem.FileSystemWriter`"),
        (b"\x80\x04cmegatron.core.dist_checkpointing.strategies.torch\nsave\n.", "strategies.torch.save`"),
        // What only tensors need.
        (b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n.", "imports `torch._utils._rebuild_tensor_v2`"),
        (b"\x80\x04ctorch\nFloatStorage\n.", "imports `torch.FloatStorage`"),
        (b"\x80\x04c_io\nBytesIO\n.", "imports `_io.BytesIO`"),
        (b"\x80\x04c_codecs\nencode\n.", "imports `_codecs.encode`"),
        // Allowed names in calls that nobody makes.
        (b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n)R.", "with 0 arguments, which is not supported"),
        (
            b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nK\x01\x85\x81.",
            "with 1 arguments, which is not supported",
        ),
        (b"\x80\x04cpathlib\nPosixPath\n)\x81.", "with 0 arguments, which is not supported; nothing was executed"),
        (b"\x80\x04ctorch\nbfloat16\n)R.", "with 0 arguments, which is not supported"),
        (b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n}b.", "BUILD of a class or function"),
        (b"\x80\x04)}b.", "BUILD of a tuple"),
        (b"\x80\x04\x92.", "opcode 0x92"),
        (b"\x80\x06N.", "protocol 6, expected 2 to 5"),
    ];
    for (pickle, reason) in pickles {
        SavedFolder::with(pickle).refused(".metadata", reason);
    }
}

// Values as pickles write them.

fn text(value: &str) -> Vec<u8> {
    [b"X", &(value.len() as u32).to_le_bytes()[..], value.as_bytes()].concat()
}

fn int(value: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &value.to_le_bytes()].concat()
}

fn tuple(values: &[Vec<u8>]) -> Vec<u8> {
    [b"(", &values.concat()[..], b"t"].concat()
}

fn list(values: &[Vec<u8>]) -> Vec<u8> {
    [b"](", &values.concat()[..], b"e"].concat()
}

fn dict(entries: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<Vec<u8>> = entries.iter().map(|(key, value)| [&key[..], value].concat()).collect();
    [b"}(", &entries.concat()[..], b"u"].concat()
}

fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

fn record(name: &str, state: Vec<u8>) -> Vec<u8> {
    let module = if name == "_StorageInfo" { "filesystem" } else { "metadata" };
    [&global(&format!("torch.distributed.checkpoint.{module}"), name)[..], b")\x81", &state, b"b"].concat()
}

fn fields(name: &str, fields: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let fields: Vec<_> = fields.iter().map(|(field, value)| (text(field), value.clone())).collect();
    record(name, dict(&fields))
}

fn size(values: &[i64]) -> Vec<u8> {
    let values: Vec<Vec<u8>> = values.iter().map(|value| int(*value)).collect();
    [&global("torch", "Size")[..], &tuple(&values), b"\x85R"].concat()
}

/// The metadata of `tensors` and `items`.
fn metadata(tensors: &[(Vec<u8>, Vec<u8>)], items: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let root = fields("Metadata", &[("state_dict_metadata", dict(tensors)), ("storage_data", dict(items))]);
    [b"\x80\x04", &root[..], b"."].concat()
}

/// A checkpoint of one tensor, [`FC1`] of `one-rank`, in its two chunks.
#[derive(Clone)]
struct Saved {
    dtype: &'static str,
    size: Vec<i64>,
    /// Offsets and sizes.
    chunks: Vec<(Vec<i64>, Vec<i64>)>,
    items: Vec<SavedItem>,
}

/// Where one of them lies.
#[derive(Clone)]
struct SavedItem {
    name: String,
    origin: Option<Vec<i64>>,
    file: String,
    start: i64,
    length: i64,
    transforms: Option<Vec<u8>>,
}

impl Saved {
    fn good() -> Saved {
        let bytes = fixture("one-rank/.metadata");
        let metadata = torch::read_metadata(Path::new(".metadata"), &bytes, |_| true).unwrap();
        let numbers = |list: &[usize]| list.iter().map(|number| *number as i64).collect::<Vec<_>>();
        let tensor = metadata.tensors.iter().find(|tensor| tensor.name == FC1).unwrap();
        let chunks = tensor.chunks.iter().map(|chunk| (numbers(&chunk.origin), numbers(&chunk.shape))).collect();
        let items = metadata.items.iter().filter(|item| item.name == FC1).map(|item| SavedItem {
            name: FC1.to_owned(),
            origin: item.origin.as_deref().map(numbers),
            file: item.file.to_owned(),
            start: item.bytes.start as i64,
            length: item.bytes.len() as i64,
            transforms: None,
        });
        let items: Vec<SavedItem> = items.collect();
        assert_eq!(items.len(), 2);
        Saved { dtype: "bfloat16", size: numbers(&tensor.shape), chunks, items }
    }

    fn tensor(&self) -> Vec<u8> {
        let properties = record("TensorProperties", tuple(&[global("torch", self.dtype), b"N".to_vec()]));
        let chunks = self.chunks.iter().map(|(offsets, sizes)| {
            fields("ChunkStorageMetadata", &[("offsets", size(offsets)), ("sizes", size(sizes))])
        });
        let chunks: Vec<Vec<u8>> = chunks.collect();
        let whole = [("properties", properties), ("size", size(&self.size)), ("chunks", list(&chunks))];
        fields("TensorStorageMetadata", &whole)
    }

    fn items(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let item = |item: &SavedItem| {
            let mut index = vec![("fqn", text(&item.name)), ("index", b"N".to_vec())];
            index.extend(item.origin.as_ref().map(|origin| ("offset", size(origin))));
            let mut info =
                vec![("relative_path", text(&item.file)), ("offset", int(item.start)), ("length", int(item.length))];
            info.extend(item.transforms.as_ref().map(|transforms| ("transform_descriptors", transforms.clone())));
            (fields("MetadataIndex", &index), fields("_StorageInfo", &info))
        };
        self.items.iter().map(item).collect()
    }

    fn folder(&self) -> SavedFolder {
        SavedFolder::with(metadata(&[(text(FC1), self.tensor())], &self.items()))
    }
}

#[test]
fn reads_metadata_written_by_hand() {
    let folder = Saved::good().folder();
    let container = folder.container();
    let found = tensors(&container, "model_weights/").unwrap();
    let whole = SavedFolder::of("one-rank");
    let other = whole.container();
    let expected = tensors(&other, "model_weights/").unwrap();
    let (_, expected) = expected.iter().find(|(name, _)| name == FC1).unwrap();
    assert_eq!(stored_elements(&container, &found[0].1), stored_elements(&other, expected));

    // A tensor that was saved whole, and whose place has no origin.
    let mut saved = Saved::good();
    saved.chunks.truncate(1);
    saved.items.truncate(1);
    (saved.size[0], saved.items[0].origin) = (1, None);
    assert_eq!(saved.folder().read().unwrap()[0].1.shape, [1, 4, 3]);
    // Transforms that are none.
    for none in [&b"N"[..], b"]", b")"] {
        saved.items[0].transforms = Some(none.to_vec());
        assert_eq!(saved.folder().read().unwrap().len(), 1);
    }
    // A tensor without chunks, for whoever needs its elements to refuse.
    saved.chunks.clear();
    assert!(saved.folder().read().unwrap()[0].1.shards.is_empty());
}

#[test]
fn refuses_metadata_that_does_not_fit_the_files() {
    type Change = fn(&mut Saved);
    let in_metadata: &[(Change, &str)] = &[
        (|s| s.dtype = "float8_e4m3fn", "its type is float8_e4m3fn, which is not supported"),
        (|s| s.dtype = "Size", "its type is a class or function, expected one such as torch.bfloat16"),
        (|s| s.size = vec![2, -4, 3], "its size is -4, expected a whole number of at least 0"),
        (|s| s.size = vec![1 << 40, 1 << 40, 3], "exceeds the address space"),
        (|s| s.size = vec![1; 9], "its size is a tuple of 9 axes, more than the limit of 8"),
        (|s| s.size = vec![2, 4], "chunk 0: sizes [1, 4, 3] at [0, 0, 0] exceed the tensor's shape [2, 4]"),
        (|s| s.size[0] = 1, "chunk 1: sizes [1, 4, 3] at [1, 0, 0] exceed the tensor's shape [1, 4, 3]"),
        (|s| s.chunks[1].0[1] = 1, "chunk 1: sizes [1, 4, 3] at [1, 1, 0] exceed the tensor's shape"),
        (
            |s| s.chunks[1].0[1] = i64::MAX,
            "chunk 1: sizes [1, 4, 3] at [1, 9223372036854775807, 0] exceed the tensor's shape",
        ),
        (|s| s.chunks[1].0[1] = -1, "chunk 1: its offsets are -1, expected a whole number"),
        (|s| s.chunks[1].1[1] = -1, "chunk 1: its sizes are -1, expected a whole number"),
        (|s| s.chunks[1].1.truncate(2), "chunk 1: sizes [1, 4] at [1, 0, 0] exceed the tensor's shape"),
        (|s| s.chunks[1].0[0] = 0, "chunk at [0, 0, 0]: it is not in `storage_data`, or two chunks have this origin"),
        (|s| drop(s.items.pop()), "chunk at [1, 0, 0]: it is not in `storage_data`"),
        (|s| s.items[1].name.push('x'), "chunk at [1, 0, 0]: it is not in `storage_data`"),
        (|s| s.items[1].origin = None, "chunk at [1, 0, 0]: it is not in `storage_data`"),
        (|s| s.items[1].origin = Some(vec![0, 0, 0]), "linear_fc1.weight` at [0, 0, 0] twice"),
        (|s| s.items[1].origin = Some(vec![0; 9]), "its origin is a tuple of 9 axes"),
        (
            |s| s.items[1].start -= 1,
            "in `__0_0.distcp`, the chunk of `model.decoder.layers.mlp.linear_fc1.weight` at [1, 0, 0]",
        ),
        (
            |s| s.items[1].start = s.items[0].start + 1,
            "overlaps the chunk of `model.decoder.layers.mlp.linear_fc1.weight` at",
        ),
        (|s| s.items[1].start = -1, "its offset is -1"),
        (|s| s.items[1].length = -1, "its length is -1"),
        (|s| s.items[0].file = String::new(), "it is in ``, expected the name of a file beside .metadata"),
        (|s| s.items[0].file = "../x.distcp".to_owned(), "it is in `../x.distcp`, expected the name of a file"),
        (|s| s.items[0].file = "..".to_owned(), "it is in `..`, expected the name of a file"),
        (|s| s.items[0].file = "/etc/passwd".to_owned(), "it is in `/etc/passwd`, expected the name of a file"),
        (|s| s.items[0].file = "sub/__0_0.distcp".to_owned(), "it is in `sub/__0_0.distcp`"),
        (|s| s.items[0].file = "x".repeat(1025), "its file is a string of 1025 bytes, more than the limit of 1024"),
        (|s| s.items[0].name = "x".repeat(1025), "entry 0 of `storage_data`: its name is a string of 1025 bytes"),
        (|s| s.items[0].transforms = Some(int(1)), "its transform_descriptors are an int, expected a list"),
        (|s| s.items[0].transforms = Some(list(&[int(1)])), "one of its transform_descriptors is an int"),
    ];
    for (change, reason) in in_metadata {
        let mut saved = Saved::good();
        change(&mut saved);
        saved.folder().refused(".metadata", reason);
    }
    let in_file: &[(Change, &str)] = &[
        (|s| s.dtype = "float16", "expected float16 [1, 4, 3]"),
        (|s| s.chunks[0].1[1] = 3, "expected bfloat16 [1, 3, 3]"),
        (|s| s.items[0].length -= 1, "no end record: the archive is truncated"),
        (|s| s.items[1].length += 20, "linear_fc1.weight`: chunk at [1, 0, 0]: at "),
        (|s| s.items[1].length = 1 << 40, "chunk at [1, 0, 0]: expected 1099511627776 bytes at "),
        (|s| s.items[1].start = 1 << 40, "bytes at 1099511627776, but the file has 18420"),
        (|s| s.items[1].start += 1, "do not start like a zip archive"),
        (|s| s.items[1].length = 0, "its 0 bytes do not start like a zip archive"),
    ];
    for (change, reason) in in_file {
        let mut saved = Saved::good();
        change(&mut saved);
        saved.folder().refused("__0_0.distcp", reason);
    }
    let mut saved = Saved::good();
    saved.items[0].transforms = Some(list(&[text("stream.zstd")]));
    let error = saved.folder().refused(".metadata", "it was transformed by `stream.zstd`, expected a plain torch.save");
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    saved = Saved::good();
    saved.items[0].file = "__7_0.distcp".to_owned();
    let error = saved.folder().read().unwrap_err().to_string();
    assert!(error.contains("`model_weights/__7_0.distcp` is missing"), "{error}");
    // A place whose end is past all numbers.
    let mut saved = Saved::good();
    (saved.items[1].start, saved.items[1].length) = (i64::MAX, i64::MAX);
    saved.folder().refused("__0_0.distcp", "9223372036854775807 bytes at 9223372036854775807");
    let empty = SavedFolder(tempfile::tempdir().unwrap());
    let error = empty.read().unwrap_err().to_string();
    assert!(error.contains("`model_weights/.metadata` is missing"), "{error}");
}

#[test]
fn refuses_records_that_make_no_sense() {
    let good = Saved::good();
    let (tensor, items) = (good.tensor(), good.items());
    let root = |value: Vec<u8>| [b"\x80\x04", &value[..], b"."].concat();
    let one = |tensor: Vec<u8>| metadata(&[(text("w"), tensor)], &[]);
    let none = || b"N".to_vec();
    let twice = [b"\x80\x04", &fields("Metadata", &[])[..], b"}b."].concat();
    let storage = |key: Vec<u8>, value: Vec<u8>| metadata(&[], &[(key, value)]);
    let (key, value) = items[0].clone();
    let properties = |state: Vec<u8>| {
        one(fields("TensorStorageMetadata", &[("properties", record("TensorProperties", state)), ("size", none())]))
    };
    let with_chunks = |chunks: Vec<u8>| {
        let properties = record("TensorProperties", tuple(&[global("torch", "float32")]));
        one(fields("TensorStorageMetadata", &[("properties", properties), ("size", size(&[2])), ("chunks", chunks)]))
    };
    let many: Vec<_> = (0..65).map(|index| (int(index), none())).collect();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (Vec::new(), "pickle at 0: the pickle is truncated"),
        (b"PK\x03\x04".to_vec(), "starts with byte 0x50, expected 0x80 and a protocol from 2 to 5"),
        (root(none()), "found None, expected a Metadata"),
        (root(dict(&[])), "found a dict, expected a Metadata"),
        (root(tensor.clone()), "found a TensorStorageMetadata, expected a Metadata"),
        (root(global("torch.distributed.checkpoint.metadata", "Metadata")), "found a class or function, expected"),
        (root(record("Metadata", tuple(&[]))), "the state of a Metadata is a tuple, expected a dict"),
        (root(record("Metadata", dict(&many))), "a Metadata has 65 fields, more than the limit of 64"),
        (root([&global("torch.distributed.checkpoint.metadata", "Metadata")[..], b")\x81"].concat()), "has no fields"),
        (twice, "BUILD of a Metadata that already has a state"),
        (root(fields("Metadata", &[])), "a Metadata has no `state_dict_metadata`"),
        (root(fields("Metadata", &[("state_dict_metadata", dict(&[]))])), "a Metadata has no `storage_data`"),
        (
            root(fields("Metadata", &[("storage_data", none()), ("state_dict_metadata", dict(&[]))])),
            "`storage_data` is None, expected a dict",
        ),
        (
            root(fields("Metadata", &[("state_dict_metadata", dict(&[])), ("state_dict_metadata", dict(&[]))])),
            "a Metadata has `state_dict_metadata` twice",
        ),
        (root(fields("Metadata", &[("state_dict_metadata", list(&[]))])), "`state_dict_metadata` is a list, expected"),
        (metadata(&[(int(1), tensor.clone())], &[]), "a key of `state_dict_metadata` is an int, expected a string"),
        (
            metadata(&[(text(&"w".repeat(1025)), tensor.clone())], &[]),
            "a string of 1025 bytes, more than the limit of 1024",
        ),
        (
            metadata(&[(text("w"), tensor.clone()), (text("w"), tensor.clone())], &items),
            "`state_dict_metadata` lists `w` twice",
        ),
        (one(none()), "tensor `w`: found None, expected a TensorStorageMetadata"),
        (one(record("StorageMeta", dict(&[]))), "tensor `w`: found another record, expected a TensorStorageMetadata"),
        (one(fields("TensorStorageMetadata", &[])), "tensor `w`: a TensorStorageMetadata has no `properties`"),
        (
            one(fields("TensorStorageMetadata", &[("properties", none())])),
            "tensor `w`: its properties are None, expected a TensorProperties with fields",
        ),
        (properties(dict(&[])), "the state of its properties is a dict, expected a tuple"),
        (properties(tuple(&[])), "its properties are empty"),
        (properties(tuple(&[none()])), "its type is None, expected one such as torch.bfloat16"),
        (properties(tuple(&[global("torch", "float32")])), "its size is None, expected a tuple"),
        (with_chunks(none()), "its chunks are None, expected a list"),
        (with_chunks(list(&[none()])), "chunk 0: found None, expected a ChunkStorageMetadata"),
        (
            with_chunks(list(&[fields("ChunkStorageMetadata", &[("offsets", size(&[0]))])])),
            "chunk 0: a ChunkStorageMetadata has no `sizes`",
        ),
        (with_chunks(b"]q\0h\0a".to_vec()), "chunk 0: found a list, expected a ChunkStorageMetadata"),
        (storage(text("w"), value.clone()), "entry 0 of `storage_data`: found a string, expected a MetadataIndex"),
        (storage(value.clone(), value.clone()), "found a _StorageInfo, expected a MetadataIndex"),
        (storage(fields("MetadataIndex", &[]), value.clone()), "a MetadataIndex has no `fqn`"),
        (storage(fields("MetadataIndex", &[("fqn", int(1))]), value), "its name is an int, expected a string"),
        (storage(key.clone(), key.clone()), "found a MetadataIndex, expected a _StorageInfo"),
        (storage(key.clone(), fields("_StorageInfo", &[])), "a _StorageInfo has no `relative_path`"),
        (
            storage(
                key,
                fields("_StorageInfo", &[("relative_path", text("a")), ("offset", b"G\0\0\0\0\0\0\0\0".to_vec())]),
            ),
            "its offset is a float, expected a whole number",
        ),
    ];
    for (pickle, reason) in cases {
        SavedFolder::with(pickle).refused(".metadata", reason);
    }
}

#[test]
fn keeps_shared_parts_small() {
    // One list of chunks for many tensors: each would be a copy.
    let chunk = fields("ChunkStorageMetadata", &[("offsets", size(&[0])), ("sizes", size(&[2]))]);
    let chunks = [&chunk[..], b"q\x01", &b"h\x01".repeat(9_999)].concat();
    let properties = record("TensorProperties", tuple(&[global("torch", "float32")]));
    let tensor = fields(
        "TensorStorageMetadata",
        &[("properties", properties), ("size", size(&[2])), ("chunks", [b"](", &chunks[..], b"e"].concat())],
    );
    let mut tensors = vec![(text("0"), [&tensor[..], b"q\x02"].concat())];
    tensors.extend((1..100).map(|index| (text(&index.to_string()), b"h\x02".to_vec())));
    SavedFolder::with(metadata(&tensors, &[])).refused(".metadata", "tensor `6`: more than 65536 chunks in all");

    // Tensors without number.
    let empty = fields(
        "TensorStorageMetadata",
        &[
            ("properties", record("TensorProperties", tuple(&[global("torch", "float32")]))),
            ("size", size(&[2])),
            ("chunks", list(&[])),
        ],
    );
    let mut tensors = vec![(text("0"), [&empty[..], b"q\x02"].concat())];
    tensors.extend((1..20_000).map(|index| (text(&index.to_string()), b"h\x02".to_vec())));
    SavedFolder::with(metadata(&tensors, &[])).refused(".metadata", "more than 16384 tensors");

    // Places without number, all the same.
    let (key, value) = Saved::good().items().swap_remove(0);
    let mut items = vec![([&key[..], b"q\x03"].concat(), [&value[..], b"q\x04"].concat())];
    items.extend(vec![(b"h\x03".to_vec(), b"h\x04".to_vec()); 300_000]);
    SavedFolder::with(metadata(&[], &items))
        .refused(".metadata", "`storage_data` has 300001 entries, more than the limit of 262144");

    for (opcode, limit) in [(&b"N"[..], "objects"), (&b"("[..], "marks")] {
        let pickle = [b"\x80\x04", opcode.repeat((1 << 20) + 1).as_slice()].concat();
        SavedFolder::with(pickle).refused(".metadata", &format!("more than 1048576 {limit}"));
    }
    let pickle = vec![b'N'; (32 << 20) + 1];
    SavedFolder::with(pickle).refused(".metadata", "the pickle has 33554433 bytes, more than the limit of 33554432");
}

#[test]
fn refuses_truncated_files() {
    let metadata = fixture("two-ranks/.metadata");
    let folder = SavedFolder::of("two-ranks");
    for end in (0..metadata.len()).step_by(41).chain([metadata.len() - 1]) {
        folder.write(".metadata", &metadata[..end]);
        folder.refused(".metadata", "pickle at ");
    }
    let folder = SavedFolder::of("two-ranks");
    let file = fixture("two-ranks/__1_0.distcp");
    for end in (0..file.len()).step_by(167).chain([file.len() - 1]) {
        folder.write("__1_0.distcp", &file[..end]);
        folder.refused("__1_0.distcp", "");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Damaged metadata is read or refused, never more; what it is read as lies inside the files.
    #[test]
    fn survives_damaged_metadata(
        name in prop::sample::select(vec!["one-rank/.metadata", "older.metadata", "megatron-0.15.metadata"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = fixture(name);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = SavedFolder::with(bytes).read();
    }

    /// So are damaged chunks.
    #[test]
    fn survives_damaged_chunks(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
    ) {
        let folder = SavedFolder::of("one-rank");
        let mut bytes = fixture("one-rank/__0_0.distcp");
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        folder.write("__0_0.distcp", bytes);
        let _ = folder.read();
    }

    /// So is any pickle, and metadata of any numbers.
    #[test]
    fn survives_any_metadata(
        pickle in prop::collection::vec(any::<u8>(), 0..200),
        numbers in prop::collection::vec(prop_oneof![0..5i64, any::<i64>(), Just(7000)], 14),
    ) {
        let path = Path::new(".metadata");
        let _ = torch::read_metadata(path, &[b"\x80\x04", pickle.as_slice()].concat(), |_| true);
        let mut saved = Saved::good();
        saved.size = numbers[..3].to_vec();
        saved.chunks[1] = (numbers[3..6].to_vec(), numbers[6..9].to_vec());
        saved.items[1].origin = Some(numbers[3..6].to_vec());
        (saved.items[1].start, saved.items[1].length) = (numbers[9], numbers[10]);
        let _ = saved.folder().read();
    }
}
