//! A step allocates nothing: the arena, the cache and the step's indices are made when an engine is opened.
#![allow(unsafe_code)]

mod packages;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use aotron::backend::cpu::CpuOptions;
use aotron::backend::{Chunk, Executor, NextToken, Rows, Step, open_cpu};
use aotron::compile::Precision;

static BYTES: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn steps_allocate_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Path::new("tests/data/shapes/odd");
    for precision in Precision::ALL {
        check(&packages::build_package(checkpoint, precision, &folder.path().join(precision.to_string())));
    }
}

fn check(package: &aotron::engine::Package) {
    let mut executor = open_cpu(package, &CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
    let limits = executor.limits().clone();
    let prompt: Vec<u32> = (0..32).collect();
    let prefill =
        Step::prefill(&limits, &[Chunk { slot: 0, past_tokens: 0, tokens: &prompt, rows: Rows::Last }]).unwrap();
    let decode = Step::decode(&limits, &[NextToken { slot: 0, past_tokens: 32, token: 5 }]).unwrap();
    executor.forward(&prefill).unwrap();
    executor.forward(&decode).unwrap();

    const STEPS: usize = 100;
    let before = BYTES.load(Ordering::Relaxed);
    for _ in 0..STEPS {
        executor.forward(&prefill).unwrap();
        executor.forward(&decode).unwrap();
    }
    let bytes = BYTES.load(Ordering::Relaxed) - before;
    // The thread pool's queue grows by a block now and then; a kernel that allocated would take a row at the least.
    assert!(bytes / (2 * STEPS) < 64, "{bytes} bytes in {STEPS} prefill and decode steps");
}
