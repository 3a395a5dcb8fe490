//! Unpacks a `.nemo` that is compressed with gzip to a temporary file, since weights need random access.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use crate::checkpoint::OpenOptions;
use crate::error::{Error, Result};
use crate::mmap::{MappedFile, open_regular};

/// Size of the read and write buffers.
const PIECE_BYTES: usize = 1 << 20;
/// Interval, in decompressed bytes, of the checks for free disk space.
const CHECK_BYTES: u64 = 64 << 20;
/// Disk space to leave free.
const RESERVE_BYTES: u64 = 256 << 20;
/// Maximum compression ratio after the first 64 MiB. Weights never compress this well; what does is meant to fill a
/// disk.
const MAX_RATIO: u64 = 100;
/// Size of a tar header.
const TAR_BLOCK_BYTES: usize = 512;

/// Returns true if the file starts with a gzip header.
pub(super) fn is_gzip(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x1f\x8b")
}

/// Unpacks `path` to an unlinked file in the scratch folder, which the system frees when it is closed.
///
/// # Errors
/// [`Error::Io`] if the disk is full or cannot be written; [`Error::Format`] if the content is damaged, not a tar
/// archive, or a decompression bomb; [`Error::Cancelled`].
pub(super) fn unpack(path: &Path, options: &OpenOptions<'_>) -> Result<MappedFile> {
    let source = open_regular(path)?;
    let packed_bytes = source.metadata().map_err(Error::io("read the size of", path))?.len();
    let folder = &options.scratch;
    let in_folder = |action: &'static str| Error::io(action, folder.join("(unpacked archive)"));
    let mut target = tempfile::tempfile_in(folder).map_err(Error::io("create a temporary file in", folder))?;
    let counted = Counted { inner: source, read: 0 };
    let mut decoder = MultiGzDecoder::new(BufReader::with_capacity(PIECE_BYTES, counted));
    let mut piece = vec![0; PIECE_BYTES];
    let (mut unpacked, mut next_check, mut reported) = (0u64, 0u64, 0u64);
    loop {
        let filled = fill(&mut decoder, &mut piece)
            .map_err(|error| Error::format(path, format!("gzip: after {unpacked} decompressed bytes: {error}")))?;
        if unpacked == 0 && !starts_as_tar(&piece[..filled]) {
            return Err(Error::format(
                path,
                "not a .nemo: it is compressed with gzip, but does not contain a tar archive",
            ));
        }
        if filled == 0 {
            break;
        }
        if unpacked >= next_check {
            check_space(path, folder, &target, unpacked, packed_bytes)?;
            next_check = unpacked + CHECK_BYTES;
        }
        unpacked += filled as u64;
        let read = decoder.get_ref().get_ref().read;
        if unpacked > CHECK_BYTES && unpacked / MAX_RATIO > read {
            let detail = format!(
                "decompression bomb: {read} bytes decompress to {unpacked}, more than {MAX_RATIO} times as many"
            );
            return Err(Error::format(path, detail));
        }
        target.write_all(&piece[..filled]).map_err(in_folder("write"))?;
        if (options.unpacking)(read - reported, packed_bytes) == ControlFlow::Break(()) {
            return Err(Error::Cancelled);
        }
        reported = read;
    }
    // SAFETY: the file is unlinked, so only this process has it, and nothing writes to it from here on.
    #[allow(unsafe_code)]
    unsafe {
        MappedFile::of_file(path, &target)
    }
}

/// Reads until `piece` is full or the stream ends.
fn fill(source: &mut impl Read, piece: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match source.read(&mut piece[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// Returns true if the first block is a ustar, PAX or older tar header, judging by its checksum.
fn starts_as_tar(bytes: &[u8]) -> bool {
    let Some(header) = bytes.first_chunk::<TAR_BLOCK_BYTES>() else { return false };
    let field = &header[148..156];
    field.iter().all(|byte| matches!(byte, b'0'..=b'7' | b' ' | 0)) && field.iter().any(|byte| byte.is_ascii_digit())
}

/// Fails if the disk has less space than the minimum that is still needed.
fn check_space(path: &Path, folder: &Path, target: &File, unpacked: u64, packed_bytes: u64) -> Result<()> {
    let Ok(disk) = rustix::fs::fstatvfs(target) else { return Ok(()) };
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let needed = packed_bytes.saturating_sub(unpacked).saturating_add(RESERVE_BYTES);
    if free >= needed {
        return Ok(());
    }
    let detail = format!(
        "it is compressed, and unpacking it to {} needs at least {needed} more bytes, but only {free} are free; free \
                      some space, set TMPDIR to a folder on a larger disk, or decompress it with gunzip",
        folder.display()
    );
    Err(Error::format(path, detail))
}

/// Counts the bytes read.
struct Counted<R> {
    inner: R,
    read: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.read += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn unpacked(bytes: &[u8]) -> Result<Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.nemo");
        std::fs::write(&path, bytes).unwrap();
        assert!(is_gzip(bytes));
        let options = OpenOptions { scratch: folder.path().to_owned(), ..OpenOptions::default() };
        let result = unpack(&path, &options).map(|file| file.bytes().to_vec());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "something is left");
        result
    }

    /// A header of one file whose checksum is digits, and content.
    fn tar(content: usize) -> Vec<u8> {
        let mut bytes = vec![0; TAR_BLOCK_BYTES + content];
        bytes[148..154].copy_from_slice(b"012345");
        bytes
    }

    #[test]
    fn unpacks_one_stream_or_several() {
        let content: Vec<u8> = tar(3 << 20).iter().enumerate().map(|(i, byte)| byte ^ (i >> 10) as u8).collect();
        let content = [&tar(0)[..], &content[TAR_BLOCK_BYTES..]].concat();
        assert_eq!(unpacked(&packed(&content)).unwrap(), content);
        let (one, other) = content.split_at(1 << 20);
        assert_eq!(unpacked(&[packed(one), packed(other)].concat()).unwrap(), content);
    }

    #[test]
    fn refuses_what_is_damaged_or_a_bomb() {
        let reason = |bytes: &[u8]| unpacked(bytes).unwrap_err().to_string();
        let good = packed(&tar(1 << 20));
        assert!(reason(&good[..good.len() - 9]).contains("gzip: after"), "{}", reason(&good[..good.len() - 9]));
        let mut damaged = good.clone();
        let last = damaged.len() - 6;
        damaged[last] ^= 1;
        assert!(reason(&damaged).contains("gzip: after"), "{}", reason(&damaged));
        assert!(reason(&packed(b"no archive")).contains("does not contain a tar archive"));
        assert!(reason(&packed(b"")).contains("does not contain a tar archive"));
        let bomb = reason(&packed(&tar(200 << 20)));
        assert!(bomb.contains("decompression bomb"), "{bomb}");
    }

    #[test]
    fn says_where_there_is_no_room() {
        let file = tempfile::tempfile().unwrap();
        let error = check_space(Path::new("x.nemo"), Path::new("scratch"), &file, 0, u64::MAX / 2).unwrap_err();
        assert!(error.to_string().contains("TMPDIR"), "{error}");
    }

    #[test]
    fn ends_when_asked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.nemo");
        std::fs::write(&path, packed(&tar(4 << 20))).unwrap();
        let options = OpenOptions { scratch: folder.path().to_owned(), unpacking: &|_, _| ControlFlow::Break(()) };
        assert!(matches!(unpack(&path, &options), Err(Error::Cancelled)));
    }
}
