use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::engine::Limits;
use crate::engine::tensorrt::Sizes;

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
        bindings,
        kv_cache_gib: BTreeMap::from([(40, 16), (80, 48)]),
        activation_scales: BTreeMap::new(),
    }
}

pub(in crate::backend::tensorrt::executor) fn constraints(sizes: &Sizes, vocab_size: usize) -> BatchingConstraints {
    BatchingConstraints {
        limits: Limits {
            slots: sizes.decode_sequences,
            max_sequence_tokens: sizes.max_sequence_tokens,
            max_step_tokens: sizes.prefill_tokens,
            max_logits_rows: sizes.prefill_logits_rows,
            vocab_size,
        },
        sizes: sizes.clone(),
        has_context_plan: true,
        row_align: row_align(vocab_size, sizes.top_tokens.min(vocab_size)),
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
            max_sequence_tokens: 128,
            decode_sequences,
            prefill_sequences,
            prefill_tokens,
            prefill_logits_rows,
            top_tokens,
        };
        let info = info(layers, kv_heads, 16, &weights, sizes.clone(), vocab_size);
        let mut constraints = constraints(&sizes, vocab_size);
        constraints.limits.slots = slots.min(decode_sequences);
        let layout = MemoryLayout::new(&info, &constraints, 1000).unwrap();
        assert_apart(layout.weights.iter().map(|weight| weight.part), layout.weights_bytes);
        prop_assert_eq!(layout.weights.len(), weights.len());
        assert_apart(layout.caches.values().copied(), layout.cache_bytes);
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
        let k_bytes = 4 * outputs.k as u64;
        let rows = constraints.decode_rows() + constraints.prefill_rows();
        let mut places = Vec::new();
        for row in 0..rows {
            let [values, ids] = outputs.top(row);
            let logits = outputs.row(row);
            if row % constraints.row_align == 0 {
                prop_assert!([values, ids, logits.offset].iter().all(|offset| offset.is_multiple_of(ALIGN)));
            }
            let written = outputs.written(row < outputs.decode_rows, row >= outputs.decode_rows);
            for start in [values, ids] {
                prop_assert!(written.start as u64 <= start && start + k_bytes <= written.end as u64);
                places.push(start..start + k_bytes);
            }
            places.push(logits.offset..logits.offset + logits.bytes);
        }
        places.sort_by_key(|range| range.start);
        prop_assert!(places.windows(2).all(|pair| pair[0].end <= pair[1].start));
        prop_assert!(places.last().unwrap().end <= layout.outputs_bytes);
    }
}

/// Nemotron-3-8B in BF16.
fn model_8b() -> (TensorRtInfo, BatchingConstraints) {
    let sizes = Sizes {
        max_sequence_tokens: 4096,
        decode_sequences: 24,
        prefill_sequences: 1,
        prefill_tokens: 512,
        prefill_logits_rows: 32,
        top_tokens: 64,
    };
    let info = info(32, 32, 128, &[8_540_135_424], sizes.clone(), 256_000);
    (info, constraints(&sizes, 256_000))
}

fn fit_8b(device_bytes: u64, free_bytes: u64, asked: Option<usize>) -> Result<(usize, String), String> {
    let (info, mut constraints) = model_8b();
    let machine = MemoryBudget { device_bytes, free_bytes, kv_cache_gib: &info.kv_cache_gib, asked };
    let (layout, words) = fit(&info, &mut constraints, 2_000_000_000, &machine)?;
    assert_eq!(constraints.limits.slots, layout.slots);
    Ok((layout.slots, words))
}

#[test]
fn slots_are_what_recipe_memory_and_request_allow() {
    let (slots, words) = fit_8b(42_400_000_000, 41_900_000_000, None).unwrap();
    assert_eq!(
        (slots, words.as_str()),
        (
            8,
            "weights 17.1 GB + KV cache 16.0 GiB (8 sequences of 4096 tokens, 512 KiB a token) + logits and scratch \
             2.0 GB = 36.3 GB of 41.9 GB free"
        )
    );
    assert_eq!(fit_8b(85_000_000_000, 84_000_000_000, None).unwrap().0, 24);
    // A GPU with a few percent less than its nominal memory, and one that the recipe does not list.
    assert_eq!(fit_8b(79_000_000_000, 78_000_000_000, None).unwrap().0, 24);
    assert_eq!(fit_8b(24_000_000_000, 23_500_000_000, None).unwrap().0, 1);
    // Others use the GPU.
    assert_eq!(fit_8b(42_400_000_000, 30_000_000_000, None).unwrap().0, 4);
    assert_eq!(fit_8b(42_400_000_000, 41_900_000_000, Some(2)).unwrap().0, 2);
    let (slots, words) = fit_8b(42_400_000_000, 41_900_000_000, Some(12)).unwrap();
    assert_eq!(slots, 10, "a request is not bound by the recipe's share");
    assert!(words.ends_with("; 10 sequences instead of 12, for lack of memory"), "{words}");
    let error = fit_8b(16_000_000_000, 15_000_000_000, None).unwrap_err();
    assert!(error.contains("= 21.3 GB of 15.0 GB free") && error.contains("int8"), "{error}");
}

#[test]
fn alignment_of_rows() {
    assert_eq!(row_align(256_000, 64), 1);
    assert_eq!(row_align(256_000, 32), 2);
    assert_eq!(row_align(1001, 64), 64);
    assert_eq!(row_align(1, 1), 64);
}
