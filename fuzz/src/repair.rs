//! Repairs mutated inputs: checksums, lengths and offsets, without which a reader would reject them before it sees most
//! of the mutations. Bytes that do not look like the format in question are left alone.

use std::ops::Range;

/// Fixes the checksum of every header block of a tar archive: those found by following sizes, and those with a magic
/// number.
pub fn tar(bytes: &mut [u8]) {
    const BLOCK_BYTES: usize = 512;
    const CHECKSUM: Range<usize> = 148..156;
    let mut header = 0;
    for (index, block) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
        let is_next = index == header;
        if is_next {
            let octal = |size: usize, byte: &u8| size.saturating_mul(8) + usize::from(byte & 7);
            let size = block[124..136].iter().take_while(|byte| byte.is_ascii_digit()).fold(0, octal);
            header += 1 + size.div_ceil(BLOCK_BYTES);
        }
        if block.iter().any(|byte| *byte != 0) && (is_next || block[257..262] == *b"ustar") {
            block[CHECKSUM].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[CHECKSUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

/// Fixes the length of a safetensors header, so that it covers the JSON and the spaces after it.
pub fn safetensors(bytes: &mut [u8]) {
    let Some((length, rest)) = bytes.split_first_chunk_mut::<8>() else { return };
    if let Some(end) = json_end(rest) {
        let spaces = rest[end..].iter().take_while(|byte| **byte == b' ').count();
        *length = ((end + spaces) as u64).to_le_bytes();
    }
}

/// Fixes the length of the JSON before a request's tensors.
pub fn tensors(bytes: &mut [u8]) {
    let Some((length, rest)) = bytes.split_first_chunk_mut::<2>() else { return };
    if let Some(end) = json_end(rest).and_then(|end| u16::try_from(end).ok()) {
        *length = end.to_le_bytes();
    }
}

/// The end of the JSON object, or of the first byte that begins none, that `bytes` start with.
fn json_end(bytes: &[u8]) -> Option<usize> {
    let (mut depth, mut in_string, mut escaped) = (0i32, false, false);
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' if !in_string => depth += 1,
            b'}' if !in_string => depth -= 1,
            _ => {}
        }
        if depth <= 0 {
            return Some(at + 1);
        }
    }
    None
}

/// Fixes the offsets of a zip archive's members and central directory. Directory entries are matched with local headers
/// in file order, and the bytes between two headers are taken as the data of the first.
pub fn zip(bytes: &mut [u8]) {
    let find = |bytes: &[u8], magic: &[u8]| -> Vec<usize> {
        bytes.windows(magic.len()).enumerate().filter(|(_, found)| *found == magic).map(|(at, _)| at).collect()
    };
    let locals = find(bytes, b"PK\x03\x04");
    let entries = find(bytes, b"PK\x01\x02");
    let (Some(directory), Some(end)) = (entries.first().copied(), find(bytes, b"PK\x05\x06").last().copied()) else {
        return;
    };
    for (index, (local, entry)) in locals.iter().zip(&entries).enumerate() {
        let Some(lengths) = bytes.get(local + 26..local + 30) else { return };
        let length = |at: usize| usize::from(u16::from_le_bytes([lengths[at], lengths[at + 1]]));
        let data = local + 30 + length(0) + length(2);
        let next = locals.get(index + 1).copied().unwrap_or(directory);
        let size = next.saturating_sub(data);
        put(bytes, entry + 20, size);
        put(bytes, entry + 24, size);
        put(bytes, entry + 42, *local);
    }
    put(bytes, end + 12, end.saturating_sub(directory));
    put(bytes, end + 16, directory);
}

/// Writes a four-byte value, unless the one there says that the value is stored elsewhere.
fn put(bytes: &mut [u8], at: usize, value: usize) {
    if let (Some(field), Ok(value)) = (bytes.get_mut(at..at.saturating_add(4)), u32::try_from(value))
        && field != [0xFF; 4]
    {
        field.copy_from_slice(&value.to_le_bytes());
    }
}
