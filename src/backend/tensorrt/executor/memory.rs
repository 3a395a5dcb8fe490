//! Layout of the executor's GPU memory, planned before any of it is allocated.
//!
//! | buffer | holds |
//! | --- | --- |
//! | weights | every [`BindingRole::Weight`], in order of the bindings |
//! | cache | keys and values of every layer, `[layers, 2, slots, kv_heads, S, head_dim]` |
//! | inputs | token ids, positions, lengths or mask, and logits rows of one run |
//! | outputs | top-k logits and their ids for decode and prefill rows, then all logits, `f32[rows, vocab]` |
//! | scratch | TensorRT's intermediate values; all contexts share it, since their runs do not overlap |

use std::collections::BTreeMap;

use super::schedule::BatchingConstraints;
use crate::backend::tensorrt::device::ALIGN;
use crate::engine::tensorrt::{Binding, BindingRole, Extent, StepSize, TensorRtInfo};
use crate::tensor::DType;

/// Memory left free for the driver, contexts and kernels.
const RESERVE_BYTES: u64 = 512 << 20;

/// A byte range of a buffer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct BufferRange {
    pub offset: u64,
    pub bytes: u64,
}

/// A weight's range in the weights buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlacedWeight {
    /// Index among the bindings.
    pub binding: usize,
    pub part: BufferRange,
}

/// Offsets and sizes of everything the executor allocates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MemoryLayout {
    pub slots: usize,
    pub weights: Vec<PlacedWeight>,
    pub weights_bytes: u64,
    /// Range of a layer's keys or values, all slots.
    pub caches: BTreeMap<(usize, CacheHalf), BufferRange>,
    /// Bytes of one slot of one layer's keys or values.
    pub slot_bytes: BTreeMap<(usize, CacheHalf), u64>,
    pub cache_bytes: u64,
    pub inputs: InputRanges,
    pub inputs_bytes: u64,
    pub outputs: OutputRanges,
    pub outputs_bytes: u64,
    pub scratch_bytes: u64,
}

/// Half of a layer's KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum CacheHalf {
    Keys,
    Values,
}

/// Layer and half of the cache that a binding reads or writes.
pub(super) fn cache_of(role: BindingRole) -> Option<(usize, CacheHalf)> {
    match role {
        BindingRole::KeyCache(layer) | BindingRole::UpdatedKeys(layer) => Some((layer, CacheHalf::Keys)),
        BindingRole::ValueCache(layer) | BindingRole::UpdatedValues(layer) => Some((layer, CacheHalf::Values)),
        BindingRole::Weight
        | BindingRole::TokenIds
        | BindingRole::Positions
        | BindingRole::PastTokens
        | BindingRole::TotalTokens
        | BindingRole::AttentionMask
        | BindingRole::LogitsRows
        | BindingRole::Logits
        | BindingRole::TopLogits
        | BindingRole::TopIds => None,
    }
}

/// Ranges of a run's inputs, sized for the largest run. What comes from the host is at the start, in one piece.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct InputRanges {
    pub token_ids: BufferRange,
    pub positions: BufferRange,
    pub past_tokens: BufferRange,
    pub total_tokens: BufferRange,
    pub logits_rows: BufferRange,
    /// `bool[B, 1, T, S]`
    pub mask: BufferRange,
    /// `bool[T, T]` for the largest T of a prefill run, true on and below the diagonal; written when the plan is opened.
    pub triangle: BufferRange,
    /// Bytes that a decode run copies from the host: integers, and the mask of its rows.
    pub host_bytes: u64,
}

/// Ranges of a step's outputs. Row numbers start with the decode runs' rows; the prefill runs' rows follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OutputRanges {
    /// Number of decode rows.
    pub decode_rows: usize,
    /// Top-k columns.
    pub k: usize,
    pub vocab_size: usize,
    /// Top-k logits of decode rows, their ids, and the same for prefill rows: contiguous, so one copy fetches them all.
    pub tops: [BufferRange; 4],
    pub logits: BufferRange,
}

impl OutputRanges {
    /// Byte offsets of a row's top-k logits and of their ids.
    pub(super) fn top(&self, row: usize) -> [u64; 2] {
        let row_bytes = 4 * self.k as u64;
        let (first, row) = if row < self.decode_rows { (0, row) } else { (2, row - self.decode_rows) };
        [self.tops[first].offset + row as u64 * row_bytes, self.tops[first + 1].offset + row as u64 * row_bytes]
    }

    /// Range of a row's full logits.
    pub(super) fn row(&self, row: usize) -> BufferRange {
        let bytes = 4 * self.vocab_size as u64;
        BufferRange { offset: self.logits.offset + row as u64 * bytes, bytes }
    }

    /// Byte range of the top-k outputs written by a step with decode rows, prefill rows, or both.
    pub(super) fn written(&self, decode: bool, prefill: bool) -> std::ops::Range<usize> {
        let start = if decode { self.tops[0].offset } else { self.tops[2].offset };
        let last = if prefill { self.tops[3] } else { self.tops[1] };
        start as usize..(last.offset + last.bytes) as usize
    }
}

/// Bump allocator for one buffer.
#[derive(Default)]
struct Cursor(u64);

impl Cursor {
    fn take(&mut self, bytes: u64) -> Option<BufferRange> {
        let offset = self.0;
        self.0 = offset.checked_add(bytes)?.checked_next_multiple_of(ALIGN)?;
        Some(BufferRange { offset, bytes })
    }
}

/// Bytes of a binding in a step of these sizes; `None` on overflow.
pub(super) fn bytes_of(binding: &Binding, [b, t, r]: [usize; 3]) -> Option<u64> {
    let elements = binding.shape.iter().try_fold(1u64, |product, extent| {
        let n = match extent {
            Extent::Fixed(n) => *n,
            Extent::Step(StepSize::B) => b,
            Extent::Step(StepSize::T) => t,
            Extent::Step(StepSize::R) => r,
        };
        product.checked_mul(n as u64)
    })?;
    match binding.dtype {
        DType::I4 => Some(elements.div_ceil(2)),
        other => elements.checked_mul(other.bytes() as u64),
    }
}

/// Number of which a run's first output row must be a multiple for all its outputs to be aligned.
pub(super) fn row_align(vocab_size: usize, k: usize) -> usize {
    // Both are powers of two, so the larger is a multiple of the smaller and satisfies both.
    let for_row = |columns: usize| {
        let bytes = 4 * columns as u64;
        (ALIGN >> bytes.trailing_zeros().min(ALIGN.trailing_zeros())) as usize
    };
    for_row(vocab_size).max(for_row(k))
}

impl MemoryLayout {
    /// Plans the memory for the slots in `constraints`.
    ///
    /// # Errors
    /// The inconsistency in the plan's bindings.
    pub(super) fn new(
        info: &TensorRtInfo,
        constraints: &BatchingConstraints,
        scratch_bytes: u64,
    ) -> Result<MemoryLayout, String> {
        let too_large = || "its sizes exceed the memory of any GPU".to_owned();
        let slots = constraints.limits.slots;
        let mut weights = Vec::new();
        let mut of_weights = Cursor::default();
        let (mut caches, mut slot_bytes) = (BTreeMap::new(), BTreeMap::new());
        let mut of_cache = Cursor::default();
        let (mut k, mut vocab_size) = (None, None);
        for (index, binding) in info.bindings.iter().enumerate() {
            let columns = match binding.shape.last() {
                Some(Extent::Fixed(n)) if *n > 0 => Some(*n),
                _ => None,
            };
            match binding.role {
                BindingRole::Weight => {
                    let bytes = bytes_of(binding, [1; 3]).ok_or_else(too_large)?;
                    let part = of_weights.take(bytes).ok_or_else(too_large)?;
                    weights.push(PlacedWeight { binding: index, part });
                }
                BindingRole::KeyCache(_) | BindingRole::ValueCache(_) => {
                    let cache = cache_of(binding.role).ok_or_else(|| format!("{binding} is a cache of no layer"))?;
                    let one = bytes_of(binding, [1; 3]).ok_or_else(too_large)?;
                    if !one.is_multiple_of(ALIGN) {
                        return Err(format!("a slot of {binding} has {one} bytes, not a multiple of {ALIGN}"));
                    }
                    let all = one.checked_mul(slots as u64).ok_or_else(too_large)?;
                    caches.insert(cache, of_cache.take(all).ok_or_else(too_large)?);
                    slot_bytes.insert(cache, one);
                }
                BindingRole::Logits => vocab_size = columns,
                BindingRole::TopLogits => k = columns,
                // Inputs and outputs are sized by the step, below; updated caches alias the caches.
                BindingRole::TokenIds
                | BindingRole::Positions
                | BindingRole::PastTokens
                | BindingRole::TotalTokens
                | BindingRole::AttentionMask
                | BindingRole::LogitsRows
                | BindingRole::UpdatedKeys(_)
                | BindingRole::UpdatedValues(_)
                | BindingRole::TopIds => {}
            }
        }
        let vocab_size = vocab_size.filter(|n| *n == constraints.limits.vocab_size);
        let vocab_size = vocab_size.ok_or("its logits are not as wide as the vocabulary")?;
        let k = k.ok_or("it has no output of the largest logits")?;

        let sizes = &constraints.sizes;
        let most_sequences = sizes.decode_sequences.max(sizes.prefill_sequences) as u64;
        let most_tokens = (sizes.prefill_sequences * sizes.prefill_tokens).max(sizes.decode_sequences) as u64;
        let most_rows = sizes.prefill_logits_rows.max(sizes.decode_sequences) as u64;
        let mut of_inputs = Cursor::default();
        let mut integers = |count: u64| of_inputs.take(4 * count).ok_or_else(too_large);
        let mut inputs = InputRanges {
            token_ids: integers(most_tokens)?,
            positions: integers(most_tokens)?,
            past_tokens: integers(most_sequences)?,
            total_tokens: integers(most_sequences)?,
            logits_rows: integers(most_rows)?,
            ..InputRanges::default()
        };
        if info.bindings.iter().any(|binding| binding.role == BindingRole::AttentionMask) {
            let area = |rows: usize, columns: usize| (rows as u64).checked_mul(columns as u64).ok_or_else(too_large);
            let decode = area(sizes.decode_sequences, sizes.max_sequence_tokens)?;
            let prefill = area(sizes.prefill_sequences * sizes.prefill_tokens, sizes.max_sequence_tokens)?;
            inputs.mask = of_inputs.take(decode.max(prefill)).ok_or_else(too_large)?;
            inputs.host_bytes = inputs.mask.offset + decode;
            let triangle = area(sizes.prefill_tokens, sizes.prefill_tokens)?;
            inputs.triangle = of_inputs.take(triangle).ok_or_else(too_large)?;
        } else {
            inputs.host_bytes = of_inputs.0;
        }

        let (decode_rows, prefill_rows) = (constraints.decode_rows(), constraints.prefill_rows());
        let mut of_outputs = Cursor::default();
        let mut floats = |rows: usize, columns: usize| {
            let bytes = (rows as u64).checked_mul(columns as u64).and_then(|n| n.checked_mul(4));
            bytes.and_then(|bytes| of_outputs.take(bytes)).ok_or_else(too_large)
        };
        let outputs = OutputRanges {
            decode_rows,
            k,
            vocab_size,
            tops: [
                floats(decode_rows, k)?,
                floats(decode_rows, k)?,
                floats(prefill_rows, k)?,
                floats(prefill_rows, k)?,
            ],
            logits: floats(decode_rows + prefill_rows, vocab_size)?,
        };
        Ok(MemoryLayout {
            slots,
            weights,
            weights_bytes: of_weights.0,
            caches,
            slot_bytes,
            cache_bytes: of_cache.0,
            inputs,
            inputs_bytes: of_inputs.0,
            outputs,
            outputs_bytes: of_outputs.0,
            scratch_bytes,
        })
    }

    fn total_bytes(&self) -> u64 {
        [self.weights_bytes, self.cache_bytes, self.inputs_bytes, self.outputs_bytes, self.scratch_bytes]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// Inputs to the choice of the number of slots.
#[derive(Debug, Clone, Copy)]
pub(super) struct MemoryBudget<'a> {
    /// Total memory of the GPU.
    pub device_bytes: u64,
    /// Free memory of the GPU.
    pub free_bytes: u64,
    /// [`TensorRtInfo::kv_cache_gib`].
    pub kv_cache_gib: &'a BTreeMap<u32, u32>,
    /// Requested slots.
    pub asked: Option<usize>,
}

/// KV-cache budget of the recipe for a GPU of this size: the entry for the largest listed memory that the GPU has, with
/// 5 % tolerance, because a GPU sold as 80 GB may have a little less. `None` if every entry is larger.
fn kv_budget_bytes(kv_cache_gib: &BTreeMap<u32, u32>, device_bytes: u64) -> Option<u64> {
    let fits = |gigabytes: u32| u64::from(gigabytes) * 950_000_000 <= device_bytes;
    let (_, gib) = kv_cache_gib.iter().rev().find(|(gigabytes, _)| fits(**gigabytes))?;
    Some(u64::from(*gib) << 30)
}

/// Finds the layout with the most slots that the plan, the memory and the request allow (without a request, also within
/// the recipe's KV-cache budget), and describes it for the user. `constraints` comes with the plan's slots and is
/// updated to the layout's.
///
/// # Errors
/// The memory sizes and remedies, if not even one slot fits.
pub(super) fn fit(
    info: &TensorRtInfo,
    constraints: &mut BatchingConstraints,
    scratch_bytes: u64,
    machine: &MemoryBudget<'_>,
) -> Result<(MemoryLayout, String), String> {
    let of_plan = constraints.limits.slots.min(info.sizes.decode_sequences);
    let most = machine.asked.unwrap_or(of_plan).min(of_plan).max(1);
    let budget = kv_budget_bytes(machine.kv_cache_gib, machine.device_bytes).unwrap_or(u64::MAX);
    let usable = machine.free_bytes.saturating_sub(RESERVE_BYTES);
    let mut slots = most;
    loop {
        constraints.limits.slots = slots;
        let layout = MemoryLayout::new(info, constraints, scratch_bytes)?;
        let total = layout.total_bytes();
        let within_budget = layout.cache_bytes <= budget || slots == 1 || machine.asked.is_some();
        if within_budget && total <= usable {
            let mut words = sum(&layout, constraints, machine);
            if machine.asked.is_some_and(|asked| asked > slots) {
                words += &format!("; {slots} sequences instead of {}, for lack of memory", machine.asked.unwrap_or(0));
            }
            return Ok((layout, words));
        }
        if slots == 1 {
            return Err(format!(
                "not even one sequence fits: {}, of which {} stay reserved for the driver and kernels. Stop other \
                 programs on the GPU, build for shorter sequences (--max-sequence-tokens) or with smaller weights \
                 (--precision int8), or use a GPU with more memory",
                sum(&layout, constraints, machine),
                gigabytes(RESERVE_BYTES)
            ));
        }
        slots -= 1;
    }
}

/// "weights 17.1 GB + KV cache 16.0 GiB (8 sequences of 4096 tokens, 512 KiB a token) + … = 36.9 GB of 39.4 GB free".
fn sum(layout: &MemoryLayout, constraints: &BatchingConstraints, machine: &MemoryBudget<'_>) -> String {
    let tokens = constraints.limits.max_sequence_tokens;
    let a_token = layout.slot_bytes.values().sum::<u64>() / tokens.max(1) as u64;
    let rest = layout.inputs_bytes + layout.outputs_bytes + layout.scratch_bytes;
    format!(
        "weights {} + KV cache {} ({} sequence{} of {tokens} tokens, {} a token) + logits and scratch {} = {} of {} free",
        gigabytes(layout.weights_bytes),
        gibibytes(layout.cache_bytes),
        layout.slots,
        if layout.slots == 1 { "" } else { "s" },
        kibibytes(a_token),
        gigabytes(rest),
        gigabytes(layout.total_bytes()),
        gigabytes(machine.free_bytes),
    )
}

fn gigabytes(bytes: u64) -> String {
    if bytes < 100_000_000 { format!("{:.1} MB", bytes as f64 / 1e6) } else { format!("{:.1} GB", bytes as f64 / 1e9) }
}

fn gibibytes(bytes: u64) -> String {
    if bytes < 100 << 20 {
        format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
    } else {
        format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
    }
}

fn kibibytes(bytes: u64) -> String {
    if bytes.is_multiple_of(1024) { format!("{} KiB", bytes >> 10) } else { format!("{bytes} bytes") }
}

#[cfg(test)]
pub(super) mod tests;
