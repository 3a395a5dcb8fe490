use std::path::PathBuf;

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;
use crate::checkpoint::testing::with_header;

const GOOD: &str = concat!(
    r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},"#,
    r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"empty":{"dtype":"U8","shape":[0,9],"data_offsets":[20,20]}}  "#
);

fn open(bytes: &[u8]) -> (tempfile::TempDir, PathBuf, Result<TensorFile>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let opened = TensorFile::open(&path);
    (folder, path, opened)
}

/// The message of opening a file of `header` and `data`.
fn refusal(header: &str, data: &[u8]) -> String {
    let (_folder, path, opened) = open(&with_header(header, data));
    let message = opened.expect_err(header).to_string();
    assert!(message.starts_with(&path.display().to_string()), "{message}");
    message
}

#[test]
fn finds_tensors_where_the_header_says() {
    let data: Vec<u8> = (0..20).collect();
    let (_folder, path, file) = open(&with_header(GOOD, &data));
    let file = file.unwrap();
    assert_eq!(file.path(), path);
    assert_eq!(file.tensors().iter().map(|tensor| tensor.name.as_str()).collect::<Vec<_>>(), ["a", "b", "empty"]);
    assert_eq!(file.metadata()["format"], "pt");
    let (tensor, bytes) = file.tensor("b").unwrap();
    assert_eq!((tensor.dtype, tensor.shape.as_slice(), bytes), (Dtype::BF16, [2, 3].as_slice(), &data[8..]));
    assert_eq!(file.tensor("a").unwrap().1, &data[..8]);
    assert!(file.tensor("empty").unwrap().1.is_empty());
    assert!(file.tensor("c").is_none());
}

#[test]
fn accepts_no_tensors_and_a_scalar() {
    assert!(open(&with_header("{}", b"")).2.unwrap().tensors().is_empty());
    let (_folder, _, file) = open(&with_header(r#"{"s":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}"#, &[1; 8]));
    assert!(file.unwrap().tensor("s").unwrap().0.shape.is_empty());
}

#[test]
fn refuses_a_bad_length() {
    for (bytes, reason) in [
        (&b""[..], "it has 0 bytes, fewer than the 8"),
        (b"1234567", "it has 7 bytes, fewer than the 8"),
        (b"\0\0\0\0\0\0\0\0", "does not start with '{'"),
        (b"\x03\0\0\0\0\0\0\0{}", "claims bytes 8..11, but the file ends at 10"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{}", "claim a header of 18446744073709551615 bytes"),
        (b"\x01\0\0\x01\0\0\0\0{}", "claim a header of 16777217 bytes"),
        (b"PK\x03\x04\0\0\0\0{}", "is this a safetensors file?"),
        (b"<!DOCTYPE html><html>", "is this a safetensors file?"),
    ] {
        let (_folder, path, opened) = open(bytes);
        let message = opened.unwrap_err().to_string();
        assert!(message.starts_with(&path.display().to_string()) && message.contains(reason), "{message}");
    }
}

#[test]
fn refuses_a_bad_header() {
    let deep = format!("{{\"a\":{}", "[".repeat(1 << 20));
    let long = format!("{{\"{}\":0}}", "n".repeat(1 << 20));
    for (header, reason) in [
        (" {}", "does not start with '{'"),
        ("[]", "does not start with '{'"),
        ("{", "invalid header: EOF"),
        ("{} x", "trailing characters"),
        ("{\"\u{1}\":0}", "control character"),
        (r#"{"a":{"dtype":"Q4","shape":[],"data_offsets":[0,0]}}"#, "tensor `a`: unknown variant `Q4`"),
        (r#"{"a":{"dtype":"F32","data_offsets":[0,0]}}"#, "tensor `a`: missing field `shape`"),
        (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}"#, "tensor `a`: invalid value"),
        (r#"{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}"#, "tensor `a`: invalid type"),
        (r#"{"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,0]}}"#, "tensor `a`: invalid"),
        (r#"{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}"#, "duplicate field `dtype`"),
        (r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4],"order":"F"}}"#, "tensor `a`: unknown field `order`"),
        (r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4,8]}}"#, "tensor `a`: "),
        (r#"{"__metadata__":{},"__metadata__":{}}"#, "duplicate key `__metadata__`"),
        (r#"{"__metadata__":{"a":1}}"#, "invalid header: invalid type"),
        (&deep, "tensor `a`: "),
        (&long, "tensor `nnn"),
    ] {
        let message = refusal(header, b"");
        assert!(message.contains(reason), "{message}");
        assert!(message.len() < 1000, "{} bytes of message", message.len());
    }
    let not_utf8 = [&5u64.to_le_bytes()[..], b"{\"\xff\":", b""].concat();
    assert!(open(&not_utf8).2.unwrap_err().to_string().contains("invalid header"));
}

#[test]
fn refuses_names_that_are_there_twice() {
    let entry = r#""x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let other = r#""x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#;
    assert!(refusal(&format!("{{{entry},{other}}}"), &[0; 8]).contains("duplicate tensor `x` in the header"));
    assert!(refusal(&format!("{{{entry},{entry}}}"), &[0; 4]).contains("duplicate tensor `x` in the header"));
}

#[test]
fn refuses_offsets_that_do_not_cover_the_data() {
    let two = |a: [u64; 2], b: [u64; 2]| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{a:?}}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{b:?}}}}}"#
        )
    };
    assert!(open(&with_header(&two([8, 16], [0, 8]), &[0; 16])).2.is_ok());
    for (a, b, bytes, reason) in [
        ([0, 8], [4, 12], 12, "tensor `b` at data offsets 4..12 overlaps the tensor before it, which ends at 8"),
        ([0, 8], [0, 8], 8, "tensor `b` at data offsets 0..8 overlaps"),
        ([0, 8], [12, 20], 20, "tensor `b` at data offsets 12..20 leaves a hole before it, which ends at 8"),
        ([4, 12], [12, 20], 20, "tensor `a` at data offsets 4..12 leaves a hole before it, which ends at 0"),
        ([0, 8], [8, 16], 15, "tensor `b` at data offsets 8..16: the file has 15 bytes of data"),
        ([0, 8], [8, 16], 17, "17 bytes of data, but the tensors cover only the first 16"),
        ([0, 8], [16, 8], 16, "tensor `b` at data offsets 16..8"),
        ([0, 8], [8, u64::MAX], 16, "8..18446744073709551615: the file has 16 bytes"),
        ([0, 8], [8, 12], 12, "tensor `b` at data offsets 8..12 has 4 bytes, but F32 [2] takes 8 bytes"),
    ] {
        let message = refusal(&two(a, b), &vec![0; bytes]);
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn refuses_shapes_that_overflow() {
    let max = u64::MAX;
    let tall = format!("[{}2]", "2,".repeat(70));
    for shape in [format!("[{max},{max}]"), format!("[{max}]"), format!("[{}]", 1u64 << 62), tall] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}"#);
        assert!(refusal(&header, &[0; 4]).contains("takes more than any file holds"), "{shape}");
    }
    // A product that wraps to the right size.
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{},{}],"data_offsets":[0,0]}}}}"#, 1u64 << 32, 1u64 << 32);
    assert!(refusal(&header, b"").contains("takes more than any file holds"));
    let header = r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#;
    assert!(refusal(header, &[0]).contains("F4 [3] takes more than any file holds"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// A damaged file is an error that names it, or is still a file that the reference reader reads the same way.
    #[test]
    fn survives_damage(changes in prop::collection::vec((0usize..400, any::<u8>()), 1..6), keep in 0usize..400) {
        let mut bytes = with_header(GOOD, &[7; 20]);
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        bytes.truncate(keep.max(bytes.len() / 2));
        let parsed = parse(&bytes);
        let reference = SafeTensors::read_metadata(&bytes);
        match parsed {
            Ok((tensors, _)) => {
                let (length, reference) = reference.expect("accepted here");
                for tensor in tensors {
                    let info = reference.info(&tensor.name).expect("named here");
                    let (start, end) = info.data_offsets;
                    prop_assert_eq!(tensor.bytes, length + 8 + start..length + 8 + end);
                    prop_assert_eq!(&tensor.shape, &info.shape);
                }
            }
            Err(reason) => prop_assert!(!reason.is_empty()),
        }
    }
}
