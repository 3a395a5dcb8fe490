//! Causal attention over the cache, one query row and head at a time, in blocks of keys with a running softmax
//! (Milakov & Gimelshein, "Online normalizer calculation for softmax"; Dao et al., "FlashAttention").
//!
//! Blocks start at multiples of [`KEY_BLOCK`] in the sequence, never at a chunk's edge, so a token's result is the
//! same however its prompt was cut.

use super::{Element, kernel, mul_add};

/// Keys per block: 128 × 128 BF16 keys are 32 KiB.
pub const KEY_BLOCK: usize = 128;
/// Head widths are padded to this many elements in the cache, with zeros.
pub const HEAD_ALIGN: usize = 16;
/// Widest head, in elements.
pub const MAX_HEAD_DIM: usize = 512;

kernel! {
    /// One head of one query row.
    ///
    /// `q` is `[head_dim]`, not yet scaled; `keys` and `values` are `[capacity, padded_dim]` of one slot and head, of
    /// which the first `len >= 1` positions are attended to; `out` is `[head_dim]`.
    ///
    /// # Panics
    /// If `head_dim > MAX_HEAD_DIM` or the caches are shorter than `len`; plans and steps are checked before they run.
    pub fn attend[C: Element, O: Element](
        q: &[f32], keys: &[C], values: &[C], padded_dim: usize, len: usize, scale: f32, out: &mut [O],
    ) = attend_body
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn attend_body<C: Element, O: Element, const FMA: bool>(
    q: &[f32],
    keys: &[C],
    values: &[C],
    padded_dim: usize,
    len: usize,
    scale: f32,
    out: &mut [O],
) {
    let mut scaled = [0f32; MAX_HEAD_DIM];
    for (s, q) in scaled.iter_mut().zip(q) {
        *s = q * scale;
    }
    let q = &scaled[..padded_dim];
    let mut sums = [0f32; MAX_HEAD_DIM];
    let sums = &mut sums[..padded_dim];
    let (mut peak, mut total) = (f32::NEG_INFINITY, 0f32);
    let mut start = 0;
    while start < len {
        let count = KEY_BLOCK.min(len - start);
        let mut weights = [0f32; KEY_BLOCK];
        let weights = &mut weights[..count];
        let block = start * padded_dim..(start + count) * padded_dim;
        for (weight, key) in weights.iter_mut().zip(keys[block.clone()].chunks_exact(padded_dim)) {
            *weight = dot::<C, FMA>(q, key);
        }
        let block_peak = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let new_peak = peak.max(block_peak);
        let shrink = (peak - new_peak).exp(); // 0 for the first block
        total *= shrink;
        sums.iter_mut().for_each(|s| *s *= shrink);
        for weight in weights.iter_mut() {
            *weight = (*weight - new_peak).exp();
            total += *weight;
        }
        add_values::<C, FMA>(sums, weights, &values[block], padded_dim);
        peak = new_peak;
        start += count;
    }
    let norm = 1.0 / total;
    for (out, sum) in out.iter_mut().zip(sums.iter()) {
        *out = O::from_f32(sum * norm);
    }
}

/// `q · key` in 16 partial sums; both are padded with zeros to a multiple of 16.
#[inline(always)]
fn dot<C: Element, const FMA: bool>(q: &[f32], key: &[C]) -> f32 {
    let mut lanes = [0f32; HEAD_ALIGN];
    for (q, key) in q.as_chunks::<HEAD_ALIGN>().0.iter().zip(key.as_chunks::<HEAD_ALIGN>().0) {
        for i in 0..HEAD_ALIGN {
            lanes[i] = mul_add::<FMA>(q[i], key[i].to_f32(), lanes[i]);
        }
    }
    // A tree of halves, the same on every machine.
    let mut width = HEAD_ALIGN / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `sums += Σ weights[j] · values[j]`, keys in order.
#[inline(always)]
fn add_values<C: Element, const FMA: bool>(sums: &mut [f32], weights: &[f32], values: &[C], padded_dim: usize) {
    let mut column = 0;
    for lanes in sums.as_chunks_mut::<HEAD_ALIGN>().0 {
        let mut acc = *lanes;
        for (weight, value) in weights.iter().zip(values.chunks_exact(padded_dim)) {
            if let Some(value) = value[column..].first_chunk::<HEAD_ALIGN>() {
                for i in 0..HEAD_ALIGN {
                    acc[i] = mul_add::<FMA>(*weight, value[i].to_f32(), acc[i]);
                }
            }
        }
        *lanes = acc;
        column += HEAD_ALIGN;
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;

    #[test]
    fn matches_softmax_in_f64() {
        let mut seed = 1u32;
        let mut random = move || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / (1 << 22) as f32 - 2.0
        };
        for (head_dim, len) in [(6, 1), (16, 5), (40, 128), (128, 129), (20, 300)] {
            let padded = usize::next_multiple_of(head_dim, HEAD_ALIGN);
            let q: Vec<f32> = (0..head_dim).map(|_| random()).collect();
            let mut cache = || {
                let mut cache = vec![f32::NAN; (len + 3) * padded]; // beyond len: poison
                for position in cache.chunks_mut(padded).take(len) {
                    position.fill(0.0);
                    position[..head_dim].fill_with(&mut random);
                }
                cache
            };
            let (keys, values) = (cache(), cache());
            let scores: Vec<f64> = (0..len)
                .map(|j| (0..head_dim).map(|d| q[d] as f64 * keys[j * padded + d] as f64).sum::<f64>() * 0.3)
                .collect();
            let peak = scores.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = scores.iter().map(|s| (s - peak).exp()).sum();
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; head_dim];
                attend(isa, &q, &keys, &values, padded, len, 0.3, &mut out);
                for d in 0..head_dim {
                    let expected: f64 =
                        (0..len).map(|j| (scores[j] - peak).exp() / total * values[j * padded + d] as f64).sum();
                    assert!((out[d] as f64 - expected).abs() < 1e-5, "{isa} {head_dim} {len}: {} {expected}", out[d]);
                }
            }
        }
    }
}
