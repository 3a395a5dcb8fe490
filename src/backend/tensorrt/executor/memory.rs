//! Layout of the executor's GPU memory, planned before any of it is allocated.
//!
//! | buffer | holds |
//! | --- | --- |
//! | weights | every [`BindingRole::Weight`], in order of the bindings |
//! | cache | keys and values of every layer, each a region that the capacity classes share ([`super::placement`]), and two spare rows |
//! | inputs | token ids, positions, lengths or mask, and logits rows of one run |
//! | outputs | top-k logits, their ids and sums of logits for decode and prefill rows, then all logits, `f32[rows, vocab]` |
//! | scratch | TensorRT's intermediate values; all contexts share it, since their runs do not overlap |

use std::collections::BTreeMap;

use super::placement::{DecodeBytes, Region};
use super::schedule::BatchingConstraints;
use crate::backend::tensorrt::device::ALIGN;
use crate::engine::tensorrt::{Binding, BindingRole, Extent, Sizes, StepSize, TensorRtInfo};
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
    pub region: Region,
    pub weights: Vec<PlacedWeight>,
    pub weights_bytes: u64,
    /// Each layer's keys or values.
    pub caches: BTreeMap<(usize, CacheHalf), CacheRegion>,
    /// Two rows of the largest class, for copies.
    pub spare_rows: [BufferRange; 2],
    pub cache_bytes: u64,
    pub inputs: InputRanges,
    pub inputs_bytes: u64,
    pub outputs: OutputRanges,
    pub outputs_bytes: u64,
    pub scratch_bytes: u64,
}

/// A layer's keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CacheRegion {
    pub part: BufferRange,
    pub kv_heads: u64,
    /// Bytes of a token of one head.
    pub head_bytes: u64,
}

impl CacheRegion {
    /// Bytes of a token, all heads.
    pub(super) fn token_bytes(&self) -> u64 {
        self.kv_heads * self.head_bytes
    }
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
        | BindingRole::TopIds
        | BindingRole::LogitSums => None,
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
    /// Columns of the sums.
    pub sums: usize,
    pub vocab_size: usize,
    /// Top-k logits of decode rows, their ids and the sums of logits, and the same for prefill rows: contiguous, so one copy
    /// fetches them all.
    pub tops: [BufferRange; 6],
    pub logits: BufferRange,
}

impl OutputRanges {
    /// Byte ranges of a row's top-k logits, of their ids, and of its sums.
    pub(super) fn top(&self, row: usize) -> [BufferRange; 3] {
        let (first, row) = if row < self.decode_rows { (0, row) } else { (3, row - self.decode_rows) };
        let columns = [self.k, self.k, self.sums];
        std::array::from_fn(|part| {
            let bytes = 4 * columns[part] as u64;
            BufferRange { offset: self.tops[first + part].offset + row as u64 * bytes, bytes }
        })
    }

    /// Range of a row's full logits.
    pub(super) fn row(&self, row: usize) -> BufferRange {
        let bytes = 4 * self.vocab_size as u64;
        BufferRange { offset: self.logits.offset + row as u64 * bytes, bytes }
    }

    /// Byte range of the top-k outputs written by a step with decode rows, prefill rows, or both.
    pub(super) fn written(&self, decode: bool, prefill: bool) -> std::ops::Range<usize> {
        let start = if decode { self.tops[0].offset } else { self.tops[3].offset };
        let last = if prefill { self.tops[5] } else { self.tops[2] };
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

/// Number of which a run's first output row must be a multiple for all its outputs, which have so many columns, to
/// be aligned.
pub(super) fn row_align(columns: [usize; 3]) -> usize {
    // All are powers of two, so the largest is a multiple of the others and satisfies them too.
    let for_row = |columns: usize| {
        let bytes = 4 * columns as u64;
        (ALIGN >> bytes.trailing_zeros().min(ALIGN.trailing_zeros())) as usize
    };
    columns.map(for_row).into_iter().fold(1, usize::max)
}

impl MemoryLayout {
    /// Plans the memory for the slots in `constraints` and a cache of so many tokens.
    ///
    /// # Errors
    /// The inconsistency in the plan's bindings.
    pub(super) fn new(
        info: &TensorRtInfo,
        constraints: &BatchingConstraints,
        cache_tokens: usize,
        scratch_bytes: u64,
    ) -> Result<MemoryLayout, String> {
        let too_large = || "its sizes exceed the memory of any GPU".to_owned();
        let classes = || constraints.classes.iter().map(|class| &class.sizes);
        let mut weights = Vec::new();
        let mut of_weights = Cursor::default();
        let mut caches = BTreeMap::new();
        let mut of_cache = Cursor::default();
        let (mut k, mut sums, mut vocab_size) = (None, None, None);
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
                    let &[_, Extent::Fixed(kv_heads), _, Extent::Fixed(head_dim)] = &binding.shape[..] else {
                        return Err(format!("{binding} is not a cache"));
                    };
                    let head_bytes =
                        (head_dim as u64).checked_mul(binding.dtype.bytes() as u64).ok_or_else(too_large)?;
                    let token_bytes = head_bytes.checked_mul(kv_heads as u64).ok_or_else(too_large)?;
                    for capacity in classes().map(|sizes| sizes.max_sequence_tokens) {
                        let one = token_bytes.checked_mul(capacity as u64).ok_or_else(too_large)?;
                        if one == 0 || !one.is_multiple_of(ALIGN) {
                            return Err(format!(
                                "{capacity} tokens of {binding} have {one} bytes, not a multiple of {ALIGN}"
                            ));
                        }
                    }
                    let all = token_bytes.checked_mul(cache_tokens as u64).ok_or_else(too_large)?;
                    let part = of_cache.take(all).ok_or_else(too_large)?;
                    caches.insert(cache, CacheRegion { part, kv_heads: kv_heads as u64, head_bytes });
                }
                BindingRole::Logits => vocab_size = columns,
                BindingRole::TopLogits => k = columns,
                BindingRole::LogitSums => sums = columns,
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
        let spare = caches.values().map(CacheRegion::token_bytes).max().unwrap_or(0);
        let spare = spare.checked_mul(constraints.limits.max_sequence_tokens as u64).ok_or_else(too_large)?;
        let mut spare_row = || of_cache.take(spare).ok_or_else(too_large);
        let spare_rows = [spare_row()?, spare_row()?];
        let vocab_size = vocab_size.filter(|n| *n == constraints.limits.vocab_size);
        let vocab_size = vocab_size.ok_or("its logits are not as wide as the vocabulary")?;
        let k = k.ok_or("it has no output of the largest logits")?;
        let sums = sums.ok_or("it has no output of the sums of logits")?;

        let most = |of: fn(&Sizes) -> usize| classes().map(of).max().unwrap_or(0);
        let most_sequences = most(|sizes| sizes.decode_sequences.max(sizes.prefill_sequences)) as u64;
        let most_tokens =
            most(|sizes| (sizes.prefill_sequences * sizes.prefill_tokens).max(sizes.decode_sequences)) as u64;
        let most_rows = most(|sizes| sizes.prefill_logits_rows.max(sizes.decode_sequences)) as u64;
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
        inputs.host_bytes = of_inputs.0;
        if info.bindings.iter().any(|binding| binding.role == BindingRole::AttentionMask) {
            // Sizes are at most i32::MAX each, so neither product overflows.
            let area = |rows: usize, columns: usize| rows as u64 * columns as u64;
            let decode = classes().map(|sizes| area(sizes.decode_sequences, sizes.max_sequence_tokens)).max();
            let prefill = classes().map(|sizes| {
                area(sizes.prefill_sequences, sizes.prefill_tokens).checked_mul(sizes.max_sequence_tokens as u64)
            });
            let (decode, prefill) = (decode.unwrap_or(0), prefill.max().flatten().ok_or_else(too_large)?);
            inputs.mask = of_inputs.take(decode.max(prefill)).ok_or_else(too_large)?;
            inputs.host_bytes = inputs.mask.offset + decode;
            let side = most(|sizes| sizes.prefill_tokens);
            inputs.triangle = of_inputs.take(area(side, side)).ok_or_else(too_large)?;
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
            sums,
            vocab_size,
            tops: [
                floats(decode_rows, k)?,
                floats(decode_rows, k)?,
                floats(decode_rows, sums)?,
                floats(prefill_rows, k)?,
                floats(prefill_rows, k)?,
                floats(prefill_rows, sums)?,
            ],
            logits: floats(decode_rows + prefill_rows, vocab_size)?,
        };
        let region = Region {
            capacities: classes().map(|sizes| sizes.max_sequence_tokens).collect(),
            most_rows: classes().map(|sizes| sizes.decode_sequences).collect(),
            tokens: cache_tokens,
            most_rows_in_all: constraints.rows,
            slots: constraints.limits.slots,
            decode_bytes: DecodeBytes {
                // The embedding, of which a step reads rows alone, is part of the sum.
                weights: of_weights.0,
                token: caches.values().map(CacheRegion::token_bytes).sum(),
            },
        };
        Ok(MemoryLayout {
            region,
            weights,
            weights_bytes: of_weights.0,
            caches,
            spare_rows,
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

/// Most tokens of cache for which every class has a row for each sequence that its size leaves room for, and of which
/// every slot has a row of the largest class.
fn most_cache_tokens(constraints: &BatchingConstraints) -> usize {
    let slots = constraints.limits.slots;
    let sizes = || constraints.classes.iter().map(|class| &class.sizes);
    let is_short = |sizes: &&Sizes| sizes.decode_sequences < slots;
    let of = |sizes: &Sizes| (sizes.decode_sequences + 1).saturating_mul(sizes.max_sequence_tokens) - 1;
    let largest = sizes().map(|sizes| sizes.max_sequence_tokens).max().unwrap_or(0);
    sizes().filter(is_short).map(of).fold(slots.saturating_mul(largest), usize::min)
}

/// Finds the layout with the largest KV cache that the plan, the memory and the request allow (without a request, also
/// within the recipe's KV-cache budget), and describes it for the user. `constraints` comes with the plan's slots and is
/// updated to the layout's.
///
/// # Errors
/// The memory sizes and remedies, if not even one sequence of the largest class fits.
pub(super) fn fit(
    info: &TensorRtInfo,
    constraints: &mut BatchingConstraints,
    scratch_bytes: u64,
    machine: &MemoryBudget<'_>,
) -> Result<(MemoryLayout, String), String> {
    let capacities = constraints.classes.iter().map(|class| class.sizes.max_sequence_tokens);
    let (Some(smallest), Some(largest)) = (capacities.clone().min(), capacities.max()) else {
        return Err("it has no capacity class".into());
    };
    let of_plan = constraints.limits.slots;
    let asked = machine.asked.map(|asked| asked.clamp(1, of_plan));
    let token_bytes = info.kv_bytes_per_token().max(1) as u64;
    let budget = kv_budget_bytes(machine.kv_cache_gib, machine.device_bytes).unwrap_or(u64::MAX) / token_bytes;
    let budget = usize::try_from(budget).unwrap_or(usize::MAX);
    let usable = machine.free_bytes.saturating_sub(RESERVE_BYTES);
    let most = most_cache_tokens(constraints);
    let wanted = asked.map_or(budget, |asked| asked.saturating_mul(largest)).min(most).max(largest);
    // Whole rows of the largest class as long as there are any, so that they are what is left.
    let mut tokens = wanted - wanted % if wanted % largest < smallest { largest } else { smallest };
    loop {
        let slots = asked.unwrap_or(of_plan).min((tokens / smallest).max(1)).min(of_plan);
        constraints.limits.slots = slots;
        // Rows that are not in use cost output rows, so a few sequences get no more than twice their number.
        constraints.rows = (tokens / smallest).min(2 * slots).max(slots);
        let layout = MemoryLayout::new(info, constraints, tokens, scratch_bytes)?;
        let total = layout.total_bytes();
        if total <= usable {
            let mut words = sum(&layout, machine);
            if let Some(asked) = machine.asked.filter(|_| tokens < wanted) {
                let found = tokens / largest;
                words += &format!("; {found} sequences instead of {asked}, for lack of memory");
            }
            return Ok((layout, words));
        }
        if tokens <= largest {
            return Err(format!(
                "not even one sequence fits: {}, of which {} stay reserved for the driver and kernels. Stop other \
                 programs on the GPU, build for shorter sequences (--max-sequence-tokens) or with smaller weights \
                 (--precision int8), or use a GPU with more memory",
                sum(&layout, machine),
                gigabytes(RESERVE_BYTES)
            ));
        }
        let excess = usize::try_from((total - usable) / token_bytes).unwrap_or(usize::MAX);
        let fewer = tokens.saturating_sub(excess.max(1));
        tokens = (fewer - fewer % smallest).max(largest);
    }
}

/// "weights 17.1 GB + KV cache 16.0 GiB (8 sequences of 4096 tokens or 128 of 256, 512 KiB a token) + … = 36.9 GB of
/// 39.4 GB free".
fn sum(layout: &MemoryLayout, machine: &MemoryBudget<'_>) -> String {
    let a_token: u64 = layout.caches.values().map(CacheRegion::token_bytes).sum();
    let rest = layout.inputs_bytes + layout.outputs_bytes + layout.scratch_bytes;
    let Region { capacities, most_rows, tokens, slots, .. } = &layout.region;
    let rows = |class: usize| (tokens / capacities[class]).min(most_rows[class]).min(*slots);
    let largest = capacities.len() - 1;
    let plural = if rows(largest) == 1 { "" } else { "s" };
    let mut sequences = format!("{} sequence{plural} of {} tokens", rows(largest), capacities[largest]);
    if largest > 0 && rows(0) > rows(largest) {
        sequences += &format!(" or {} of {}", rows(0), capacities[0]);
    }
    format!(
        "weights {} + KV cache {} ({sequences}, {} a token) + logits and scratch {} = {} of {} free",
        gigabytes(layout.weights_bytes),
        gibibytes(layout.cache_bytes),
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
