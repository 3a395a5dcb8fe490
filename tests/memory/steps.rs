//! A step allocates nothing: the arena, the KV cache and the step's indices are allocated when an engine is opened.

use std::path::Path;
use std::sync::atomic::Ordering;

use aotron::backend::cpu::CpuOptions;
use aotron::backend::{Chunk, Executor, NextToken, Rows, Step, open_cpu};
use aotron::compile::Precision;

use crate::ALLOCATED;
use crate::packages::build_package;

pub fn steps_allocate_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Path::new("tests/data/shapes/odd");
    for precision in Precision::ALL {
        check(&build_package(checkpoint, precision, &folder.path().join(precision.to_string())));
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
    let before = ALLOCATED.load(Ordering::Relaxed);
    for _ in 0..STEPS {
        executor.forward(&prefill).unwrap();
        executor.forward(&decode).unwrap();
    }
    let bytes = ALLOCATED.load(Ordering::Relaxed) - before;
    // The thread pool's queue occasionally grows by a block; a kernel that allocated would take at least a row.
    assert!(bytes / (2 * STEPS) < 64, "{bytes} bytes in {STEPS} prefill and decode steps");
}
