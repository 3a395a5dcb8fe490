//! Dropped networks leave nothing behind in memory.

use aotron::backend::tensorrt::{LibraryKind, TensorRtLibrary};

use crate::skips::skip;

/// Resident memory of this process, in bytes.
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}

pub fn two_hundred_builds_leave_nothing_behind() {
    let library = match TensorRtLibrary::find(LibraryKind::Rtx) {
        Ok(library) => library,
        Err(error) => {
            return skip("tensorrt", "two_hundred_builds_leave_nothing_behind", error);
        }
    };
    let path = library.path();
    // Opens the library, creates a network, builds it and drops everything.
    // SAFETY: the opened library is TensorRT, or there is none.
    #[allow(unsafe_code)]
    let cycle = || unsafe { TensorRtLibrary::open(LibraryKind::Rtx, &path) }.unwrap().compiles_for(Some(80)).unwrap();
    (0..20).for_each(|_| cycle());
    let before = resident_bytes();
    (0..200).for_each(|_| cycle());
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes more after 200 networks");
}
