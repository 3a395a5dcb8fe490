//! Locates the members of an uncompressed zip archive, so that they can be used in place.
//!
//! Names, sizes and offsets come from the central directory at the archive's end. Of a member's local header only the
//! length is used, since its data follows (streaming writers leave the sizes there zero and write them after the data).
//! Data before or after the archive, members outside it or overlapping, and duplicate names are errors. Checksums are
//! not verified: that would read all of the data, and torch can be told not to write them.

use std::collections::HashMap;
use std::ops::Range;

use crate::error::clip;

/// Maximum number of members. A checkpoint has one per tensor and a few more.
const MAX_MEMBERS: u64 = 100_000;
/// Maximum length of a member's name.
const MAX_NAME_BYTES: usize = 1024;

const LOCAL: &[u8; 4] = b"PK\x03\x04";
const CENTRAL: &[u8; 4] = b"PK\x01\x02";
const END: &[u8; 4] = b"PK\x05\x06";
const END64: &[u8; 4] = b"PK\x06\x06";
const LOCATOR64: &[u8; 4] = b"PK\x06\x07";

/// Bytes of the fixed part of each record, before names and other fields of variable length.
const LOCAL_BYTES: usize = 30;
const CENTRAL_BYTES: usize = 46;
const END_BYTES: usize = 22;
const END64_BYTES: usize = 56;
const LOCATOR64_BYTES: usize = 20;

/// In a 16- or 32-bit field: the value is in the ZIP64 record.
const IN_ZIP64_16: u16 = u16::MAX;
const IN_ZIP64_32: u32 = u32::MAX;
/// The extra field that holds a member's ZIP64 values.
const ZIP64_EXTRA: u16 = 1;

/// The members of an archive by name.
#[derive(Debug)]
pub(super) struct Members<'a> {
    by_name: HashMap<&'a str, Range<usize>>,
}

impl<'a> Members<'a> {
    /// Byte range of the data of the member called `name` in the archive.
    pub fn get(&self, name: &str) -> Option<Range<usize>> {
        self.by_name.get(name).cloned()
    }

    /// Every member's name, in no order.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        self.by_name.keys().copied()
    }
}

/// Returns true if `bytes` start like a zip archive with a member.
pub(super) fn looks_like_one(bytes: &[u8]) -> bool {
    bytes.starts_with(LOCAL)
}

/// Lists the members of the archive `bytes`.
///
/// # Errors
/// The problem (damaged or unsupported), with the member's name and the offset; the caller prefixes the file's name.
pub(super) fn members(bytes: &[u8]) -> Result<Members<'_>, String> {
    let directory = find_directory(bytes)?;
    let mut entries = ZipFields { bytes: &bytes[..directory.range.end], at: directory.range.start };
    // The count is only a claim until that many entries have been read.
    let mut by_name = HashMap::new();
    let mut spans: Vec<(Range<usize>, &str)> = Vec::new();
    for _ in 0..directory.members {
        let entry = central_entry(&mut entries)?;
        let (span, data) = place(bytes, &entry, directory.range.start)?;
        if by_name.insert(entry.name, data).is_some() {
            return Err(format!("zip: duplicate member `{}`", clip(entry.name)));
        }
        spans.push((span, entry.name));
    }
    if entries.at != directory.range.end {
        return Err(format!(
            "zip: the central directory claims {} members and ends at {}, but its entries end at {}",
            directory.members, directory.range.end, entries.at
        ));
    }
    spans.sort_by_key(|(span, _)| (span.start, span.end));
    for ((before, first), (after, second)) in spans.iter().zip(spans.iter().skip(1)) {
        if before.end > after.start {
            return Err(format!(
                "zip: member `{}` at {} overlaps member `{}`, which ends at {}",
                clip(second),
                after.start,
                clip(first),
                before.end
            ));
        }
    }
    Ok(Members { by_name })
}

/// Reads consecutive little-endian fields.
struct ZipFields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> ZipFields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..)?.get(..count)?;
        self.at += count;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

/// The central directory: where it is, and how many members it claims to list.
struct Directory {
    range: Range<usize>,
    members: u64,
}

fn find_directory(bytes: &[u8]) -> Result<Directory, String> {
    // The end record is followed by a comment of at most 65535 bytes, whose length it ends with.
    let earliest = bytes.len().saturating_sub(END_BYTES + usize::from(u16::MAX));
    let end_at = (earliest..(bytes.len() + 1).saturating_sub(END_BYTES))
        .rev()
        .find(|at| bytes[*at..].starts_with(END) && comment_fits(bytes, *at))
        .ok_or("zip: no end record: the archive is truncated or followed by other data")?;
    let truncated = || format!("zip: the end record at {end_at} is truncated");
    let mut fields = ZipFields { bytes, at: end_at + END.len() };
    let mut end = || {
        let disks = [fields.u16()?, fields.u16()?];
        let members = [fields.u16()?, fields.u16()?];
        Some((disks, members, fields.u32()?, fields.u32()?))
    };
    let (disks, members, size, offset) = end().ok_or_else(truncated)?;

    // The end record's values; `None` if the value is in the ZIP64 end record.
    let disk = |number: u16| (number != IN_ZIP64_16).then_some(u64::from(number));
    let in_64 = |value: u32| (value != IN_ZIP64_32).then_some(u64::from(value));
    let short = [disk(disks[0]), disk(disks[1]), disk(members[0]), disk(members[1]), in_64(size), in_64(offset)];
    let long = end64(bytes, end_at)?;
    let directory_end = long.as_ref().map_or(end_at, |(at, _)| *at);
    let mut values = [0u64; 6];
    let names =
        ["disk", "disk of the directory", "members on this disk", "members", "directory size", "directory start"];
    for (index, value) in values.iter_mut().enumerate() {
        *value = match (short[index], long.as_ref().map(|(_, values)| values[index])) {
            (Some(short), Some(long)) if short != long => {
                let name = names[index];
                return Err(format!("zip: {name} is {short} in the end record, but {long} in the ZIP64 end record"));
            }
            (_, Some(long)) => long,
            (Some(short), None) => short,
            (None, None) => return Err(format!("zip: {} is in the ZIP64 end record, which is missing", names[index])),
        };
    }
    let [this_disk, directory_disk, members_here, members, size, offset] = values;
    if this_disk != 0 || directory_disk != 0 || members_here != members {
        return Err(format!("zip: archives split over several disks are not supported (this is disk {this_disk})"));
    }
    if members > MAX_MEMBERS {
        return Err(format!("zip: {members} members, more than the limit of {MAX_MEMBERS}"));
    }
    let start = usize::try_from(offset).ok();
    let end = start.and_then(|start| start.checked_add(usize::try_from(size).ok()?));
    match (start, end) {
        (Some(start), Some(end)) if end == directory_end => Ok(Directory { range: start..end, members }),
        _ => Err(format!(
            "zip: the central directory of {size} bytes at {offset} does not end at {directory_end}, where the end \
                      record starts (is there data before the archive?)"
        )),
    }
}

/// Returns true if the comment after the end record at `at` ends with `bytes`.
fn comment_fits(bytes: &[u8], at: usize) -> bool {
    let length = ZipFields { bytes, at: at + END_BYTES - 2 }.u16();
    length.is_some_and(|length| at + END_BYTES + usize::from(length) == bytes.len())
}

/// The ZIP64 end record that belongs to the end record at `end_at`, if there is one: its offset and the same six values.
fn end64(bytes: &[u8], end_at: usize) -> Result<Option<(usize, [u64; 6])>, String> {
    let Some(locator_at) = end_at.checked_sub(LOCATOR64_BYTES) else { return Ok(None) };
    if !bytes[locator_at..].starts_with(LOCATOR64) {
        return Ok(None);
    }
    let damaged = || format!("zip: the ZIP64 locator at {locator_at} does not point to a ZIP64 end record before it");
    let mut locator = ZipFields { bytes, at: locator_at + LOCATOR64.len() };
    let mut read = || Some((locator.u32()?, locator.u64()?, locator.u32()?));
    let (disk, offset, disks) = read().ok_or_else(damaged)?;
    if disk != 0 || disks > 1 {
        return Err(format!("zip: archives split over several disks are not supported (disk {disk} of {disks})"));
    }
    let at = usize::try_from(offset).ok().filter(|at| at.checked_add(END64_BYTES).is_some_and(|end| end <= locator_at));
    let at = at.ok_or_else(damaged)?;
    let mut fields = ZipFields { bytes, at };
    let mut read = || {
        let (signature, length) = (fields.array::<4>()?, fields.u64()?);
        let _versions = fields.u32()?;
        let disks = [u64::from(fields.u32()?), u64::from(fields.u32()?)];
        Some((signature, length, [disks[0], disks[1], fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?]))
    };
    let (signature, length, values) = read().ok_or_else(damaged)?;
    // The length leaves out the signature and itself.
    let ends_at_locator = length.checked_add(offset).and_then(|end| end.checked_add(12)) == Some(locator_at as u64);
    if &signature != END64 || !ends_at_locator {
        return Err(damaged());
    }
    Ok(Some((at, values)))
}

/// A member's entry in the central directory.
struct ZipEntry<'a> {
    name: &'a str,
    /// Size of the data, which is stored uncompressed.
    size: u64,
    local_header: u64,
}

fn central_entry<'a>(fields: &mut ZipFields<'a>) -> Result<ZipEntry<'a>, String> {
    let at = fields.at;
    let truncated = || format!("zip: the central directory is truncated in the entry at {at}");
    let mut fixed = ZipFields { bytes: fields.take(CENTRAL_BYTES).ok_or_else(truncated)?, at: 0 };
    let mut read = || {
        let signature = fixed.array::<4>()?;
        let _versions = fixed.u32()?;
        let (flags, method) = (fixed.u16()?, fixed.u16()?);
        let (_time, _checksum) = (fixed.u32()?, fixed.u32()?);
        let sizes = [fixed.u32()?, fixed.u32()?];
        let lengths = [fixed.u16()?, fixed.u16()?, fixed.u16()?].map(usize::from);
        let disk = fixed.u16()?;
        let _attributes = (fixed.u16()?, fixed.u32()?);
        Some((signature, flags, method, sizes, lengths, disk, fixed.u32()?))
    };
    let (signature, flags, method, [compressed, size], lengths, disk, local_header) = read().ok_or_else(truncated)?;
    if &signature != CENTRAL {
        return Err(format!("zip: expected an entry of the central directory at {at}"));
    }
    let [name_bytes, extra_bytes, comment_bytes] = lengths;
    if name_bytes > MAX_NAME_BYTES {
        return Err(format!("zip: the name in the entry at {at} has {name_bytes} bytes, more than {MAX_NAME_BYTES}"));
    }
    let name = fields.take(name_bytes).ok_or_else(truncated)?;
    let extra = fields.take(extra_bytes).ok_or_else(truncated)?;
    fields.take(comment_bytes).ok_or_else(truncated)?;
    let name = std::str::from_utf8(name).map_err(|_| format!("zip: the name in the entry at {at} is not UTF-8"))?;
    let refused = |detail: String| format!("zip: member `{}`: {detail}", clip(name));

    if flags & (1 | 1 << 6 | 1 << 13) != 0 {
        return Err(refused("it is encrypted".to_owned()));
    }
    if method != 0 {
        return Err(refused(format!("it is compressed (method {method}), expected stored, as torch.save writes it")));
    }
    let mut extra = zip64_extra(extra).map_err(&refused)?;
    let mut in_extra = |short: u32, what: &str| match short {
        IN_ZIP64_32 => {
            extra.u64().ok_or_else(|| refused(format!("its {what} is in the ZIP64 field, which is missing")))
        }
        short => Ok(u64::from(short)),
    };
    let size = in_extra(size, "size")?;
    let compressed = in_extra(compressed, "compressed size")?;
    let local_header = in_extra(local_header, "offset")?;
    let disk = if disk == IN_ZIP64_16 { extra.u32().unwrap_or(u32::MAX) } else { disk.into() };
    if disk != 0 {
        return Err(refused(format!("it is on disk {disk}; archives split over several disks are not supported")));
    }
    if size != compressed {
        return Err(refused(format!("it is stored, but its size {size} and compressed size {compressed} differ")));
    }
    Ok(ZipEntry { name, size, local_header })
}

/// The content of the ZIP64 field among the extra fields of a member; empty if there is none.
fn zip64_extra(extra: &[u8]) -> Result<ZipFields<'_>, String> {
    let mut fields = ZipFields { bytes: extra, at: 0 };
    // Some writers pad with fewer bytes than a field's header takes.
    while let (Some(id), Some(length)) = (fields.u16(), fields.u16()) {
        let content = fields.take(length.into()).ok_or("its extra fields are truncated")?;
        if id == ZIP64_EXTRA {
            return Ok(ZipFields { bytes: content, at: 0 });
        }
    }
    Ok(ZipFields { bytes: &[], at: 0 })
}

/// Byte ranges of a member: with its local header, and of its data alone.
fn place(bytes: &[u8], entry: &ZipEntry<'_>, directory_start: usize) -> Result<(Range<usize>, Range<usize>), String> {
    let ZipEntry { name, size, local_header } = *entry;
    let refused = |detail: &str| format!("zip: member `{}` at {local_header}: {detail}", clip(name));
    let start = usize::try_from(local_header).ok().filter(|start| *start < directory_start);
    let start = start.ok_or_else(|| refused("its local header is outside the archive"))?;
    let mut header = ZipFields { bytes: &bytes[..directory_start], at: start };
    let mut read = || {
        let signature = header.array::<4>()?;
        let _version = header.u16()?;
        let (flags, method) = (header.u16()?, header.u16()?);
        header.take(LOCAL_BYTES - 14)?;
        Some((signature, flags, method, header.u16()?, header.u16()?))
    };
    let (signature, flags, method, name_bytes, extra_bytes) =
        read().ok_or_else(|| refused("its local header overlaps the central directory"))?;
    let local_name = header.take(name_bytes.into());
    if &signature != LOCAL || local_name != Some(name.as_bytes()) || flags & 1 != 0 || method != 0 {
        return Err(refused("its local header does not match its entry in the central directory"));
    }
    let data = header.take(extra_bytes.into()).and_then(|_| {
        let size = usize::try_from(size).ok()?;
        let start = header.at;
        header.take(size).map(|_| start..start + size)
    });
    let outside = || refused(&format!("its {size} bytes overlap the central directory"));
    let data = data.ok_or_else(outside)?;
    Ok((start..data.end, data))
}
