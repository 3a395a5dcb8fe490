//! Causal attention over the cache, in blocks of keys with a running softmax (Milakov & Gimelshein, "Online normalizer
//! calculation for softmax"; Dao et al., "FlashAttention").
//!
//! **Cache.** One head of one slot holds `capacity` positions, a multiple of [`LANES`]; `padded_dim` is the head's
//! width rounded up to [`LANES`].
//! - keys `[capacity / LANES, padded_dim, LANES]`: one vector lane computes one key's dot product, so nothing is summed
//!   across lanes;
//! - values `[capacity, padded_dim]`.
//!
//! **Same bits.** Blocks start at multiples of [`KEY_BLOCK`] in the sequence, never at a chunk's edge, and a query's
//! sums run over dimensions, then keys, in order. Four queries share the loads of the blocks that all of them see
//! whole; the rest of its keys each query takes alone. Both ways compute a query's numbers in the same order.

use super::{FloatElement, mul_add};
use crate::isa::dispatch;

/// Keys per block.
pub const KEY_BLOCK: usize = 64;
/// Keys side by side in the cache, and the multiple that head widths are padded to.
pub const LANES: usize = 16;
/// Widest head, in elements.
pub const MAX_HEAD_DIM: usize = 512;
/// Query rows that share their loads.
pub const QUERY_GROUP: usize = 4;
const GROUPS: usize = KEY_BLOCK / LANES;

/// One head of one slot's cache.
#[derive(Debug, Clone, Copy)]
pub struct CachedHead<'a, C> {
    /// `[capacity / LANES, padded_dim, LANES]`
    pub keys: &'a [C],
    /// `[capacity, padded_dim]`
    pub values: &'a [C],
    /// Width of the head.
    pub head_dim: usize,
    /// Width of the head in the cache.
    pub padded_dim: usize,
}

dispatch! {
    /// One head of `rows` neighbouring query rows, at most [`QUERY_GROUP`].
    ///
    /// Row `m` is `q[m * q_stride..][..head_dim]`, not yet scaled; it attends to the first `len + m` positions,
    /// `len >= 1`, and its result is `out[m * out_stride..][..head_dim]`.
    ///
    /// # Panics
    /// If `head_dim > MAX_HEAD_DIM` or the cache is shorter than the positions; plans and steps are checked before
    /// they run.
    pub fn attend[C: FloatElement, O: FloatElement](
        rows: usize, q: &[f32], q_stride: usize, head: CachedHead<'_, C>, len: usize, scale: f32,
        out: &mut [O], out_stride: usize,
    ) {
        avx512 => attend_body::<C, O, true>,
        avx2 => attend_body::<C, O, true>,
        portable => attend_body::<C, O, false>,
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn attend_body<C: FloatElement, O: FloatElement, const FMA: bool>(
    rows: usize,
    q: &[f32],
    q_stride: usize,
    head: CachedHead<'_, C>,
    len: usize,
    scale: f32,
    out: &mut [O],
    out_stride: usize,
) {
    if rows == QUERY_GROUP {
        return attend_group::<C, O, FMA, QUERY_GROUP>(q, q_stride, head, len, scale, out, out_stride);
    }
    for m in 0..rows {
        let (q, out) = (&q[m * q_stride..], &mut out[m * out_stride..]);
        attend_group::<C, O, FMA, 1>(q, q_stride, head, len + m, scale, out, out_stride);
    }
}

/// Online-softmax state of one query: what it has accumulated over the keys seen so far.
#[derive(Clone, Copy)]
struct Query {
    q: [f32; MAX_HEAD_DIM],    // scaled
    sums: [f32; MAX_HEAD_DIM], // Σ exp(score − running_max) · value
    running_max: f32,          // largest score so far
    total: f32,                // Σ exp(score − running_max)
}

#[inline(always)]
fn attend_group<C: FloatElement, O: FloatElement, const FMA: bool, const M: usize>(
    q: &[f32],
    q_stride: usize,
    head: CachedHead<'_, C>,
    len: usize,
    scale: f32,
    out: &mut [O],
    out_stride: usize,
) {
    let start = Query { q: [0.0; MAX_HEAD_DIM], sums: [0.0; MAX_HEAD_DIM], running_max: f32::NEG_INFINITY, total: 0.0 };
    let mut queries = [start; M];
    for (m, query) in queries.iter_mut().enumerate() {
        for (scaled, q) in query.q.iter_mut().zip(&q[m * q_stride..][..head.head_dim]) {
            *scaled = q * scale;
        }
    }
    // Blocks that every query of the group sees whole are visited together; the rest, where the causal mask differs
    // from row to row, query by query. Both paths add up in the same order.
    let shared = len / KEY_BLOCK * KEY_BLOCK;
    for first in (0..shared).step_by(KEY_BLOCK) {
        visit_block::<C, FMA, M>(&mut queries, head, first, KEY_BLOCK);
    }
    for (m, query) in queries.iter_mut().enumerate() {
        let query = std::array::from_mut(query);
        for first in (shared..len + m).step_by(KEY_BLOCK) {
            visit_block::<C, FMA, 1>(query, head, first, KEY_BLOCK.min(len + m - first));
        }
    }
    for (m, query) in queries.iter().enumerate() {
        let norm = 1.0 / query.total;
        for (out, sum) in out[m * out_stride..][..head.head_dim].iter_mut().zip(&query.sums) {
            *out = O::from_f32(sum * norm);
        }
    }
}

/// Updates the queries' state with keys `first .. first + count`, a block or its beginning.
#[inline(always)]
fn visit_block<C: FloatElement, const FMA: bool, const M: usize>(
    queries: &mut [Query; M],
    head: CachedHead<'_, C>,
    first: usize,
    count: usize,
) {
    let mut weights = [[0f32; KEY_BLOCK]; M];
    let keys = &head.keys[first * head.padded_dim..];
    if count == KEY_BLOCK {
        score_keys::<C, FMA, M, GROUPS>(queries, keys, head, 0, &mut weights);
    } else {
        for group in 0..count.div_ceil(LANES) {
            score_keys::<C, FMA, M, 1>(queries, &keys[group * head.padded_dim * LANES..], head, group, &mut weights);
        }
    }
    for (query, weights) in queries.iter_mut().zip(&mut weights) {
        let weights = &mut weights[..count];
        let running_max = weights.iter().copied().fold(query.running_max, f32::max);
        // Rescale what was accumulated under the old maximum.
        let shrink = (query.running_max - running_max).exp(); // 0 for the first block
        query.running_max = running_max;
        query.total *= shrink;
        query.sums[..head.padded_dim].iter_mut().for_each(|s| *s *= shrink);
        for weight in weights.iter_mut() {
            *weight = (*weight - running_max).exp();
            query.total += *weight;
        }
    }
    let values = &head.values[first * head.padded_dim..][..count * head.padded_dim];
    let mut column = 0;
    while column < head.padded_dim {
        if M == 1 && column + 4 * LANES <= head.padded_dim {
            add_values::<C, FMA, M, 4>(queries, &weights, values, head.padded_dim, column);
            column += 4 * LANES;
        } else if column + 2 * LANES <= head.padded_dim {
            add_values::<C, FMA, M, 2>(queries, &weights, values, head.padded_dim, column);
            column += 2 * LANES;
        } else {
            add_values::<C, FMA, M, 1>(queries, &weights, values, head.padded_dim, column);
            column += LANES;
        }
    }
}

/// `weights[m][(group + g) · LANES + lane] = q[m] · key`, dimensions in order.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // plain indices keep the sums in registers
fn score_keys<C: FloatElement, const FMA: bool, const M: usize, const G: usize>(
    queries: &[Query; M],
    keys: &[C],
    head: CachedHead<'_, C>,
    group: usize,
    weights: &mut [[f32; KEY_BLOCK]; M],
) {
    let lanes = &keys.as_chunks::<LANES>().0[..G * head.padded_dim];
    let mut acc = [[[0f32; LANES]; G]; M];
    for d in 0..head.head_dim {
        for g in 0..G {
            let key = widen(&lanes[g * head.padded_dim + d]);
            for m in 0..M {
                acc[m][g] = add_scaled::<FMA>(acc[m][g], queries[m].q[d], key);
            }
        }
    }
    for m in 0..M {
        for g in 0..G {
            weights[m][(group + g) * LANES..][..LANES].copy_from_slice(&acc[m][g]);
        }
    }
}

/// `sums[m] += Σ weights[m][j] · values[j]` for `N` vectors of columns, keys in order.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // plain indices keep the sums in registers
fn add_values<C: FloatElement, const FMA: bool, const M: usize, const N: usize>(
    queries: &mut [Query; M],
    weights: &[[f32; KEY_BLOCK]; M],
    values: &[C],
    padded_dim: usize,
    column: usize,
) {
    let mut acc = [[[0f32; LANES]; N]; M];
    for m in 0..M {
        for n in 0..N {
            acc[m][n].copy_from_slice(&queries[m].sums[column + n * LANES..][..LANES]);
        }
    }
    for (j, value) in values.chunks_exact(padded_dim).enumerate() {
        let lanes = &value[column..].as_chunks::<LANES>().0[..N];
        for n in 0..N {
            let value = widen(&lanes[n]);
            for m in 0..M {
                acc[m][n] = add_scaled::<FMA>(acc[m][n], weights[m][j], value);
            }
        }
    }
    for m in 0..M {
        for n in 0..N {
            queries[m].sums[column + n * LANES..][..LANES].copy_from_slice(&acc[m][n]);
        }
    }
}

#[inline(always)]
fn widen<C: FloatElement>(lanes: &[C; LANES]) -> [f32; LANES] {
    let mut wide = [0f32; LANES];
    for i in 0..LANES {
        wide[i] = lanes[i].to_f32();
    }
    wide
}

/// `sums + scale · lanes`
#[inline(always)]
fn add_scaled<const FMA: bool>(mut sums: [f32; LANES], scale: f32, lanes: [f32; LANES]) -> [f32; LANES] {
    for i in 0..LANES {
        sums[i] = mul_add::<FMA>(scale, lanes[i], sums[i]);
    }
    sums
}

/// Writes one position's keys of one head, `[head_dim]`, to its place in `[capacity / LANES, padded_dim, LANES]`.
pub fn store_keys<T: FloatElement, C: FloatElement>(x: &[T], padded_dim: usize, position: usize, keys: &mut [C]) {
    let group = &mut keys[position / LANES * padded_dim * LANES..][..padded_dim * LANES];
    for (lanes, x) in group.as_chunks_mut::<LANES>().0.iter_mut().zip(x) {
        lanes[position % LANES] = C::from_f32(x.to_f32());
    }
}

/// Writes one position's values of one head, `[head_dim]`, to its place in `[capacity, padded_dim]`.
pub fn store_values<T: FloatElement, C: FloatElement>(x: &[T], padded_dim: usize, position: usize, values: &mut [C]) {
    for (out, x) in values[position * padded_dim..][..padded_dim].iter_mut().zip(x) {
        *out = C::from_f32(x.to_f32());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    struct Case {
        head_dim: usize,
        keys: Vec<f32>,   // [len, head_dim]
        values: Vec<f32>, // [len, head_dim]
        cache: [Vec<f32>; 2],
    }

    impl Case {
        /// Random keys and values; what no query may read is NaN.
        fn new(head_dim: usize, len: usize, random: &mut impl FnMut() -> f32) -> Case {
            let padded = head_dim.next_multiple_of(LANES);
            let capacity = (len + 3).next_multiple_of(LANES);
            let mut cache = [vec![f32::NAN; capacity * padded], vec![f32::NAN; capacity * padded]];
            let keys: Vec<f32> = (0..len * head_dim).map(|_| random()).collect();
            let values: Vec<f32> = (0..len * head_dim).map(|_| random()).collect();
            for position in 0..len {
                cache[1][position * padded..][..padded].fill(0.0); // the padding is read, and multiplied away
                store_keys(&keys[position * head_dim..][..head_dim], padded, position, &mut cache[0]);
                store_values(&values[position * head_dim..][..head_dim], padded, position, &mut cache[1]);
            }
            Case { head_dim, keys, values, cache }
        }

        fn head(&self) -> CachedHead<'_, f32> {
            let [keys, values] = &self.cache;
            CachedHead { keys, values, head_dim: self.head_dim, padded_dim: self.head_dim.next_multiple_of(LANES) }
        }

        /// Softmax attention in double precision.
        fn expected(&self, q: &[f32], len: usize, scale: f64) -> Vec<f64> {
            let dim = self.head_dim;
            let scores: Vec<f64> = (0..len)
                .map(|j| (0..dim).map(|d| q[d] as f64 * self.keys[j * dim + d] as f64).sum::<f64>() * scale)
                .collect();
            let peak = scores.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = scores.iter().map(|s| (s - peak).exp()).sum();
            let weight = |j: usize| (scores[j] - peak).exp() / total;
            (0..dim).map(|d| (0..len).map(|j| weight(j) * self.values[j * dim + d] as f64).sum()).collect()
        }
    }

    #[test]
    fn matches_softmax_in_f64_and_grouping_changes_no_bit() {
        let mut seed = 1u32;
        let mut random = move || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / (1 << 22) as f32 - 2.0
        };
        for (head_dim, len) in [(6, 1), (16, 5), (40, 64), (128, 129), (20, 300), (80, 61), (8, 127)] {
            let rows = QUERY_GROUP;
            let case = Case::new(head_dim, len + rows - 1, &mut random);
            let q: Vec<f32> = (0..rows * head_dim).map(|_| random()).collect();
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; rows * head_dim];
                attend(isa, rows, &q, head_dim, case.head(), len, 0.3, &mut out, head_dim);
                for m in 0..rows {
                    let (q, out) = (&q[m * head_dim..][..head_dim], &out[m * head_dim..][..head_dim]);
                    for (got, expected) in out.iter().zip(case.expected(q, len + m, 0.3)) {
                        assert!((*got as f64 - expected).abs() < 1e-5, "{isa} {head_dim} {len}+{m}: {got} {expected}");
                    }
                    let mut alone = vec![f32::NAN; head_dim];
                    attend(isa, 1, q, head_dim, case.head(), len + m, 0.3, &mut alone, head_dim);
                    assert_eq!(alone, out, "{isa} {head_dim} {len}+{m}: a query depends on its neighbours");
                }
            }
        }
    }
}
