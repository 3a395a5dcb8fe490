//! A sequence's logits are bit-identical whatever else is in its steps and however its prompt is chunked.

use std::collections::HashMap;
use std::path::Path;
use std::sync::LazyLock;

use aotron::backend::cpu::{CpuExecutor, CpuOptions};
use aotron::backend::{Chunk, Executor, NextToken, Rows, Step, open_cpu};
use aotron::compile::Precision;
use aotron::engine::Package;
use aotron::isa::Isa;
use proptest::prelude::*;

use crate::packages::build_package;

/// One package per shape and precision, built once.
static PACKAGES: LazyLock<(tempfile::TempDir, Vec<Package>)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let mut packages = Vec::new();
    for shape in ["odd", "gqa"] {
        for precision in Precision::ALL {
            let output = folder.path().join(format!("{shape}-{precision}"));
            packages.push(build_package(&Path::new("tests/data/shapes").join(shape), precision, &output));
        }
    }
    (folder, packages)
});

fn open(package: &Package, isa: Isa, threads: usize) -> CpuExecutor {
    open_cpu(package, &CpuOptions { threads: Some(threads), isa: Some(isa), slots: Some(4), ..CpuOptions::default() })
        .unwrap()
}

/// The last row of logits after each prefix of `ids` listed in `wanted`, computed from one sequence alone, token by
/// token.
fn alone(executor: &mut CpuExecutor, ids: &[u32]) -> Vec<Vec<u32>> {
    let limits = executor.limits().clone();
    (0..ids.len())
        .map(|past_tokens| {
            let next = [NextToken { slot: 0, past_tokens, token: ids[past_tokens] }];
            let step = Step::decode(&limits, &next).unwrap();
            bits(executor.forward(&step).unwrap().row(0).unwrap())
        })
        .collect()
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|v| v.to_bits()).collect()
}

/// One step of a schedule: number of tokens added to each of the four slots (0: not in the step), and the rows
/// requested.
type Schedule = Vec<([usize; 4], [u8; 4])>;

fn schedules() -> impl Strategy<Value = Schedule> {
    let tokens = prop_oneof![3 => Just(0usize), 3 => Just(1), 2 => 2usize..6, 1 => 6usize..14];
    let step = ([tokens.clone(), tokens.clone(), tokens.clone(), tokens], prop::array::uniform4(0u8..3));
    prop::collection::vec(step, 4..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn logits_do_not_depend_on_the_schedule(
        schedule in schedules(),
        which in 0usize..2 * Precision::ALL.len(),
        isa in 0usize..4,
        seed in any::<u32>(),
    ) {
        let package = &PACKAGES.1[which];
        let sets = Isa::available();
        let isa = sets[isa % sets.len()];
        let mut executor = open(package, isa, 2);
        let limits = executor.limits().clone();
        let vocab = limits.vocab_size as u32;
        let capacity = limits.max_sequence_tokens.min(60);
        let ids: Vec<Vec<u32>> = (0..4u32)
            .map(|slot| {
                (0..capacity as u32)
                    .map(|i| seed.wrapping_mul(slot + 3).wrapping_add(i.wrapping_mul(2_654_435_761)) % vocab)
                    .collect()
            })
            .collect();
        let mut expected: HashMap<usize, Vec<Vec<u32>>> = HashMap::new();
        let mut past = [0usize; 4];
        for (counts, rows) in schedule {
            let mut chunks = Vec::new();
            let mut ends = Vec::new();
            for slot in [2, 0, 3, 1] {
                let count = counts[slot].min(capacity - past[slot]);
                if count == 0 {
                    continue;
                }
                let rows = [Rows::None, Rows::Last, Rows::All][rows[slot] as usize];
                chunks.push(Chunk { slot, past_tokens: past[slot], tokens: &ids[slot][past[slot]..][..count], rows });
                match rows {
                    Rows::None => {}
                    Rows::Last => ends.push((slot, past[slot] + count - 1)),
                    Rows::All => ends.extend((past[slot]..past[slot] + count).map(|p| (slot, p))),
                }
                past[slot] += count;
            }
            if chunks.is_empty() || ends.len() > limits.max_logits_rows {
                chunks.iter().for_each(|c| past[c.slot] = c.past_tokens);
                continue;
            }
            let step = Step::prefill(&limits, &chunks).unwrap();
            let mut got = executor.forward(&step).unwrap();
            prop_assert_eq!(got.rows(), ends.len());
            for (row, (slot, position)) in ends.into_iter().enumerate() {
                let expected = expected.entry(slot).or_insert_with(|| alone(&mut open(package, isa, 1), &ids[slot]));
                prop_assert!(bits(got.row(row).unwrap()) == expected[position], "slot {} position {}", slot, position);
            }
        }
    }
}

/// A slot that held another sequence before gives the same logits as a fresh one.
#[test]
fn slots_are_reused_cleanly() {
    for package in &PACKAGES.1 {
        let ids: Vec<u32> = (0..20).collect();
        let expected = alone(&mut open(package, Isa::detect(), 1), &ids);
        let mut executor = open(package, Isa::detect(), 1);
        let other: Vec<u32> = (0..40).map(|i| (i * 7) % 50).collect();
        alone(&mut executor, &other);
        assert_eq!(alone(&mut executor, &ids), expected);
    }
}
