//! Support for the fuzz targets: runs a check within memory limits.
//!
//! libFuzzer's own allocation limit needs a sanitizer, which stable Rust does not have. So the targets use a counting
//! allocator, which aborts a run that allocates more than its input warrants.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

pub mod repair;

#[doc(hidden)]
pub use libfuzzer_sys;

/// Bytes that a reader may have allocated at any time, whatever its input.
pub const BASE_BYTES: usize = 16 << 20;
/// Additional bytes per byte of input.
const BYTES_PER_BYTE: usize = 64;

/// Defines a target that passes its inputs to `aotron::fuzzing::$check`. With `repair`, seven of eight mutated inputs
/// pass through that function first. With `open`, that function is called once before, without a limit on memory; and
/// `bytes` is another limit than [`BASE_BYTES`].
#[macro_export]
macro_rules! target {
    ($check:ident $(, open: $open:path)? $(, bytes: $bytes:expr)?) => {
        $crate::libfuzzer_sys::fuzz_target!(init: { $($open();)? }, |input: &[u8]| {
            let base_bytes = [$crate::BASE_BYTES $(, $bytes)?];
            $crate::run(aotron::fuzzing::$check, input, base_bytes[base_bytes.len() - 1]);
        });
    };
    ($check:ident $(, open: $open:path)?, repair: $repair:path) => {
        $crate::target!($check $(, open: $open)?);
        $crate::libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
            let size = $crate::libfuzzer_sys::fuzzer_mutate(data, size, max_size);
            if seed % 8 != 0 {
                $repair(&mut data[..size]);
            }
            size
        });
    };
}

/// Runs `check` on `bytes`; aborts if it allocates more than `base_bytes` and [`BYTES_PER_BYTE`].
pub fn run(check: fn(&[u8]), bytes: &[u8], base_bytes: usize) {
    let allowed = base_bytes + BYTES_PER_BYTE * bytes.len();
    LIMIT.store(LIVE.load(Ordering::Relaxed).saturating_add(allowed), Ordering::Relaxed);
    check(bytes);
    LIMIT.store(usize::MAX, Ordering::Relaxed);
}

/// Bytes currently allocated, and the limit.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

impl Bounded {
    fn grow(bytes: usize) {
        let live = LIVE.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        let limit = LIMIT.load(Ordering::Relaxed);
        // While panicking, reporting may allocate as much as it needs.
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

// SAFETY: every call is forwarded to the system allocator unchanged.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::grow(layout.size());
        // SAFETY: guaranteed by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::grow(layout.size());
        // SAFETY: guaranteed by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        Self::shrink(layout.size());
        // SAFETY: guaranteed by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        Self::grow(new_size);
        Self::shrink(layout.size());
        // SAFETY: guaranteed by the caller.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}
