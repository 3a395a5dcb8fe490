//! Arrays written by hand as Megatron writes them, and broken and hostile ones.

use std::fs;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::checkpoint::testing::stored_elements;

/// The folder of a checkpoint.
struct ZarrFolder(tempfile::TempDir);

impl ZarrFolder {
    fn new() -> ZarrFolder {
        ZarrFolder(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.0.path().join(name)).unwrap();
    }

    fn container(&self) -> Container {
        Container::of_folder(self.0.path()).unwrap()
    }

    fn read(&self) -> Result<Vec<(String, ShardedTensor)>> {
        tensors(&self.container(), "model_weights/")
    }

    /// The message of a refusal, which must name the member `weights/<member>` and `reason`.
    #[track_caller]
    fn refused(&self, member: &str, reason: &str) {
        let error = self.read().unwrap_err().to_string();
        let path = self.0.path().join("model_weights").join(member);
        let rest = error.strip_prefix(&format!("{}: ", path.display()));
        assert!(rest.is_some_and(|rest| rest.contains(reason)), "{error}\nexpected: {member}: {reason}");
    }

    /// Writes the array `w` of random bytes; returns them in the order of the whole tensor.
    fn add(&self, name: &str, dtype: (&str, usize), shape: &[usize], chunk: &[usize], separator: &str) -> Vec<u8> {
        let (dtype, width) = dtype;
        let mut description = description(dtype, shape, chunk);
        if separator != "." {
            description["dimension_separator"] = separator.into();
        }
        self.write(&format!("model_weights/{name}/.zarray"), description.to_string());
        let mut state = 7 + shape.len() as u32;
        let mut byte = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 24) as u8
        };
        let elements = count(shape).unwrap();
        let whole: Vec<u8> = (0..elements * width).map(|_| byte()).collect();
        let grid: Vec<usize> = shape.iter().zip(chunk).map(|(size, chunk)| size.div_ceil(*chunk)).collect();
        let strides = row_major(shape);
        for index in indices(&grid) {
            let mut data = Vec::new();
            for inner in indices(chunk) {
                let at: Vec<usize> =
                    index.iter().zip(chunk).zip(&inner).map(|((index, chunk), inner)| index * chunk + inner).collect();
                if at.iter().zip(shape).all(|(at, size)| at < size) {
                    let at: usize = at.iter().zip(&strides).map(|(at, stride)| at * stride).sum();
                    data.extend(&whole[at * width..][..width]);
                } else {
                    // Behind the end of an axis: anything.
                    data.extend((0..width).map(|_| byte()));
                }
            }
            let parts: Vec<String> = index.iter().map(usize::to_string).collect();
            let file = if parts.is_empty() { "0".to_owned() } else { parts.join(separator) };
            self.write(&format!("model_weights/{name}/{file}"), data);
        }
        whole
    }
}

fn description(dtype: &str, shape: &[usize], chunk: &[usize]) -> Value {
    json!({
        "chunks": chunk, "compressor": null, "dtype": dtype, "fill_value": null, "filters": null, "order": "C",
        "shape": shape, "zarr_format": 2
    })
}

/// All indices of a tensor of these sizes, in row-major order.
fn indices(sizes: &[usize]) -> Vec<Vec<usize>> {
    let first = (!sizes.contains(&0)).then(|| vec![0; sizes.len()]);
    std::iter::successors(first, |index| following(index.clone(), sizes)).collect()
}

const BF16: (&str, usize) = ("bfloat16", 2);
const F32: (&str, usize) = ("<f4", 4);

/// Name, dtype and its width, shape, chunk, separator.
type Written<'a> = (&'a str, (&'a str, usize), &'a [usize], &'a [usize], &'a str);

#[test]
fn reads_chunks_back() {
    let folder = ZarrFolder::new();
    let arrays: &[Written] = &[
        ("model.decoder.final_layernorm.weight", F32, &[6], &[6], "."),
        ("model.decoder.layers.mlp.linear_fc1.weight", BF16, &[3, 8, 6], &[1, 4, 6], "."),
        ("model.decoder.layers.mlp.linear_fc2.weight", BF16, &[3, 6, 8], &[1, 6, 2], "/"),
        ("model.embedding.word_embeddings.weight", ("<f2", 2), &[13, 6], &[13, 6], "."),
        // Chunks that lead over the end, and one that is larger than the tensor.
        ("model.edges", F32, &[5, 7, 3], &[2, 3, 2], "."),
        ("model.larger", BF16, &[2, 3], &[4, 8], "."),
        ("model.scalar", ("<i8", 8), &[], &[], "."),
        ("model.scalar-in-folders", ("|u1", 1), &[], &[], "/"),
        ("model.wide", F32, &[1, 30], &[1, 2], "."),
        ("group/of/arrays", ("<c16", 16), &[3, 2], &[2, 2], "/"),
    ];
    let expected: Vec<Vec<u8>> = arrays
        .iter()
        .map(|(name, dtype, shape, chunk, separator)| folder.add(name, *dtype, shape, chunk, separator))
        .collect();
    let container = folder.container();
    let found = tensors(&container, "model_weights/").unwrap();
    assert_eq!(found.len(), arrays.len());
    for ((name, (_, width), shape, chunk, _), expected) in arrays.iter().zip(&expected) {
        let tensor = &found.iter().find(|(found, _)| found == name).unwrap().1;
        assert_eq!((tensor.shape.as_slice(), tensor.dtype.bytes()), (*shape, *width), "{name}");
        let chunks: usize = shape.iter().zip(*chunk).map(|(size, chunk)| size.div_ceil(*chunk)).product();
        assert_eq!(tensor.shards.len(), chunks, "{name}");
        assert_eq!(stored_elements(&container, tensor), *expected, "{name}");
    }
}

#[test]
fn reads_an_archive_in_place() {
    let folder = ZarrFolder::new();
    let expected = folder.add("w", BF16, &[3, 8, 6], &[1, 4, 6], ".");
    let file = folder.0.path().join("x.nemo");
    let names = ["-cf", file.to_str().unwrap(), "-C", folder.0.path().to_str().unwrap(), "./model_weights"];
    // Where tar is not installed, there is nothing to read.
    let Ok(status) = std::process::Command::new("tar").args(names).status() else { return };
    assert!(status.success());
    // SAFETY: nothing changes the test's own file.
    #[allow(unsafe_code)]
    let mapped = unsafe { crate::mmap::MappedFile::open(&file) }.unwrap();
    let container = Container::of_archive(&file, mapped).unwrap();
    let found = tensors(&container, "model_weights/").unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(stored_elements(&container, &found[0].1), expected);
    assert!(found[0].1.shards.iter().all(|shard| shard.file == 0));
}

#[test]
fn knows_the_types_that_numpy_writes() {
    for (name, dtype) in [
        ("|b1", ElementType::Bool),
        ("|u1", ElementType::Uint8),
        ("|i1", ElementType::Int8),
        ("<i2", ElementType::Int16),
        ("<i4", ElementType::Int32),
        ("<i8", ElementType::Int64),
        ("<f2", ElementType::Float16),
        ("bfloat16", ElementType::Bfloat16),
        ("<f4", ElementType::Float32),
        ("<f8", ElementType::Float64),
        ("<c8", ElementType::Complex64),
        ("<c16", ElementType::Complex128),
    ] {
        let folder = ZarrFolder::new();
        let expected = folder.add("w", (name, dtype.bytes()), &[2, 3], &[1, 3], ".");
        let container = folder.container();
        let found = tensors(&container, "model_weights/").unwrap();
        assert_eq!(found[0].1.dtype, dtype);
        assert_eq!(stored_elements(&container, &found[0].1), expected, "{name}");
    }
}

#[test]
fn leaves_out_what_is_no_weight() {
    let folder = ZarrFolder::new();
    folder.add("w", F32, &[2], &[2], ".");
    folder.write("model_weights/common.pt", "PK");
    folder.write("model_weights/metadata.json", "{}");
    folder.write("model_weights/w/.zattrs", "{}");
    folder.write("model_weights/.zgroup", "{}");
    folder.write("model_weights/a.mlp.linear_fc1._extra_state/shard_0_32.pt", "PK");
    folder.write("model_weights/b.mlp.linear_fc1._extra_state/.zarray", "not JSON");
    folder.write("model_weights/objects/shard_0.pt", "PK");
    folder.write("other/v/.zarray", "not JSON");
    let names: Vec<String> = folder.read().unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["w"]);
    // An array without elements has no chunks.
    let folder = ZarrFolder::new();
    folder.add("empty", F32, &[0, 3], &[1, 3], ".");
    let found = folder.read().unwrap();
    assert_eq!((found[0].1.shape.as_slice(), found[0].1.shards.len()), (&[0, 3][..], 0));
    assert!(ZarrFolder::new().read().unwrap().is_empty());
}

#[test]
fn refuses_descriptions_of_other_arrays() {
    let folder = ZarrFolder::new();
    folder.add("w", F32, &[4, 6], &[2, 6], ".");
    let good = description("<f4", &[4, 6], &[2, 6]);
    let with = |key: &str, value: Value| {
        let mut description = good.clone();
        description[key] = value;
        description.to_string()
    };
    let unsupported = [
        (with("zarr_format", 3.into()), "`zarr_format` is 3, expected 2 (zarr format 2)"),
        (with("zarr_format", "2".into()), "`zarr_format` is \"2\", expected 2"),
        (with("compressor", json!({"id": "blosc"})), "`compressor` is {\"id\":\"blosc\"}, expected null"),
        (with("filters", json!([{"id": "delta"}])), "`filters` is [{\"id\":\"delta\"}], expected null"),
        (with("order", "F".into()), "`order` is \"F\", expected \"C\" (row-major chunks)"),
        (with("dtype", ">f4".into()), "`dtype` is \">f4\", expected \"bfloat16\" or a little-endian type"),
        (with("dtype", "<V2".into()), "`dtype` is \"<V2\", expected"),
        (with("dtype", "|O".into()), "`dtype` is \"|O\", expected"),
        (with("dtype", "<u4".into()), "`dtype` is \"<u4\", expected"),
        (with("dtype", json!([["x", "<f4"]])), "`dtype` is [[\"x\",\"<f4\"]], expected"),
        (with("dimension_separator", "-".into()), "`dimension_separator` is \"-\", expected \".\" or \"/\""),
        (with("dimension_separator", Value::Null), "`dimension_separator` is null, expected"),
    ];
    for (description, reason) in unsupported {
        folder.write("model_weights/w/.zarray", description);
        folder.refused("w/.zarray", reason);
        assert!(matches!(folder.read(), Err(Error::Unsupported { .. })), "{reason}");
    }
    let missing = |key: &str| {
        let mut description = good.clone();
        description.as_object_mut().unwrap().remove(key);
        description.to_string()
    };
    let damaged = [
        (String::new(), "not valid JSON"),
        ("[]".to_owned(), "expected a JSON object, found a list"),
        (good.to_string().replace("\"order\"", "\"dtype\""), "duplicate key `dtype`"),
        (format!("{good}{}", " ".repeat(MAX_DESCRIPTION_BYTES)), "bytes, more than the limit of 65536"),
        (missing("zarr_format"), "`zarr_format` is missing"),
        (missing("compressor"), "`compressor` is missing"),
        (missing("order"), "`order` is missing"),
        (missing("dtype"), "`dtype` is missing"),
        (missing("shape"), "`shape` is missing"),
        (missing("chunks"), "`chunks` is missing"),
        (with("shape", 24.into()), "`shape` is a number, expected a list of sizes"),
        (with("shape", json!([4, -6])), "`shape` contains -6, expected whole numbers of at least 0"),
        (with("shape", json!([4, 6.0])), "`shape` contains 6.0, expected whole numbers"),
        (with("chunks", json!([2, null])), "`chunks` contains null, expected whole numbers of at least 1"),
        (with("chunks", json!([0, 6])), "`chunks` contains 0, expected whole numbers of at least 1"),
        (with("chunks", json!(true)), "`chunks` is a boolean, expected a list of sizes"),
        (with("chunks", json!([12])), "`shape` [4, 6] and `chunks` [12] differ in their number of axes"),
        (with("shape", json!(vec![1; 9])), "`shape` has 9 axes, more than the limit of 8"),
        (with("shape", json!([1u64 << 40, 1u64 << 40])), "exceeds the address space"),
        (with("shape", json!([0, 1u64 << 62])), "exceeds the address space"),
        (
            with("chunks", json!([1u64 << 40, 1u64 << 40])),
            "`chunks` [1099511627776, 1099511627776] exceeds the address space",
        ),
        (
            with("shape", json!([1u64 << 40, 6])),
            "a grid of [549755813888, 1] chunks, more than the limit of 65536 in all",
        ),
        (with("shape", json!([131074, 6])), "a grid of [65537, 1] chunks, more than the limit of 65536 in all"),
    ];
    for (description, reason) in damaged {
        folder.write("model_weights/w/.zarray", description);
        folder.refused("w/.zarray", reason);
        assert!(matches!(folder.read(), Err(Error::Format { .. })), "{reason}");
    }
    let mut bare = good;
    bare.as_object_mut().unwrap().retain(|key, _| key != "filters" && key != "fill_value");
    folder.write("model_weights/w/.zarray", bare.to_string());
    assert_eq!(folder.read().unwrap().len(), 1);
}

#[test]
fn refuses_chunks_that_do_not_fit() {
    let folder = ZarrFolder::new();
    folder.add("w", F32, &[4, 6], &[2, 6], ".");
    let restore = || folder.write("model_weights/w/1.0", [0; 48]);
    // An axis that claims more than there is stops at the first chunk that is missing.
    folder.write("model_weights/w/.zarray", description("<f4", &[131072, 6], &[2, 6]).to_string());
    folder.refused("w/.zarray", "chunk `2.0` is missing; expected one file for each chunk of the grid [65536, 1]");
    folder.write("model_weights/w/.zarray", description("<f4", &[4, 6], &[2, 6]).to_string());
    restore();
    folder.remove("model_weights/w/1.0");
    folder.refused("w/.zarray", "chunk `1.0` is missing; expected one file for each chunk of the grid [2, 1]");
    std::os::unix::fs::symlink("0.0", folder.0.path().join("model_weights/w/1.0")).unwrap();
    folder.refused("w/.zarray", "chunk `1.0` is missing");
    folder.remove("model_weights/w/1.0");
    for bytes in [0, 47, 49, 96] {
        folder.write("model_weights/w/1.0", vec![0; bytes]);
        folder.refused("w/1.0", &format!("the chunk has {bytes} bytes, expected 48 for [2, 6] of float32"));
    }
    restore();
    for name in ["2.0", "0.1", "00.0", "18446744073709551616.0"] {
        folder.write(&format!("model_weights/w/{name}"), [0; 48]);
        folder.refused(&format!("w/{name}"), &format!("chunk `{name}` is outside the grid [2, 1]"));
        folder.remove(&format!("model_weights/w/{name}"));
    }
    for name in ["0", "0.0.0", "0.", "+1.0", "0.0.partial", "-1.0", "c/0/0", "v/.zarray", "notes", ".zarray.old", "١.0"]
    {
        folder.write(&format!("model_weights/w/{name}"), [0; 48]);
        folder.refused(&format!("w/{name}"), "not a chunk of the array; expected file names such as `0.0`");
        folder.remove(&format!("model_weights/w/{name}"));
    }
    assert_eq!(folder.read().unwrap().len(), 1);
    // An edge cut to the shape, as other writers may store it.
    let folder = ZarrFolder::new();
    folder.add("edge", BF16, &[5, 3], &[2, 3], "/");
    folder.write("model_weights/edge/2/0", [0; 6]);
    folder.refused("edge/2/0", "the chunk has 6 bytes, expected 12 for [2, 3] of bfloat16");
    let folder = ZarrFolder::new();
    folder.add("empty", F32, &[0, 3], &[1, 3], ".");
    folder.write("model_weights/empty/0.0", [0; 12]);
    folder.refused("empty/0.0", "chunk `0.0` is outside the grid [0, 1]");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// A damaged description is read or refused, never more; and what it is read as can be used.
    #[test]
    fn survives_damage(
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(b"0123456789[]{},.:\"-FCf<>|n\0\xff".to_vec())), 1..5),
    ) {
        let folder = ZarrFolder::new();
        folder.add("w", BF16, &[3, 4, 5], &[1, 2, 5], ".");
        let mut text = description("bfloat16", &[3, 4, 5], &[1, 2, 5]).to_string().into_bytes();
        for (at, value) in changes {
            let at = at.index(text.len());
            text[at] = value;
        }
        folder.write("model_weights/w/.zarray", &text);
        let container = folder.container();
        match tensors(&container, "model_weights/") {
            Ok(found) => {
                for (_, tensor) in found {
                    let bytes = tensor.shape.iter().product::<usize>() * tensor.dtype.bytes();
                    prop_assert_eq!(stored_elements(&container, &tensor).len(), bytes);
                }
            }
            Err(error) => prop_assert!(error.to_string().starts_with(folder.0.path().to_str().unwrap()), "{}", error),
        }
    }

    /// So is one of any numbers.
    #[test]
    fn survives_any_sizes(
        shape in prop::collection::vec(prop_oneof![0..9u64, any::<u64>()], 0..5),
        chunks in prop::collection::vec(prop_oneof![0..9u64, any::<u64>()], 0..5),
        dtype in prop::sample::select(vec!["<f4", "bfloat16", "|u1", "<c16"]),
    ) {
        let folder = ZarrFolder::new();
        let mut description = description(dtype, &[], &[]);
        (description["shape"], description["chunks"]) = (shape.into(), chunks.into());
        folder.write("model_weights/w/.zarray", description.to_string());
        folder.write("model_weights/w/0.0", [0; 24]);
        let container = folder.container();
        for (_, tensor) in tensors(&container, "model_weights/").unwrap_or_default() {
            stored_elements(&container, &tensor);
        }
    }
}
