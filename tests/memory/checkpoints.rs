//! Reading a file written by torch or tar, intact or damaged, takes little memory, whatever the file claims.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use aotron::checkpoint::torch::read_state_dict;
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use crate::{HELD, PEAK};

/// Limit for a file of a few kilobytes.
const MAX_BYTES: usize = 1 << 20;
/// Limit for any file, not counting its tensors.
const MAX_BOMB_BYTES: usize = 50 << 20;

/// Reads `bytes` and returns the peak memory use on top of that before.
fn peak(bytes: &[u8]) -> usize {
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let _ = read_state_dict(Path::new("weights.ckpt"), bytes);
    PEAK.load(Ordering::Relaxed) - before
}

/// A zip archive with this single member.
fn archive(name: &str, data: &[u8]) -> Vec<u8> {
    let size = (data.len() as u32).to_le_bytes();
    let name_bytes = (name.len() as u16).to_le_bytes();
    let shared = [&[20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &size[..], &size, &name_bytes, &[0, 0]].concat();
    let member = [b"PK\x03\x04", shared.as_slice(), name.as_bytes(), data].concat();
    let entry = [b"PK\x01\x02\x14\0", shared.as_slice(), &[0; 14], name.as_bytes()].concat();
    let [start, length] = [member.len(), entry.len()].map(|bytes| (bytes as u32).to_le_bytes());
    [&member, &entry, &b"PK\x05\x06\0\0\0\0\x01\0\x01\0"[..], &length, &start, &[0, 0]].concat()
}

fn bombs_take_little_memory() {
    // Slightly more objects, memo entries and values than a pickle of the maximum length can create.
    let bombs: &[(&[u8], &[u8])] = &[
        (b"}", b"\x85"),
        (b"", b"]"),
        (b"", b"("),
        (b"", b"}\x94"),
        (b"}\x94", b"h\0"),
        (b"}\x94", b"(h\0h\0h\0h\0h\0h\0h\0h\0t"),
        (b"]\x94", b"(h\0h\0h\0h\0h\0h\0h\0h\0e"),
        (b"}\x94", b"(h\0h\0h\0h\0h\0h\0h\0h\0u"),
        (b"}", b"Nb"),
    ];
    for (setup, repeated) in bombs {
        for kilobytes in [1, 1000, 8000] {
            let count = kilobytes * 1000 / repeated.len();
            let pickle = [b"\x80\x04", *setup, repeated.repeat(count).as_slice()].concat();
            let bytes = archive("archive/data.pkl", &pickle);
            let held = peak(&bytes);
            let limit = if kilobytes == 1 { MAX_BYTES } else { MAX_BOMB_BYTES };
            assert!(held < limit, "{kilobytes} KB of {repeated:?}: {held} bytes");
            println!("{kilobytes} KB of {repeated:?}: {held} bytes");
        }
    }
}

pub fn files_take_little_memory() {
    bombs_take_little_memory();
    damaged_files_take_little_memory();
}

fn damaged_files_take_little_memory() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut files = 0;
    let mut highest = 0;
    for entry in fs::read_dir("tests/data/torch").unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "pt") {
            continue;
        }
        let good = fs::read(&path).unwrap();
        files += 1;
        highest = highest.max(peak(&good));
        for _ in 0..2000 {
            let mut bytes = good.clone();
            for _ in 0..1 + random.next_u32() % 4 {
                let at = random.next_u32() as usize % bytes.len();
                bytes[at] = random.next_u32() as u8;
            }
            let bytes_held = peak(&bytes);
            assert!(bytes_held < MAX_BYTES, "{}: {bytes_held} bytes", path.display());
            highest = highest.max(bytes_held);
        }
    }
    assert!(files >= 14);
    println!("at most {highest} bytes for {files} files and 2000 damaged copies of each");
}
