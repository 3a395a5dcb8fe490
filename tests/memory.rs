//! Memory use, counted for the whole process. The checks are therefore a process of their own with a single test:
//! anything running beside it would be counted too.
#![allow(unsafe_code)]

/// Reading checkpoints.
#[path = "memory/checkpoints.rs"]
mod checkpoints;
/// Building networks.
#[path = "memory/networks.rs"]
mod networks;
mod packages;
mod skips;
/// Running steps.
#[path = "memory/steps.rs"]
mod steps;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Total bytes ever allocated.
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
/// Bytes currently allocated.
static HELD: AtomicUsize = AtomicUsize::new(0);
/// The maximum of [`HELD`].
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is forwarded to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: guaranteed by the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: guaranteed by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn memory_is_bounded() {
    steps::steps_allocate_nothing();
    checkpoints::files_take_little_memory();
    networks::two_hundred_builds_leave_nothing_behind();
}
