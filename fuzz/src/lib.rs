//! What the fuzz targets share: running a check within bounds of memory.
//!
//! libFuzzer's own limit on allocations needs a sanitizer, which stable Rust has none of. So the allocator of the
//! targets counts, and ends a run that takes more than its input warrants.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

pub mod repair;

#[doc(hidden)]
pub use libfuzzer_sys;

/// What a reader may have allocated at once, whatever it reads.
const BASE_BYTES: usize = 16 << 20;
/// And for each byte of its input.
const BYTES_PER_BYTE: usize = 64;

/// A target whose inputs go to `aotron::fuzzing::$check`. With `repair`, seven of eight mutated inputs pass through that
/// function first.
#[macro_export]
macro_rules! target {
    ($check:ident) => {
        $crate::libfuzzer_sys::fuzz_target!(|bytes: &[u8]| $crate::run(aotron::fuzzing::$check, bytes));
    };
    ($check:ident, repair: $repair:path) => {
        $crate::target!($check);
        $crate::libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
            let size = $crate::libfuzzer_sys::fuzzer_mutate(data, size, max_size);
            if seed % 8 != 0 {
                $repair(&mut data[..size]);
            }
            size
        });
    };
}

/// Runs `check` on `bytes`; aborts if it takes too much memory.
pub fn run(check: fn(&[u8]), bytes: &[u8]) {
    let allowed = BASE_BYTES + BYTES_PER_BYTE * bytes.len();
    LIMIT.store(LIVE.load(Ordering::Relaxed).saturating_add(allowed), Ordering::Relaxed);
    check(bytes);
    LIMIT.store(usize::MAX, Ordering::Relaxed);
}

/// Bytes that are allocated, and the most there may be.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

impl Bounded {
    fn grow(bytes: usize) {
        let live = LIVE.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        let limit = LIMIT.load(Ordering::Relaxed);
        // A panic is reported with as much as that takes.
        if live > limit && !std::thread::panicking() {
            LIMIT.store(usize::MAX, Ordering::Relaxed);
            eprintln!("out of bounds: an allocation of {bytes} bytes makes {live}; at most {limit} are allowed here");
            std::process::abort();
        }
    }

    fn shrink(bytes: usize) {
        LIVE.fetch_sub(bytes, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::grow(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::grow(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        Self::shrink(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        Self::grow(new_size);
        Self::shrink(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}
