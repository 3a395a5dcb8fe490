use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::backend::tensorrt::executor::schedule::ClassConstraints;
use crate::engine::Limits;
use crate::engine::tensorrt::{CapacityClass, Sizes};

/// Sums of a row, as the lowering splits it.
fn sums_of(vocab_size: usize) -> usize {
    1 << vocab_size.trailing_zeros().min(6)
}

/// Manifest entry of a model of these sizes.
pub(in crate::backend::tensorrt::executor) fn info(
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    weights: &[usize],
    sizes: Sizes,
    vocab_size: usize,
) -> TensorRtInfo {
    use Extent::{Fixed, Step};
    use StepSize::{B, R, T};
    let binding =
        |name: &str, role, dtype, shape: &[Extent]| Binding { name: name.into(), role, dtype, shape: shape.to_vec() };
    let mut bindings: Vec<Binding> = weights
        .iter()
        .enumerate()
        .map(|(i, n)| binding(&format!("weight.{i}"), BindingRole::Weight, DType::BF16, &[Fixed(*n)]))
        .collect();
    let cache = [Step(B), Fixed(kv_heads), Fixed(sizes.max_sequence_tokens), Fixed(head_dim)];
    let k = sizes.top_tokens.min(vocab_size);
    bindings.extend([
        binding("token_ids", BindingRole::TokenIds, DType::I32, &[Step(B), Step(T)]),
        binding("positions", BindingRole::Positions, DType::I32, &[Step(B), Step(T)]),
        binding("past_tokens", BindingRole::PastTokens, DType::I32, &[Step(B)]),
        binding(
            "attention_mask",
            BindingRole::AttentionMask,
            DType::Bool,
            &[Step(B), Fixed(1), Step(T), Fixed(sizes.max_sequence_tokens)],
        ),
        binding("logits_rows", BindingRole::LogitsRows, DType::I32, &[Step(R)]),
        binding("logits", BindingRole::Logits, DType::F32, &[Step(R), Fixed(vocab_size)]),
        binding("top_logits", BindingRole::TopLogits, DType::F32, &[Step(R), Fixed(k)]),
        binding("top_ids", BindingRole::TopIds, DType::I32, &[Step(R), Fixed(k)]),
        binding("logit_sums", BindingRole::LogitSums, DType::F32, &[Step(R), Fixed(sums_of(vocab_size))]),
    ]);
    for layer in 0..layers {
        bindings.extend([
            binding(&format!("keys.{layer}"), BindingRole::KeyCache(layer), DType::BF16, &cache),
            binding(&format!("values.{layer}"), BindingRole::ValueCache(layer), DType::BF16, &cache),
            binding(&format!("new_keys.{layer}"), BindingRole::UpdatedKeys(layer), DType::BF16, &cache),
            binding(&format!("new_values.{layer}"), BindingRole::UpdatedValues(layer), DType::BF16, &cache),
        ]);
    }
    TensorRtInfo {
        compute_capability: 80,
        compiled: None,
        sizes,
        smaller_classes: Vec::new(),
        bindings,
        kv_cache_gib: BTreeMap::from([(40, 16), (80, 48)]),
        activation_scales: BTreeMap::new(),
    }
}

fn constraints(info: &TensorRtInfo, slots: usize, vocab_size: usize) -> BatchingConstraints {
    let sizes = &info.sizes;
    let classes = info.class_sizes().into_iter();
    BatchingConstraints {
        limits: Limits {
            slots,
            max_sequence_tokens: sizes.max_sequence_tokens,
            max_step_tokens: sizes.prefill_tokens,
            max_logits_rows: sizes.prefill_logits_rows.max(slots),
            vocab_size,
        },
        classes: classes.map(|sizes| ClassConstraints { sizes, has_context_plan: true }).collect(),
        rows: slots,
        row_align: row_align([vocab_size, sizes.top_tokens.min(vocab_size), sums_of(vocab_size)]),
    }
}

/// Asserts that the ranges are disjoint, aligned and in bounds.
fn assert_apart(parts: impl IntoIterator<Item = BufferRange>, bytes: u64) {
    let mut ranges: Vec<Range<u64>> = parts.into_iter().map(|part| part.offset..part.offset + part.bytes).collect();
    ranges.sort_by_key(|range| range.start);
    for pair in ranges.windows(2) {
        assert!(pair[0].end <= pair[1].start, "{pair:?}");
    }
    assert!(ranges.iter().all(|range| range.start.is_multiple_of(ALIGN) && range.end <= bytes), "{ranges:?}");
}

proptest! {
    #[test]
    fn nothing_overlaps(
        layers in 1..5usize,
        kv_heads in 1..5usize,
        weights in prop::collection::vec(1..10_000usize, 0..8),
        (decode_sequences, prefill_sequences, prefill_tokens, prefill_logits_rows) in
            (1..30usize, 1..3usize, 1..70usize, 1..40usize),
        top_tokens in 1..80usize,
        vocab_size in 1..3000usize,
        slots in 1..30usize,
    ) {
        let sizes = Sizes {
            max_sequence_tokens: 128, position_tokens: 128,
            decode_sequences,
            prefill_sequences,
            prefill_tokens,
            prefill_logits_rows,
            top_tokens,
        };
        let info = info(layers, kv_heads, 16, &weights, sizes.clone(), vocab_size);
        let slots = slots.min(decode_sequences);
        let constraints = constraints(&info, slots, vocab_size);
        let layout = MemoryLayout::new(&info, &constraints, 128 * slots, 1000).unwrap();
        assert_apart(layout.weights.iter().map(|weight| weight.part), layout.weights_bytes);
        prop_assert_eq!(layout.weights.len(), weights.len());
        let regions = layout.caches.values().map(|region| region.part);
        assert_apart(regions.chain(layout.spare_rows), layout.cache_bytes);
        prop_assert_eq!(layout.caches.len(), 2 * layers);
        let InputRanges { token_ids, positions, past_tokens, total_tokens, logits_rows, mask, triangle, host_bytes } =
            layout.inputs;
        let all = [token_ids, positions, past_tokens, total_tokens, logits_rows, mask, triangle];
        assert_apart(all, layout.inputs_bytes);
        prop_assert_eq!(mask.offset + (sizes.decode_sequences * sizes.max_sequence_tokens) as u64, host_bytes);
        prop_assert!(host_bytes <= mask.offset + mask.bytes);
        let outputs = &layout.outputs;
        assert_apart(outputs.tops.into_iter().chain([outputs.logits]), layout.outputs_bytes);

        // Rows are disjoint, inside their range, and aligned where a run may start.
        let rows = constraints.decode_rows() + constraints.prefill_rows();
        let mut places = Vec::new();
        for row in 0..rows {
            let tops = outputs.top(row);
            let logits = outputs.row(row);
            if row % constraints.row_align == 0 {
                prop_assert!(tops.iter().chain([&logits]).all(|part| part.offset.is_multiple_of(ALIGN)));
            }
            let written = outputs.written(row < outputs.decode_rows, row >= outputs.decode_rows);
            for BufferRange { offset, bytes } in tops {
                prop_assert!(written.start as u64 <= offset && offset + bytes <= written.end as u64);
                places.push(offset..offset + bytes);
            }
            places.push(logits.offset..logits.offset + logits.bytes);
        }
        places.sort_by_key(|range| range.start);
        prop_assert!(places.windows(2).all(|pair| pair[0].end <= pair[1].start));
        prop_assert!(places.last().unwrap().end <= layout.outputs_bytes);
    }
}

/// Nemotron-3-8B in BF16, with these capacity classes below 4,096.
fn model_8b(smaller: &[usize]) -> (TensorRtInfo, BatchingConstraints) {
    let sizes = Sizes {
        max_sequence_tokens: 4096,
        position_tokens: 4096,
        decode_sequences: 24,
        prefill_sequences: 1,
        prefill_tokens: 512,
        prefill_logits_rows: 32,
        top_tokens: 64,
    };
    let mut info = info(32, 32, 128, &[8_540_135_424], sizes, 256_000);
    let class = |capacity: &usize| CapacityClass {
        capacity_tokens: *capacity,
        decode_sequences: 24 * 4096 / capacity,
        plan: None,
        context_plan: None,
    };
    info.smaller_classes = smaller.iter().map(class).collect();
    let slots = smaller.first().map_or(24, |capacity| 24 * 4096 / capacity);
    let constraints = constraints(&info, slots, 256_000);
    (info, constraints)
}

fn fit_8b(
    smaller: &[usize],
    device_bytes: u64,
    free_bytes: u64,
    asked: Option<usize>,
) -> Result<(usize, usize, String), String> {
    let (info, mut constraints) = model_8b(smaller);
    let machine = MemoryBudget { device_bytes, free_bytes, kv_cache_gib: &info.kv_cache_gib, asked };
    let (layout, words) = fit(&info, &mut constraints, 2_000_000_000, &machine)?;
    assert_eq!(constraints.limits.slots, layout.region.slots);
    assert!(layout.region.most_rows_in_all >= layout.region.slots);
    Ok((layout.region.slots, layout.region.tokens, words))
}

#[test]
fn slots_are_what_recipe_memory_and_request_allow() {
    let (slots, tokens, words) = fit_8b(&[], 42_400_000_000, 41_900_000_000, None).unwrap();
    assert_eq!(
        (slots, tokens, words.as_str()),
        (
            8,
            8 * 4096,
            "weights 17.1 GB + KV cache 16.1 GiB (8 sequences of 4096 tokens, 512 KiB a token) + logits and scratch \
             2.0 GB = 36.4 GB of 41.9 GB free"
        )
    );
    let slots = |device, free, asked| fit_8b(&[], device, free, asked).unwrap().0;
    assert_eq!(slots(85_000_000_000, 84_000_000_000, None), 24);
    // A GPU with a few percent less than its nominal memory, and one that the recipe does not list.
    assert_eq!(slots(79_000_000_000, 78_000_000_000, None), 24);
    assert_eq!(slots(24_000_000_000, 23_500_000_000, None), 1);
    // Others use the GPU.
    assert_eq!(slots(42_400_000_000, 30_000_000_000, None), 4);
    assert_eq!(slots(42_400_000_000, 41_900_000_000, Some(2)), 2);
    let (_, tokens, words) = fit_8b(&[], 42_400_000_000, 41_900_000_000, Some(12)).unwrap();
    assert_eq!(tokens / 4096, 10, "a request is not bound by the recipe's share");
    assert!(words.ends_with("; 10 sequences instead of 12, for lack of memory"), "{words}");
    let error = fit_8b(&[], 16_000_000_000, 15_000_000_000, None).unwrap_err();
    assert!(error.contains("GB of 15.0 GB free") && error.contains("int8"), "{error}");
}

/// The entries of the recipe for an H100: a GPU between two takes the lower one, and slots bound what is promised.
#[test]
fn a_gpu_between_two_entries_takes_the_lower() {
    let entries = BTreeMap::from([(80, 56), (141, 112)]);
    let gib = |gigabytes: u64| kv_budget_bytes(&entries, gigabytes * 1_000_000_000).map(|bytes| bytes >> 30);
    // H100 with 80 GB, H100 NVL with 94 GB, GH200 with 96 GB, H200 with 141 GB, and more.
    assert_eq!([85, 100, 102, 150, 190].map(gib), [56, 56, 56, 112, 112].map(Some));
    assert_eq!([76, 133, 134].map(gib), [56, 56, 112].map(Some));
    assert_eq!(gib(48), None);

    let (mut info, _) = model_8b(&[256, 512, 1024, 2048]);
    info.kv_cache_gib = entries;
    info.sizes.decode_sequences = 56;
    for class in &mut info.smaller_classes {
        class.decode_sequences = 448.min(56 * 4096 / class.capacity_tokens);
    }
    let mut constraints = constraints(&info, 448, 256_000);
    let machine = MemoryBudget {
        device_bytes: 150_750_000_000,
        free_bytes: 150_100_000_000,
        kv_cache_gib: &info.kv_cache_gib,
        asked: None,
    };
    let (layout, words) = fit(&info, &mut constraints, 4_000_000_000, &machine).unwrap();
    assert_eq!((layout.region.slots, layout.region.tokens), (448, 56 * 4096));
    assert!(words.contains("56 sequences of 4096 tokens or 448 of 256,"), "{words}");
}

#[test]
fn capacity_classes_share_one_budget() {
    let smaller = [256, 512, 1024, 2048];
    let (slots, tokens, words) = fit_8b(&smaller, 85_000_000_000, 84_000_000_000, None).unwrap();
    assert_eq!((slots, tokens), (384, 24 * 4096));
    assert!(words.contains("24 sequences of 4096 tokens or 384 of 256, 512 KiB a token"), "{words}");
    let (slots, tokens, words) = fit_8b(&smaller, 42_400_000_000, 41_900_000_000, None).unwrap();
    assert_eq!((slots, tokens), (128, 8 * 4096));
    assert!(words.contains("8 sequences of 4096 tokens or 128 of 256"), "{words}");
    // Memory for two long sequences, and no more than two at once.
    let (slots, tokens, _) = fit_8b(&smaller, 85_000_000_000, 84_000_000_000, Some(2)).unwrap();
    assert_eq!((slots, tokens), (2, 2 * 4096));
    let (slots, tokens, _) = fit_8b(&smaller, 42_400_000_000, 30_000_000_000, None).unwrap();
    assert!((4 * 4096..5 * 4096).contains(&tokens) && slots == tokens / 256, "{slots} {tokens}");
}

#[test]
fn alignment_of_rows() {
    assert_eq!(row_align([256_000, 64, 64]), 1);
    assert_eq!(row_align([256_000, 32, 64]), 2);
    assert_eq!(row_align([1001, 64, 1]), 64);
    assert_eq!(row_align([1, 1, 1]), 64);
    // Sums are aligned wherever logits are.
    for vocab_size in 1..2000 {
        assert_eq!(row_align([vocab_size, 64, sums_of(vocab_size)]), row_align([vocab_size, 64, 64]));
    }
}
