//! Locates the members of an uncompressed tar archive, the container of a `.nemo`, so that they can be used in place.
//!
//! Reads POSIX ustar, PAX extended headers (`path` and `size`; a member over 8 GiB has its true size only there), GNU
//! long names and base-256 numbers, and the format before ustar. [`Archive::read`] works on a byte slice, such as a
//! mapped file.
//!
//! Two readers must never see different archives in one file, so everything on which tar programs disagree is an error:
//! duplicate names (unpacking keeps the last, other readers find the first), links with data, sparse members,
//! multi-volume archives, names that escape the folder, a missing end marker.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, clip};

const BLOCK_BYTES: usize = 512;
/// Maximum number of members; a distributed checkpoint has thousands.
const MAX_MEMBERS: usize = 1 << 20;
/// Maximum size of an extended header, and of a name.
const MAX_EXTENDED_BYTES: usize = 1 << 20;
const MAX_NAME_BYTES: usize = 4096;

/// Kind of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberKind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// Anything else, named with its article: "a symbolic link".
    Other(&'static str),
}

/// One member of an [`Archive`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its path without a leading `./` or a trailing `/`; relative, and without `..`.
    pub name: String,
    /// Its kind.
    pub kind: MemberKind,
    /// Byte range of its data in the archive; empty unless it is a file.
    pub bytes: Range<usize>,
}

/// The members of a tar archive.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    members: Vec<Member>,
    by_name: HashMap<String, usize>,
}

impl Archive {
    /// Lists the members of the archive in `bytes`, the contents of `path`. Their data is not read.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a compressed archive; [`Error::Format`] for one that is damaged or ambiguous.
    pub fn read(path: &Path, bytes: &[u8]) -> Result<Archive> {
        if bytes.starts_with(b"\x1f\x8b") {
            let shown = path.display();
            let detail = format!("it is compressed with gzip; decompress it first: gunzip < {shown} > unpacked.nemo");
            return Err(Error::unsupported(path, detail));
        }
        let (members, by_name) = list(bytes).map_err(|detail| Error::format(path, format!("tar: {detail}")))?;
        Ok(Archive { path: path.to_path_buf(), members, by_name })
    }

    /// All members, in archive order.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The member called `name`.
    pub fn member(&self, name: &str) -> Option<&Member> {
        self.by_name.get(name).map(|index| &self.members[*index])
    }

    /// Byte range of the data of the file called `name` in the archive.
    ///
    /// # Errors
    /// [`Error::Format`] if there is no such member, or it is not a regular file.
    pub fn file(&self, name: &str) -> Result<Range<usize>> {
        match self.member(name) {
            Some(Member { kind: MemberKind::File, bytes, .. }) => Ok(bytes.clone()),
            Some(Member { kind, .. }) => {
                let kind = match kind {
                    MemberKind::Folder => "a folder",
                    MemberKind::Other(kind) => kind,
                    MemberKind::File => "a file",
                };
                Err(Error::format(&self.path, format!("tar: member `{}` is {kind}, expected a file", clip(name))))
            }
            None => Err(Error::format(&self.path, format!("tar: no member `{}`", clip(name)))),
        }
    }
}

/// Extended header records that apply to the next member.
#[derive(Default)]
struct Extended {
    /// PAX's `path`, which wins over GNU's long name.
    path: Option<String>,
    long_name: Option<String>,
    size: Option<u64>,
    /// Offset of the first of these headers.
    at: Option<usize>,
}

fn list(bytes: &[u8]) -> Result<(Vec<Member>, HashMap<String, usize>), String> {
    let mut members = Vec::new();
    let mut by_name = HashMap::new();
    let mut extended = Extended::default();
    let mut at = 0;
    loop {
        let Some(header) = bytes.get(at..).and_then(|rest| rest.first_chunk::<BLOCK_BYTES>()) else {
            return Err(format!(
                "truncated: {} bytes, without the two empty blocks that end an archive at {at}",
                bytes.len()
            ));
        };
        if header.iter().all(|byte| *byte == 0) {
            return match extended.at {
                None => Ok((members, by_name)),
                Some(at) => Err(format!("the extended header at {at} is not followed by a member")),
            };
        }
        let header = TarHeader { bytes: header };
        header.check().map_err(|detail| format!("header at {at}: {detail}"))?;
        let kind = header.kind();
        let belongs_to_next = matches!(kind, b'x' | b'L' | b'K');

        // A PAX `size` does not apply to extended headers themselves.
        let size = match (extended.size, belongs_to_next || kind == b'g') {
            (Some(size), false) => size,
            _ => header.number(124..136).map_err(|detail| format!("header at {at}: its size {detail}"))?,
        };
        let start = at + BLOCK_BYTES;
        let has_data = !matches!(kind, b'1'..=b'6');
        if !has_data && size != 0 {
            return Err(format!(
                "header at {at}: a member of type `{}` has {size} bytes of data, expected none",
                clip(char::from(kind))
            ));
        }
        let left = bytes.len() - start;
        let size = usize::try_from(size).ok().filter(|size| *size <= left).ok_or_else(|| {
            let name = clip(String::from_utf8_lossy(header.text(0..100)));
            format!("member `{name}` at {at}: it has {size} bytes, but only {left} remain in the file (truncated?)")
        })?;
        let data = start..start + size;
        let next = data.end.checked_next_multiple_of(BLOCK_BYTES).filter(|next| *next <= bytes.len());
        let next = next.ok_or_else(|| format!("truncated: the data of the member at {at} ends inside a block"))?;

        if belongs_to_next || kind == b'g' {
            if size > MAX_EXTENDED_BYTES {
                return Err(format!(
                    "extended header at {at}: {size} bytes, more than the limit of {MAX_EXTENDED_BYTES}"
                ));
            }
            let data = &bytes[data];
            extended.read(kind, data).map_err(|detail| format!("extended header at {at}: {detail}"))?;
            if belongs_to_next {
                extended.at.get_or_insert(at);
            }
            at = next;
            continue;
        }

        let found = std::mem::take(&mut extended);
        let name = found.path.or(found.long_name).map_or_else(|| header.name(), Ok);
        let name = name.map_err(|detail| format!("header at {at}: {detail}"))?;
        let folder = kind == b'5' || (matches!(kind, 0 | b'0') && name.ends_with('/'));
        let refused = |detail: &str| format!("member `{}` at {at}: {detail}", clip(&name));
        let kind = match kind {
            _ if folder => MemberKind::Folder,
            0 | b'0' | b'7' => MemberKind::File,
            b'1' => MemberKind::Other("a hard link"),
            b'2' => MemberKind::Other("a symbolic link"),
            b'3' | b'4' => MemberKind::Other("a device"),
            b'6' => MemberKind::Other("a pipe"),
            b'S' => return Err(refused("it is sparse, which is not supported; create the archive without --sparse")),
            b'M' => return Err(refused("it continues from another volume, which is not supported")),
            other => return Err(refused(&format!("unknown type `{}`", clip(char::from(other))))),
        };
        if folder && size != 0 {
            return Err(refused(&format!("a folder has {size} bytes of data, expected none")));
        }
        let name = normalized(&name).map_err(|detail| refused(&detail))?;
        at = next;
        if name.is_empty() && kind == MemberKind::Folder {
            continue;
        }
        if name.is_empty() {
            return Err(format!("the member before {next} has no name"));
        }
        if members.len() == MAX_MEMBERS {
            return Err(format!("more than {MAX_MEMBERS} members"));
        }
        let bytes = if kind == MemberKind::File { data } else { 0..0 };
        match by_name.insert(name.clone(), members.len()) {
            // A folder may be listed again, which is harmless.
            Some(earlier) if kind == MemberKind::Folder && is_folder(&members, earlier) => {
                by_name.insert(name, earlier);
            }
            Some(_) => return Err(format!("duplicate member `{}`; recreate the archive with only one", clip(name))),
            None => members.push(Member { name, kind, bytes }),
        }
    }
}

fn is_folder(members: &[Member], index: usize) -> bool {
    members.get(index).is_some_and(|member| member.kind == MemberKind::Folder)
}

/// `name` without empty and `.` components.
fn normalized(name: &str) -> Result<String, String> {
    if name.len() > MAX_NAME_BYTES {
        return Err(format!("its name has {} bytes, more than the limit of {MAX_NAME_BYTES}", name.len()));
    }
    if name.starts_with('/') {
        return Err("its name is an absolute path, expected a relative one".to_owned());
    }
    let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err("its name escapes the archive through `..`".to_owned());
    }
    if name.contains('\0') {
        return Err("its name contains a NUL byte".to_owned());
    }
    Ok(parts.join("/"))
}

/// One header block.
struct TarHeader<'a> {
    bytes: &'a [u8; BLOCK_BYTES],
}

impl TarHeader<'_> {
    fn kind(&self) -> u8 {
        self.bytes[156]
    }

    /// Compares the checksum: the sum of all bytes, its own field taken as spaces.
    fn check(&self) -> Result<(), String> {
        let stored =
            self.number(148..156).map_err(|detail| format!("its checksum {detail}; is this a tar archive?"))?;
        let rest = || self.bytes[..148].iter().chain(&self.bytes[156..]);
        let unsigned: u64 = rest().map(|byte| u64::from(*byte)).sum::<u64>() + 8 * 32;
        // Some old programs summed signed bytes.
        let signed: i64 = rest().map(|byte| i64::from(byte.cast_signed())).sum::<i64>() + 8 * 32;
        if stored == unsigned || i64::try_from(stored) == Ok(signed) {
            return Ok(());
        }
        Err(format!("its checksum is {stored}, expected {unsigned}; damaged, or not a tar archive"))
    }

    /// A field up to its first NUL.
    fn text(&self, field: Range<usize>) -> &[u8] {
        let field = &self.bytes[field];
        field.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// A number: octal digits, padded with spaces and ended by a NUL or a space, or base 256 after a first byte of
    /// 0x80.
    fn number(&self, field: Range<usize>) -> Result<u64, String> {
        if let [first, rest @ ..] = &self.bytes[field.clone()]
            && first & 0x80 != 0
        {
            // The second bit of a negative number is set.
            if *first != 0x80 {
                return Err("is negative or exceeds 64 bits".to_owned());
            }
            let shift = |value: u64, byte: &u8| value.checked_mul(256)?.checked_add((*byte).into());
            return rest.iter().try_fold(0, shift).ok_or_else(|| "is negative or exceeds 64 bits".to_owned());
        }
        let digits = self.text(field).trim_ascii();
        let octal = |value: u64, digit: &u8| {
            let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
            value.checked_mul(8)?.checked_add(digit.into())
        };
        digits
            .iter()
            .try_fold(0, octal)
            .ok_or_else(|| format!("is `{}`, expected octal digits", clip(String::from_utf8_lossy(digits))))
    }

    /// The name in the header, after ustar's prefix field.
    fn name(&self) -> Result<String, String> {
        let name = self.text(0..100);
        let prefix = if &self.bytes[257..263] == b"ustar\0" { self.text(345..500) } else { &[] };
        let whole = if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() };
        String::from_utf8(whole).map_err(|_| "its name is not UTF-8".to_owned())
    }
}

impl Extended {
    /// Reads the content of an extended header of this type.
    fn read(&mut self, kind: u8, data: &[u8]) -> Result<(), String> {
        match kind {
            b'L' => {
                let name = data.split(|byte| *byte == 0).next().unwrap_or_default();
                let name = std::str::from_utf8(name).map_err(|_| "its name is not UTF-8".to_owned())?;
                self.long_name = Some(name.to_owned());
                Ok(())
            }
            // The target of a link, which is not followed.
            b'K' => Ok(()),
            _ => self.read_pax(kind == b'g', data),
        }
    }

    /// Reads records of the form `length key=value\n`, the length counting itself.
    fn read_pax(&mut self, global: bool, mut data: &[u8]) -> Result<(), String> {
        while !data.is_empty() {
            let (record, rest) =
                split_record(data).ok_or("a record is not `length key=value` followed by a line feed")?;
            let (key, value) = record;
            data = rest;
            if key.starts_with(b"GNU.sparse.") || key == b"SCHILY.realsize" {
                return Err(
                    "it describes a sparse member, which is not supported; create the archive without --sparse"
                        .to_owned(),
                );
            }
            if global && (key == b"path" || key == b"size") {
                let key = String::from_utf8_lossy(key);
                return Err(format!("a global header sets one {key} for all members, which is not supported"));
            }
            let text = || std::str::from_utf8(value).map_err(|_| "its path or size is not UTF-8".to_owned());
            match key {
                // An empty value cancels that of an earlier header.
                b"path" => self.path = Some(text()?.to_owned()).filter(|path| !path.is_empty()),
                b"size" if value.is_empty() => self.size = None,
                b"size" => {
                    let text = text()?;
                    let size = text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
                    self.size = Some(size.ok_or_else(|| format!("size `{}`, expected decimal digits", clip(text)))?);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Key and value of a PAX record.
type Record<'d> = (&'d [u8], &'d [u8]);

/// The first record of `data`, and what follows it.
fn split_record(data: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let space = data.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&data[..space]).ok()?.parse().ok()?;
    let (record, rest) = data.split_at_checked(length)?;
    let content = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = content.iter().position(|byte| *byte == b'=')?;
    Some(((&content[..equals], &content[equals + 1..]), rest))
}

#[cfg(test)]
mod tests;
