//! Archives made by GNU tar and Python's tarfile, where they are installed, and broken and hostile ones.

use std::fs;
use std::process::Command;

use proptest::prelude::*;

use super::*;

fn read(bytes: &[u8]) -> Result<Archive> {
    Archive::read(Path::new("model.nemo"), bytes)
}

/// The message of a refusal, which must name the file and `reason`.
#[track_caller]
fn refused(bytes: &[u8], reason: &str) -> String {
    let error = read(bytes).unwrap_err().to_string();
    assert!(error.starts_with("model.nemo: ") && error.contains(reason), "{error}\nexpected: {reason}");
    error
}

/// A header block; `edit` changes it before its checksum is made.
fn header_with(name: &str, kind: u8, size: u64, edit: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    edit(&mut block);
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn header(name: &str, kind: u8, size: u64) -> Vec<u8> {
    header_with(name, kind, size, |_| {})
}

/// A header with its data, filled up to whole blocks.
fn member(name: &str, kind: u8, data: &[u8]) -> Vec<u8> {
    padded(header(name, kind, data.len() as u64), data)
}

fn padded(mut header: Vec<u8>, data: &[u8]) -> Vec<u8> {
    header.extend(data);
    header.resize(header.len().next_multiple_of(BLOCK_BYTES), 0);
    header
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let record = |(key, value): &(&str, &str)| {
        let rest = format!(" {key}={value}\n");
        let mut length = rest.len() + 1;
        while length.to_string().len() + rest.len() != length {
            length += 1;
        }
        format!("{length}{rest}")
    };
    records.iter().map(record).collect::<String>().into_bytes()
}

fn archive(members: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = members.concat();
    bytes.resize(bytes.len() + 2 * BLOCK_BYTES, 0);
    bytes
}

#[test]
fn reads_names_and_sizes_wherever_they_are() {
    let long = format!("mp_rank_00/{}/model_weights.ckpt", "x".repeat(120));
    let bytes = archive(&[
        member("./", b'5', b""),
        member("./model_config.yaml", b'0', b"mcore_gpt: true"),
        member("folder//./old", 0, b"old"),
        member("folder", b'5', b""),
        member("./folder/", b'5', b""),
        member("old-folder/", 0, b""),
        padded(header_with("file", b'0', 5, |block| block[345..348].copy_from_slice(b"a/b")), b"ustar"),
        // In GNU's format something else is where POSIX has the front of the name.
        padded(header_with("gnu", b'0', 3, |b| b[257..360].fill(b'1')), b"gnu"),
        member("././@LongLink", b'L', format!("{long}\0").as_bytes()),
        member("mp_rank_00/xxx", b'0', b"long"),
        member("pax", b'x', &pax(&[("path", "./größe"), ("size", "7"), ("mtime", "1.5")])),
        padded(header("short", b'0', 0), b"seven b"),
        member("pax", b'g', &pax(&[("comment", "for all")])),
        padded(
            header_with("base256", b'0', 0, |b| b[124..136].copy_from_slice(b"\x80\0\0\0\0\0\0\0\0\0\0\x03")),
            b"256",
        ),
        member("last", b'7', &[7; 1024]),
    ]);
    let archive = read(&bytes).unwrap();
    let found: Vec<(&str, &[u8])> =
        archive.members().iter().map(|member| (member.name.as_str(), &bytes[member.bytes.clone()])).collect();
    let expected: Vec<(&str, &[u8])> = vec![
        ("model_config.yaml", b"mcore_gpt: true"),
        ("folder/old", b"old"),
        ("folder", b""),
        ("old-folder", b""),
        ("a/b/file", b"ustar"),
        ("gnu", b"gnu"),
        (&long, b"long"),
        ("größe", b"seven b"),
        ("base256", b"256"),
        ("last", &[7; 1024]),
    ];
    assert_eq!(found, expected);
    assert_eq!(&bytes[archive.file("größe").unwrap()], b"seven b");
    assert_eq!(archive.member("folder").unwrap().kind, MemberKind::Folder);
    let error = archive.file("folder").unwrap_err().to_string();
    assert_eq!(error, "model.nemo: tar: member `folder` is a folder, expected a file");
    let error = archive.file("absent").unwrap_err().to_string();
    assert_eq!(error, "model.nemo: tar: no member `absent`");
}

#[test]
fn refuses_links_only_where_a_file_is_needed() {
    let kinds = [
        ("hard", b'1', "a hard link"),
        ("symbolic", b'2', "a symbolic link"),
        ("characters", b'3', "a device"),
        ("blocks", b'4', "a device"),
        ("pipe", b'6', "a pipe"),
    ];
    let mut members: Vec<Vec<u8>> = kinds.iter().map(|(name, kind, _)| member(name, *kind, b"")).collect();
    members.push(member("././@LongLink", b'K', b"/etc/passwd\0"));
    members.push(member("linked", b'2', b""));
    members.push(member("file", b'0', b"data"));
    let bytes = archive(&members);
    let archive = read(&bytes).unwrap();
    assert_eq!(&bytes[archive.file("file").unwrap()], b"data");
    for (name, _, kind) in kinds {
        let error = archive.file(name).unwrap_err().to_string();
        assert_eq!(error, format!("model.nemo: tar: member `{name}` is {kind}, expected a file"));
    }
}

#[test]
fn refuses_what_is_ambiguous_or_leads_out() {
    let cases: &[(Vec<Vec<u8>>, &str)] = &[
        (vec![member("/etc/passwd", b'0', b"")], "member `/etc/passwd` at 0: its name is an absolute path"),
        (vec![member("a/../../b", b'0', b"")], "member `a/../../b` at 0: its name escapes the archive through `..`"),
        (vec![member("..", b'2', b"")], "escapes the archive"),
        (vec![member("x", b'x', &pax(&[("path", "/x")])), member("x", b'0', b"")], "is an absolute path"),
        (vec![member("x", b'x', &pax(&[("path", "a\0b")])), member("x", b'0', b"")], "contains a NUL byte"),
        (vec![member("x", b'x', &pax(&[("path", &"n".repeat(5000))])), member("x", b'0', b"")], "name has 5000 bytes"),
        (vec![member("x", b'L', b"../x\0"), member("x", b'0', b"")], "escapes the archive"),
        (vec![member("a", b'0', b"1"), member("./a", b'0', b"2")], "duplicate member `a`"),
        (vec![member("a", b'5', b""), member("a", b'0', b"2")], "duplicate member `a`"),
        (vec![member("a", b'2', b""), member("a", b'5', b"")], "duplicate member `a`"),
        (vec![member("", b'0', b"")], "the member before 512 has no name"),
        (vec![member("a", b'S', b"")], "member `a` at 0: it is sparse"),
        (vec![member("x", b'x', &pax(&[("GNU.sparse.major", "1")]))], "extended header at 0: it describes a sparse"),
        (vec![member("a", b'M', b"")], "continues from another volume"),
        (vec![member("a", b'Z', b"")], "unknown type `Z`"),
        (vec![member("a", b'\n', b"")], "unknown type `\\n`"),
        (vec![member("a", b'1', b"data")], "a member of type `1` has 4 bytes of data"),
        (vec![member("a", b'5', b"data")], "a member of type `5` has 4 bytes of data"),
        (vec![member("a/", b'0', b"data")], "a folder has 4 bytes of data"),
        (vec![member("x", b'g', &pax(&[("size", "5")]))], "a global header sets one size for all members"),
        (vec![member("x", b'g', &pax(&[("path", "5")]))], "a global header sets one path for all members"),
        (vec![member("x", b'x', &pax(&[("size", "-5")]))], "size `-5`, expected decimal digits"),
        (vec![member("x", b'x', &pax(&[("size", "+5")]))], "size `+5`, expected decimal digits"),
        (vec![member("x", b'x', &pax(&[("size", "99999999999999999999")]))], "expected decimal digits"),
        (vec![member("x", b'x', b"99 path=a\n")], "a record is not `length key=value`"),
        (vec![member("x", b'x', b"9 path=ab")], "a record is not `length key=value`"),
        (vec![member("x", b'x', b"0 path=a\n")], "a record is not `length key=value`"),
        (vec![member("x", b'x', b"7 path\n")], "a record is not `length key=value`"),
        (vec![member("x", b'x', b"11 path=\xff\xff\n")], "is not UTF-8"),
        (vec![member("x", b'x', &pax(&[("path", "a")]))], "the extended header at 0 is not followed by a member"),
        (vec![header_with("a", b'0', 0, |b| b[0] = 0xff)], "its name is not UTF-8"),
        (vec![header_with("a", b'0', 0, |b| b[124..128].copy_from_slice(b"09zz"))], "its size is `09zz"),
        (vec![header_with("a", b'0', 0, |b| b[124] = 0xff)], "its size is negative"),
        (vec![header_with("a", b'0', 0, |b| (b[124], b[126]) = (0x80, 1))], "exceeds 64 bits"),
        (vec![header("a", b'0', 8_000_000_000)], "member `a` at 0: it has 8000000000 bytes, but only 1024 remain"),
        (vec![member("x", b'x', &pax(&[("size", "18446744073709551615")])), header("a", b'0', 0)], "bytes, but only"),
        (vec![header("x", b'x', 2 << 20), vec![b'x'; 2 << 20]], "2097152 bytes, more than the limit of 1048576"),
    ];
    for (members, reason) in cases {
        refused(&archive(members), reason);
    }
}

#[test]
fn refuses_other_files_and_damaged_headers() {
    let gzip = read(b"\x1f\x8b\x08 rest").unwrap_err().to_string();
    assert!(
        gzip.starts_with("model.nemo: unsupported: it is compressed with gzip; decompress it first: gunzip"),
        "{gzip}"
    );
    refused(b"", "truncated: 0 bytes, without the two empty blocks");
    refused(b"PK\x03\x04", "truncated: 4 bytes");
    refused(&[b'x'; 1024], "header at 0: its checksum is `xxxxxxxx`, expected octal digits; is this a tar archive?");
    let good = archive(&[member("a", b'0', b"data"), member("b", b'0', &[1; 600])]);
    assert!(read(&good).is_ok());
    let mut bytes = good.clone();
    bytes[0] = b'b';
    refused(&bytes, "header at 0: its checksum is");
    for end in (0..good.len() - 2 * BLOCK_BYTES).step_by(37) {
        refused(&good[..end], "");
    }
    // One empty block tells the end too, as tar programs have it.
    assert!(read(&good[..good.len() - BLOCK_BYTES]).is_ok());
}

proptest! {
    /// A damaged archive is read or refused, never more, and members lie in it.
    #[test]
    fn survives_damage(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
    ) {
        let mut bytes = archive(&[
            member("x", b'x', &pax(&[("path", "model_weights.ckpt"), ("size", "700")])),
            padded(header("short", b'0', 0), &[7; 700]),
            member("././@LongLink", b'L', b"folder/name\0"),
            member("name", b'0', b"data"),
        ]);
        let blocks = bytes.len() / BLOCK_BYTES;
        for (at, value, mend) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
            if mend {
                // With a checksum that fits, the change gets further.
                let start = (at / BLOCK_BYTES).min(blocks - 1) * BLOCK_BYTES;
                let block = header_with("", 0, 0, |block| block.copy_from_slice(&bytes[start..start + BLOCK_BYTES]));
                bytes[start..start + BLOCK_BYTES].copy_from_slice(&block);
            }
        }
        match read(&bytes) {
            Ok(archive) => {
                for member in archive.members() {
                    prop_assert!(bytes.get(member.bytes.clone()).is_some());
                }
            }
            Err(error) => prop_assert!(error.to_string().starts_with("model.nemo: "), "{}", error),
        }
    }
}

/// A folder as a `.nemo` is packed from, with a name too long for a header.
fn folder_to_pack() -> (tempfile::TempDir, Vec<(String, Vec<u8>)>) {
    let folder = tempfile::tempdir().unwrap();
    let long = format!("0123456789abcdef0123456789abcdef_{}.model", "tokenizer".repeat(15));
    let files = vec![
        ("model_config.yaml".to_owned(), b"num_layers: 32\n".to_vec()),
        ("mp_rank_00/model_weights.ckpt".to_owned(), vec![42; 100_000]),
        (long, b"model".to_vec()),
        ("empty".to_owned(), Vec::new()),
    ];
    for (name, data) in &files {
        let path = folder.path().join("content").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }
    (folder, files)
}

fn check_packed(path: &Path, files: &[(String, Vec<u8>)]) {
    let bytes = fs::read(path).unwrap();
    let archive = Archive::read(path, &bytes).unwrap();
    for (name, data) in files {
        assert_eq!(&bytes[archive.file(name).unwrap()], data, "{}: {name}", path.display());
    }
    assert_eq!(archive.members().iter().filter(|member| member.kind == MemberKind::File).count(), files.len());
}

#[test]
fn reads_what_gnu_tar_writes() {
    let (folder, files) = folder_to_pack();
    for format in ["gnu", "pax", "ustar", "oldgnu"] {
        let path = folder.path().join(format!("{format}.tar"));
        let packed = Command::new("tar")
            .arg(format!("--format={format}"))
            .args(["--exclude=*tokenizer*".to_owned()].iter().filter(|_| format == "ustar"))
            .arg("-cf")
            .arg(&path)
            .arg("-C")
            .arg(folder.path().join("content"))
            .arg(".")
            .status();
        let Ok(status) = packed else {
            crate::skips::skip("tar", "reads_what_gnu_tar_writes", "there is no tar");
            return;
        };
        if !status.success() {
            let reason = format!("this tar does not write the format {format}");
            crate::skips::skip("tar", "reads_what_gnu_tar_writes", reason);
            continue;
        }
        let long_names = format != "ustar";
        let files: Vec<_> =
            files.iter().filter(|(name, _)| long_names || !name.contains("tokenizer")).cloned().collect();
        check_packed(&path, &files);
    }
    // What `tar --sparse` makes of a file with a hole.
    let hole = fs::File::create(folder.path().join("hole")).unwrap();
    hole.set_len(10 << 20).unwrap();
    for format in ["gnu", "pax"] {
        let path = folder.path().join("sparse.tar");
        let status = Command::new("tar")
            .args([&format!("--format={format}"), "--sparse", "-cf"])
            .arg(&path)
            .arg("-C")
            .arg(folder.path())
            .arg("hole")
            .status();
        if status.is_ok_and(|status| status.success()) && fs::metadata(&path).unwrap().len() < 10 << 20 {
            refused_at(&path, "sparse");
        }
    }
}

fn refused_at(path: &Path, reason: &str) {
    let error = Archive::read(path, &fs::read(path).unwrap()).unwrap_err().to_string();
    assert!(error.contains(reason) && error.contains(&path.display().to_string()), "{error}");
}

#[test]
fn reads_what_python_writes() {
    let (folder, files) = folder_to_pack();
    for format in ["PAX_FORMAT", "GNU_FORMAT"] {
        // As NeMo does: the folder under the name `.`.
        let path = folder.path().join(format!("{format}.nemo"));
        let script = format!(
            "import sys, tarfile\n\
             with tarfile.open(sys.argv[1], 'w:', format=tarfile.{format}) as tar: tar.add(sys.argv[2], arcname='.')"
        );
        let status =
            Command::new("python3").args(["-c", &script]).arg(&path).arg(folder.path().join("content")).status();
        match status {
            Ok(status) => assert!(status.success()),
            Err(_) => {
                crate::skips::skip("python3", "reads_what_python_writes", "there is no python3");
                return;
            }
        }
        check_packed(&path, &files);
    }
}
