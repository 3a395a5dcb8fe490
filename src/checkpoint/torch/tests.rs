//! Files that torch wrote (tests/data/torch, made by tools/make_torch_fixtures.py), and broken and hostile ones.

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::checkpoint::sharded::ShardedTensor;
use crate::checkpoint::weight::{TensorView, Weight};
use crate::mmap::MappedFile;

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new("tests/data/torch").join(name)).unwrap()
}

fn read(bytes: &[u8]) -> Result<StateDict> {
    read_state_dict(Path::new("weights.ckpt"), bytes)
}

/// The message of a refusal, which must name the file and `reason`.
#[track_caller]
fn refused(bytes: &[u8], reason: &str) -> String {
    let error = read(bytes).unwrap_err().to_string();
    assert!(error.starts_with("weights.ckpt: ") && error.contains(reason), "{error}\nexpected: {reason}");
    error
}

fn numbers(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as usize).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn finds_what_torch_saved() {
    let expected: Value = serde_json::from_slice(&fixture("expected.json")).unwrap();
    let files = expected.as_object().unwrap();
    assert_eq!(files.len(), 10);
    for (file, tensors) in files {
        let bytes = fixture(file);
        let dict = read(&bytes).unwrap();
        let names: Vec<&str> = dict.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
        let tensors = tensors.as_array().unwrap();
        assert_eq!(names, tensors.iter().map(|tensor| tensor["name"].as_str().unwrap()).collect::<Vec<_>>(), "{file}");
        for expected in tensors {
            let name = expected["name"].as_str().unwrap();
            let tensor = dict.tensor(name).unwrap();
            assert_eq!(tensor.dtype.to_string(), expected["dtype"].as_str().unwrap(), "{file} {name}");
            assert_eq!(tensor.shape, numbers(&expected["shape"]), "{file} {name}");
            assert_eq!(tensor.strides, numbers(&expected["stride"]), "{file} {name}");
            assert_eq!(tensor.offset as u64, expected["offset"].as_u64().unwrap(), "{file} {name}");
            check_elements(tensor, &bytes, expected["hex"].as_str().unwrap());
        }
    }
}

/// The bytes of a tensor's elements, row-major, found one by one.
fn elements(tensor: &TorchTensor, bytes: &[u8]) -> Vec<u8> {
    let (width, storage) = (tensor.dtype.bytes(), &bytes[tensor.storage.clone()]);
    let mut out = Vec::new();
    for mut element in 0..tensor.elements() {
        let mut at = tensor.offset;
        for (size, stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
            at += element % size * stride;
            element /= size;
        }
        out.extend_from_slice(&storage[at * width..(at + 1) * width]);
    }
    out
}

fn check_elements(tensor: &TorchTensor, bytes: &[u8], expected: &str) {
    assert_eq!(hex(&elements(tensor, bytes)), expected, "{}", tensor.name);
    let (Some(dtype), 1..=2) = (tensor.dtype.weight(), tensor.shape.len()) else { return };
    if expected.is_empty() {
        return;
    }
    // As a weight, from a file in which something stands before it.
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [b"before", bytes].concat()).unwrap();
    // SAFETY: nothing changes the test's own file.
    #[allow(unsafe_code)]
    let files = [unsafe { MappedFile::open(file.path()) }.unwrap()];
    let sharded = ShardedTensor::of_torch(tensor, 0, 6);
    let weight = Weight::new(tensor.name.clone(), dtype, &sharded, &files);
    if tensor.name == "expanded" {
        assert!(weight.unwrap_err().contains("repeat elements or overflow"));
        return;
    }
    let weight = weight.unwrap();
    let view = TensorView { name: &tensor.name, dtype, shape: &tensor.shape, weight: &weight, files: &files };
    let all = view.raw(0..view.elements());
    assert_eq!(hex(&all), expected, "{}", tensor.name);
    let strided = ["transposed", "columns", "permuted"].contains(&tensor.name.as_str());
    assert_eq!(matches!(all, Cow::Owned(_)), strided, "{}", tensor.name);
    assert!(Weight::new(tensor.name.clone(), dtype, &ShardedTensor::of_torch(tensor, 0, bytes.len()), &files).is_err());
}

#[test]
fn reads_a_tensor_that_was_saved_alone() {
    let path = Path::new("tests/data/torch_dist/one-rank/__0_0.distcp");
    let (metadata, bytes) = (fs::read(path.with_file_name(".metadata")).unwrap(), fs::read(path).unwrap());
    let metadata = read_metadata(path, &metadata, |name| name == "model.decoder.final_layernorm.weight").unwrap();
    assert_eq!((metadata.tensors.len(), metadata.tensors[0].chunks.len()), (1, 1));
    let item = metadata.items.iter().find(|item| item.name == metadata.tensors[0].name).unwrap();
    let bytes = &bytes[item.bytes.clone()];
    let tensor = read_tensor(path, bytes).unwrap();
    assert_eq!((tensor.name.as_str(), tensor.dtype, tensor.shape.as_slice()), ("", ElementType::Float32, &[3][..]));
    assert_eq!(hex(&elements(&tensor, bytes)), "15813c3f34d4d63ef954ac3f");

    refused(bytes, "`archive/data.pkl`: found a tensor, expected a dict of tensors");
    for (pickle, found) in
        [(&b"\x80\x02}."[..], "a dict"), (b"\x80\x02N.", "None"), (b"\x80\x02ctorch\nSize\n.", "a class")]
    {
        let error = read_tensor(Path::new("x"), &archive(pickle, &[])).unwrap_err().to_string();
        assert!(error.starts_with(&format!("x: `archive/data.pkl`: found {found}")), "{error}");
        assert!(error.ends_with("expected a tensor"), "{error}");
    }
}

#[test]
fn lists_what_is_no_tensor() {
    for file in ["extra.pt", "protocol4.pt"] {
        let dict = read(&fixture(file)).unwrap();
        let kinds: Vec<_> = dict.others().iter().map(|(name, kind)| (name.as_str(), *kind)).collect();
        let expected = [
            ("norm._extra_state", "a stream of bytes"),
            ("other._extra_state", "None"),
            ("shape", "a tuple"),
            ("dtype", "a class or function"),
        ];
        assert_eq!(kinds, expected, "{file}");
    }
}

#[test]
fn refuses_files_that_torch_wrote_otherwise() {
    refused(&fixture("legacy.pt"), "format of torch before 1.6");
    refused(&fixture("hostile-module.pt"), "imports `torch.nn.modules.linear.Linear`, which is not allowed");
    refused(b"", "its 0 bytes do not start like a zip archive");
    refused(b"\x1f\x8b rest", "do not start like a zip archive");
}

#[test]
fn executes_nothing() {
    let error = refused(&fixture("hostile-system.pt"), "imports `posix.system`, which is not allowed");
    assert!(error.contains("`archive/data.pkl`: pickle at ") && error.ends_with("nothing was executed"), "{error}");
    refused(&fixture("hostile-eval.pt"), "imports `builtins.eval`");
    let pickles: &[(&[u8], &str)] = &[
        (b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.", "imports `os.system`"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", "imports `os.system`"),
        (b"\x80\x02c__builtin__\neval\n.", "imports `__builtin__.eval`"),
        (b"\x80\x02ctorch\nload\n.", "imports `torch.load`"),
        (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n.", "imports `torch._utils._rebuild_qtensor`"),
        (b"\x80\x02ctorch\nFloatStorage.__init__\n.", "imports `torch.FloatStorage.__init__`"),
        // What only the metadata of a distributed checkpoint needs.
        (b"\x80\x02cpathlib\nPosixPath\n.", "imports `pathlib.PosixPath`"),
        (b"\x80\x02ctorch.serialization\n_get_layout\n.", "imports `torch.serialization._get_layout`"),
        (b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n.", "checkpoint.metadata.Metadata`"),
        // Old opcodes that import or call.
        (b"\x80\x02(S'ls'\nios\nsystem\n.", "opcode 0x53 (`S`) is not supported"),
        (b"\x80\x02(ios\nsystem\n.", "opcode 0x69 (`i`) is not supported"),
        (b"\x80\x02(o.", "opcode 0x6f (`o`) is not supported"),
        (b"\x80\x02\x82\x01.", "opcode 0x82"),
        // Allowed names in calls that nobody makes.
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "with 0 arguments, which is not supported; nothing was executed"),
        (b"\x80\x02K\x01)R.", "it calls an int with a tuple, which is not supported; nothing was executed"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01R.", "it calls a class or function with an int"),
        (
            b"\x80\x02ccollections\nOrderedDict\n}b.",
            "BUILD of a class or function, which is not supported; nothing was executed",
        ),
        (b"\x80\x02ctorch\nSize\nK\x01\x85\x81.", "found an int, expected a dict"),
    ];
    for (pickle, reason) in pickles {
        refused(&archive(pickle, &[]), reason);
    }
}

#[test]
fn refuses_pickles_that_make_no_sense() {
    let pickles: &[(&[u8], &str)] = &[
        (b"", "pickle at 0: the pickle is truncated"),
        (b"}.", "starts with byte 0x7d, expected 0x80"),
        (b"\x80\x01}.", "protocol 1, expected 2 to 4"),
        (b"\x80\x05}.", "protocol 5, expected 2 to 4"),
        (b"\x80\x02\x80\x02}.", "a second PROTO opcode"),
        (b"\x80\x02}", "pickle at 3: the pickle is truncated"),
        (b"\x80\x02.", "the stack is empty"),
        (b"\x80\x02}}.", "1 values and 0 bytes left over"),
        (b"\x80\x02}.more", "0 values and 4 bytes left over"),
        (b"\x80\x02(}.", "1 values and 0 bytes left over"),
        (b"\x80\x02}(\x85.", "the stack is empty"),
        (b"\x80\x02t.", "no mark on the stack"),
        (b"\x80\x02}K\x01\x85u.", "no mark on the stack"),
        (b"\x80\x02}(K\x01u.", "a key without a value"),
        (b"\x80\x02)K\x01a.", "items appended to a tuple, expected a list"),
        (b"\x80\x02](K\x01K\x02u.", "keys set on a list, expected a dict"),
        (b"\x80\x02h\x07.", "the memo has no entry 7"),
        (b"\x80\x02q\x07.", "the stack is empty"),
        (b"\x80\x02X\x02\0\0\0\xff\xff.", "a string that is not UTF-8"),
        (b"\x80\x02X\xff\xff\xff\xff.", "the pickle is truncated"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", "the pickle is truncated"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "the pickle is truncated"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff}.", "the pickle is truncated"),
        (b"\x80\x04K\x01K\x02\x93.", "a global named by an int and an int, expected two strings"),
        (b"\x80\x02K\x01.", "found an int, expected a dict of tensors"),
        (b"\x80\x02}X\x0a\0\0\0state_dictK\x01s.", "the key `state_dict` is an int"),
        (b"\x80\x02}K\x01K\x02s.", "a key of the state dict is an int, expected a string"),
        (b"\x80\x02}(X\x01\0\0\0aNX\x01\0\0\0aNu.", "duplicate key `a` in the state dict"),
    ];
    for (pickle, reason) in pickles {
        let error = refused(&archive(pickle, &[]), reason);
        assert!(error.contains("`archive/data.pkl`: "), "{error}");
    }
}

#[test]
fn keeps_pickle_bombs_small() {
    // Each list holds the one before it twice; expanded it would have 2^1000 items.
    let mut doubling = b"\x80\x04]".to_vec();
    for _ in 0..1000 {
        doubling.extend(b"\x94]\x94(");
        doubling.extend([b'j', 0, 0, 0, 0, b'j', 0, 0, 0, 0, b'e']);
    }
    doubling.push(b'.');
    refused(&archive(&doubling, &[]), "left over");
    // Deeper than any stack of calls.
    let mut deep = b"\x80\x02".to_vec();
    deep.extend(b")");
    deep.extend([0x85; 200_000]);
    deep.push(b'.');
    refused(&archive(&deep, &[]), "found a tuple, expected a dict");
    // A list in itself.
    refused(&archive(b"\x80\x02]q\0h\0a.", &[]), "found a list");
    // Places far apart in the memo.
    refused(&archive(b"\x80\x02]r\xff\xff\xff\xff.", &[]), "found a list");
    for (opcodes, limit) in [(&b"N"[..], "objects"), (&b"("[..], "marks"), (&b"h\0"[..], "values on the stack")] {
        let pickle = [b"\x80\x02}q\0", opcodes.repeat((1 << 18) + 1).as_slice()].concat();
        refused(&archive(&pickle, &[]), &format!("more than 262144 {limit}"));
    }
    refused(&archive(&vec![b'N'; (8 << 20) + 1], &[]), "the pickle has 8388609 bytes, more than the limit of 8388608");
}

/// A state dict of one tensor `w` in a storage of floats.
struct Tensor {
    class: &'static str,
    count: i64,
    offset: i64,
    shape: Vec<i64>,
    strides: Vec<i64>,
    /// Bytes of the storage that the file contains.
    bytes: usize,
}

impl Tensor {
    fn good() -> Tensor {
        Tensor { class: "FloatStorage", count: 12, offset: 2, shape: vec![2, 3], strides: vec![4, 1], bytes: 48 }
    }

    fn archive(&self) -> Vec<u8> {
        let mut pickle =
            b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n".to_vec();
        pickle.extend(self.class.as_bytes());
        pickle.extend(b"\nX\x01\0\0\x000X\x03\0\0\0cpu");
        pickle.extend(int(self.count));
        pickle.extend(b"tQ");
        pickle.extend(int(self.offset));
        for numbers in [&self.shape, &self.strides] {
            pickle.push(b'(');
            pickle.extend(numbers.iter().flat_map(|number| int(*number)));
            pickle.push(b't');
        }
        pickle.extend(b"\x89ccollections\nOrderedDict\n)RtRs.");
        archive(&pickle, &[("archive/data/0", &vec![0x3f; self.bytes])])
    }
}

fn int(value: i64) -> Vec<u8> {
    [&[0x8a, 8][..], &value.to_le_bytes()].concat()
}

#[test]
fn refuses_tensors_outside_their_storage() {
    let dict = read(&Tensor::good().archive()).unwrap();
    assert_eq!(dict.tensors()[0].shape, [2, 3]);
    type Change = fn(&mut Tensor);
    let cases: &[(Change, &str)] = &[
        (|t| t.offset = -1, "its offset is -1, expected a whole number of at least 0"),
        (|t| t.offset = 6, "offset 6, shape [2, 3] and strides [4, 1] exceed its storage of 12 elements"),
        (|t| t.offset = i64::MAX, "exceed its storage"),
        (|t| t.shape = vec![-2, 3], "its size is -2"),
        (|t| t.shape = vec![1 << 40, 1 << 40], "exceeds the address space"),
        (|t| t.shape = vec![0, i64::MAX], "exceeds the address space"),
        (|t| t.shape = vec![1 << 40, 3], "exceed its storage"),
        (|t| t.shape = vec![2, 3, 1], "it has 3 sizes and 2 strides"),
        (|t| (t.shape, t.strides) = (vec![1; 9], vec![1; 9]), "a tuple of 9 axes, more than the limit of 8"),
        (|t| t.strides = vec![-4, 1], "its stride is -4"),
        (|t| t.strides = vec![i64::MAX, i64::MAX], "exceed its storage"),
        (|t| t.strides = vec![8, 1], "exceed its storage"),
        (|t| (t.shape, t.offset) = (vec![0, 3], 13), "exceed its storage"),
        (|t| t.count = -12, "the size of its storage is -12"),
        (|t| t.count = 13, "`data/0` has 48 bytes, expected 13 elements of float32"),
        (|t| t.count = i64::MAX, "has 48 bytes, expected 9223372036854775807 elements"),
        (|t| t.bytes = 47, "`data/0` has 47 bytes, expected 12 elements"),
        (|t| t.class = "DoubleStorage", "expected 12 elements of float64"),
        (|t| t.class = "UntypedStorage", "its storage is untyped"),
        (|t| t.class = "bfloat16", "the class of its storage is a class or function"),
        (|t| t.class = "QInt8Storage", "imports `torch.QInt8Storage`"),
    ];
    for (change, reason) in cases {
        let mut tensor = Tensor::good();
        change(&mut tensor);
        let error = refused(&tensor.archive(), reason);
        assert!(error.contains("tensor `w`: ") || error.contains("imports"), "{error}");
    }
}

#[test]
fn refuses_other_byte_orders_and_programs() {
    let empty = b"\x80\x02}.";
    assert!(read(&archive(empty, &[("archive/byteorder", b"little")])).unwrap().tensors().is_empty());
    assert!(read(&archive(empty, &[])).unwrap().tensors().is_empty());
    refused(&archive(empty, &[("archive/byteorder", b"big")]), "`archive/byteorder` is `big`, expected `little`");
    refused(&archive(empty, &[("archive/constants.pkl", b"")]), "a TorchScript archive");
    refused(&archive(empty, &[("other/data.pkl", b"")]), "two pickles, `archive/data.pkl` and `other/data.pkl`");
    refused(&zip_file(&[("model.json", b"{}")]), "without a member `<name>/data.pkl`");
    let missing = archive(b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x02\0\0\0..NK\x01tQK\0))tRs.", &[]);
    refused(&missing, "tensor `w`: the member `data/..` with its storage is missing");
}

/// A stored zip archive as small tools write it.
fn zip_file(members: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in members {
        let offset = bytes.len() as u32;
        let mut fixed = vec![0; 22];
        fixed[..2].copy_from_slice(&20u16.to_le_bytes());
        fixed[14..18].copy_from_slice(&(data.len() as u32).to_le_bytes());
        fixed[18..22].copy_from_slice(&(data.len() as u32).to_le_bytes());
        fixed.extend((name.len() as u16).to_le_bytes());
        fixed.extend(0u16.to_le_bytes());
        bytes.extend(b"PK\x03\x04");
        bytes.extend(&fixed);
        bytes.extend(name.as_bytes());
        bytes.extend(*data);
        directory.extend(b"PK\x01\x02\x14\0");
        directory.extend(&fixed);
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let start = bytes.len() as u32;
    bytes.extend(&directory);
    bytes.extend(b"PK\x05\x06\0\0\0\0");
    bytes.extend((members.len() as u16).to_le_bytes());
    bytes.extend((members.len() as u16).to_le_bytes());
    bytes.extend((directory.len() as u32).to_le_bytes());
    bytes.extend(start.to_le_bytes());
    bytes.extend([0, 0]);
    bytes
}

/// One with this pickle and these other members.
fn archive(pickle: &[u8], others: &[(&str, &[u8])]) -> Vec<u8> {
    let mut members = vec![("archive/data.pkl", pickle)];
    members.extend(others);
    zip_file(&members)
}

/// Where the first central entry starts, and the end record.
fn landmarks(bytes: &[u8]) -> (usize, usize) {
    let find = |what: &[u8]| bytes.windows(4).position(|window| window == what).unwrap();
    (find(b"PK\x01\x02"), find(b"PK\x05\x06"))
}

#[test]
fn refuses_zip_archives_that_contradict_themselves() {
    let good = archive(b"\x80\x02}.", &[("archive/version", b"3\n")]);
    assert!(read(&good).is_ok());
    let (entry, end) = landmarks(&good);
    let cases: &[(usize, &[u8], &str)] = &[
        (entry + 8, &[1], "member `archive/data.pkl`: it is encrypted"),
        (entry + 10, &[8], "member `archive/data.pkl`: it is compressed (method 8)"),
        (entry + 20, &[5], "it is stored, but its size 4 and compressed size 5 differ"),
        (entry + 20, &[0xff; 8], "its size is in the ZIP64 field, which is missing"),
        (entry + 20, &[0xfe; 8], "member `archive/data.pkl` at 0: its 4278124286 bytes overlap"),
        (entry + 28, &[0xff, 0xff], "has 65535 bytes"),
        (entry + 30, &[0xff, 0xff], "the central directory is truncated in the entry at"),
        (entry + 32, &[1], "expected an entry of the central directory at"),
        (entry + 34, &[1], "it is on disk 1; archives split"),
        (entry + 42, &[50], "its local header does not match its entry"),
        (entry + 42, &[0xf0, 0xff], "member `archive/data.pkl` at 65520: its local header is outside the archive"),
        (entry + 46, b"A", "member `Archive/data.pkl` at 0: its local header does not match its entry"),
        (entry + 46, &[0xff], "the name in the entry at"),
        (entry, b"PK\x01\x03", "expected an entry of the central directory at"),
        (26, &[0xff, 0xff], "its local header does not match its entry"),
        (28, &[0xff, 0xff], "its 4 bytes overlap the central directory"),
        (8, &[8], "its local header does not match its entry"),
        (end + 4, &[1], "split over several disks"),
        (end + 8, &[1], "split over several disks"),
        (end + 8, &[1, 0, 1, 0], "claims 1 members and ends at"),
        (end + 8, &[3, 0, 3, 0], "the central directory is truncated"),
        (end + 8, &[0xff, 0xff, 0xff, 0xff], "members on this disk is in the ZIP64 end record, which is missing"),
        (end + 8, &[0xfe, 0xff, 0xfe, 0xff], "the central directory is truncated"),
        (end + 12, &[1], "the central directory of"),
        (end + 16, &[1], "the central directory of"),
        (end + 20, &[1], "no end record: the archive is truncated"),
    ];
    for (at, change, reason) in cases {
        let mut bytes = good.clone();
        bytes[*at..at + change.len()].copy_from_slice(change);
        refused(&bytes, reason);
    }
    refused(&[&good[..], b"more"].concat(), "no end record: the archive is truncated");
    refused(&[&b"PK\x03\x04"[..], &good].concat(), "is there data before the archive?");
    refused(&zip_file(&[("a", b"1"), ("a", b"2")]), "duplicate member `a`");

    // The second entry points into the first member's data, where a copy of its local header lies.
    let second = zip_file(&[("archive/version", b"3\n")]);
    let (inner, _) = landmarks(&second);
    let mut bytes = zip_file(&[("archive/data.pkl", &second[..inner]), ("archive/version", b"3\n")]);
    let at = bytes.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap() + 42;
    bytes[at..at + 4].copy_from_slice(&46u32.to_le_bytes());
    refused(&bytes, "member `archive/version` at 46 overlaps member `archive/data.pkl`");
}

#[test]
fn refuses_zip64_records_that_contradict_themselves() {
    let good = fixture("zip64.pt");
    let find = |what: &[u8]| good.windows(4).position(|window| window == what).unwrap();
    let (entry, end64, locator) = (find(b"PK\x01\x02"), find(b"PK\x06\x06"), find(b"PK\x06\x07"));
    let name_bytes = usize::from(good[entry + 28]);
    let cases: &[(usize, &[u8], &str)] = &[
        (end64, b"PK\x06\x05", "does not point to a ZIP64 end record"),
        (end64 + 4, &[45], "does not point to a ZIP64 end record"),
        (end64 + 4, &[0xff; 8], "does not point to a ZIP64 end record"),
        (end64 + 16, &[1], "disk is 0 in the end record, but 1 in the ZIP64 end record"),
        (end64 + 24, &[0xff; 16], "18446744073709551615 members, more than the limit of 100000"),
        (end64 + 40, &[0xff; 16], "directory of 18446744073709551615 bytes at 18446744073709551615"),
        (locator + 4, &[1], "several disks are not supported (disk 1 of 1)"),
        (locator + 8, &[0xff; 8], "does not point to a ZIP64 end record"),
        (locator + 16, &[2], "several disks are not supported (disk 0 of 2)"),
        (entry + 46 + name_bytes, &[2], "its size is in the ZIP64 field, which is missing"),
        (entry + 46 + name_bytes + 2, &[8], "its compressed size is in the ZIP64 field, which is missing"),
        (entry + 46 + name_bytes + 2, &[0xff], "its extra fields are truncated"),
        (entry + 46 + name_bytes + 4, &[0xff; 16], "bytes overlap the central directory"),
        (entry + 46 + name_bytes + 20, &[0xff; 8], "at 18446744073709551615: its local header is outside the archive"),
    ];
    for (at, change, reason) in cases {
        let mut bytes = good.clone();
        bytes[*at..at + change.len()].copy_from_slice(change);
        refused(&bytes, reason);
    }
}

#[test]
fn refuses_truncated_files() {
    for file in ["plain.pt", "views.pt", "protocol4.pt", "zip64.pt"] {
        let bytes = fixture(file);
        for end in (0..bytes.len()).step_by(37).chain([bytes.len() - 1]) {
            refused(&bytes[..end], "");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// A damaged file is read or refused, never more; and what it is read as can be used.
    #[test]
    fn survives_damage(
        file in prop::sample::select(vec!["plain.pt", "extra.pt", "protocol4.pt", "nested.pt", "views.pt", "zip64.pt"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = fixture(file);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        match read(&bytes) {
            Ok(dict) => {
                for tensor in dict.tensors() {
                    prop_assert_eq!(elements(tensor, &bytes).len(), tensor.elements() * tensor.dtype.bytes());
                }
            }
            Err(error) => prop_assert!(error.to_string().starts_with("weights.ckpt: "), "{}", error),
        }
    }

    /// So is a file with any pickle.
    #[test]
    fn survives_any_pickle(pickle in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&archive(&[b"\x80\x04", pickle.as_slice()].concat(), &[]));
    }
}
