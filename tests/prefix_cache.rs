//! Answers with keys and values from the prefix cache have the same bits as those of a fresh engine.

use std::collections::HashMap;
use std::path::Path;
use std::sync::LazyLock;

use aotron::backend::cpu::{CpuExecutor, CpuOptions};
use aotron::backend::{Executor, open_cpu};
use aotron::compile::Precision;
use aotron::engine::Package;
use aotron::isa::Isa;
use aotron::{Batcher, Completion, Event, GenerationRequest, RequestId, SamplingParams, TokenReports};
use proptest::prelude::*;

use crate::packages::build_package;

/// One package per shape, in a precision with BF16 keys and values and in one with F32's.
static PACKAGES: LazyLock<(tempfile::TempDir, Vec<Package>)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let mut packages = Vec::new();
    for shape in ["odd", "gqa"] {
        for precision in [Precision::F32, Precision::Bf16] {
            let output = folder.path().join(format!("{shape}-{precision}"));
            packages.push(build_package(&Path::new("tests/data/shapes").join(shape), precision, &output));
        }
    }
    (folder, packages)
});

fn open(package: &Package, isa: Isa, slots: usize) -> CpuExecutor {
    open_cpu(package, &CpuOptions { threads: Some(1), isa: Some(isa), slots: Some(slots), copy_weights: false })
        .unwrap()
}

/// Runs a batcher until it is idle, and adds the completions.
fn run(batcher: &mut Batcher, done: &mut HashMap<RequestId, Completion>) {
    while !batcher.is_idle() {
        for (id, event) in batcher.step() {
            match event {
                Event::Done(completion) => assert!(done.insert(id, completion).is_none()),
                Event::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
    }
}

#[test]
fn blocks_are_copied_whole_and_no_further() {
    for package in &PACKAGES.1 {
        let mut executor = open(package, Isa::detect(), 2);
        let block = executor.kv_block().unwrap();
        let blocks = executor.limits().max_sequence_tokens.div_ceil(block.tokens);
        for slot in 0..2 {
            assert!(executor.fill_slot(slot, 0x11 * (slot as u8 + 1)).unwrap());
        }
        let mut data = vec![0; block.bytes];
        executor.read_kv_block(1, 0, &mut data).unwrap();
        assert!(data.iter().all(|byte| *byte == 0x22));
        executor.write_kv_block(0, blocks - 1, &data).unwrap();
        for slot in 0..2 {
            for index in 0..blocks {
                executor.read_kv_block(slot, index, &mut data).unwrap();
                let expected = if slot == 1 || index == blocks - 1 { 0x22 } else { 0x11 };
                assert!(data.iter().all(|byte| *byte == expected), "block {index} of slot {slot}");
            }
        }
        for (slot, index, bytes) in [(2, 0, block.bytes), (0, blocks, block.bytes), (0, 0, block.bytes - 1)] {
            assert!(executor.read_kv_block(slot, index, &mut vec![0; bytes]).is_err());
            assert!(executor.write_kv_block(slot, index, &vec![0; bytes]).is_err());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn answers_from_the_cache_are_those_of_a_fresh_engine(
        turns in prop::collection::vec((0u32..6, 1usize..14, 1usize..6, 0usize..3, any::<bool>()), 4..24),
        which in 0usize..4,
        isa in 0usize..4,
        slots in 1usize..4,
        room in prop_oneof![Just(0usize), 2usize..12, Just(1000)],
        seed in any::<u64>(),
    ) {
        let package = &PACKAGES.1[which];
        let sets = Isa::available();
        let isa = sets[isa % sets.len()];
        let executor = open(package, isa, slots);
        let (limits, block) = (executor.limits().clone(), executor.kv_block().unwrap());
        let mut batcher = Batcher::new(Box::new(executor), None, 99).prefix_cache_bytes(room * (block.bytes + 512));
        let capacity = limits.max_sequence_tokens;
        // Conversations by number; all begin alike, and those with odd numbers have a salt.
        let shared: Vec<u32> = (0..20).map(|n| (n * 7 + 1) % limits.vocab_size as u32).collect();
        let mut conversations: HashMap<u32, Vec<u32>> = HashMap::new();
        let mut submitted: Vec<(RequestId, GenerationRequest, u32)> = Vec::new();
        let mut done = HashMap::new();
        for (number, new_tokens, max_tokens, steps, is_sampled) in turns {
            // A turn needs the answer before it.
            if submitted.iter().any(|(id, _, other)| *other == number && !done.contains_key(id)) {
                run(&mut batcher, &mut done);
            }
            let ids = conversations.entry(number).or_insert_with(|| shared.clone());
            if let Some((id, ..)) = submitted.iter().rev().find(|(_, _, other)| *other == number) {
                ids.extend(&done[id].token_ids);
            }
            ids.extend((0..new_tokens as u32).map(|n| (number * 31 + n * 13 + 5) % limits.vocab_size as u32));
            if ids.len() + max_tokens > capacity {
                *ids = shared.clone();
            }
            let sampling = if is_sampled { SamplingParams::sampled(1.5).seed(seed) } else { SamplingParams::greedy() };
            let mut request = GenerationRequest::new(ids.clone()).max_tokens(max_tokens).sampling(sampling);
            request = request.reports(TokenReports::Logprobs(3));
            request.cache_salt = (number % 2 == 1).then(|| "odd".to_owned());
            submitted.push((batcher.submit(request.clone()).unwrap(), request, number));
            for _ in 0..steps {
                for (id, event) in batcher.step() {
                    if let Event::Done(completion) = event {
                        done.insert(id, completion);
                    }
                }
            }
        }
        run(&mut batcher, &mut done);
        for (id, request, _) in &submitted {
            let mut fresh = Batcher::new(Box::new(open(package, isa, 1)), None, 1);
            let fresh_id = fresh.submit(request.clone()).unwrap();
            let mut expected = HashMap::new();
            run(&mut fresh, &mut expected);
            let (found, expected) = (&done[id], &expected[&fresh_id]);
            prop_assert_eq!(&found.token_ids, &expected.token_ids);
            // A log-probability depends on every logit of its row.
            prop_assert_eq!(&found.reports, &expected.reports);
        }
    }
}
