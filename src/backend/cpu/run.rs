//! Runs the kernels of one step: locates each call's operands in the arena and calls the kernel.

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::executor::MappedWeights;
use super::kernels::attention::{self, QUERY_GROUP};
use super::kernels::linear::{Activations, LinearShape, PackedWeight, linear};
use super::kernels::rowwise::{self, RowsMut, Unary};
use super::kernels::{FloatElement, RowsRef};
use super::program::{
    BufferSpec, CacheSpec, Indices, KeysOrValues, Program, ProgramKernel, RowCount, Storage, Table, View,
};
use super::streamed::{EvaluatedWeights, LinearWeight};
use crate::backend::{Limits, Step};
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::tensor::DType;

/// Work (query rows × heads × positions) below which waking other threads for attention does not pay off.
const SERIAL_ATTENTION: usize = 1 << 10;

/// State of one running step. Every index and shape was checked by [`Program::validate`] and against the step.
pub(super) struct StepRun<'a> {
    pub step: &'a Step,
    pub positions: &'a [u32], // [tokens]
    pub slots: &'a [u32],     // [tokens]
    pub program: &'a Program,
    pub limits: &'a Limits,
    pub weights: WeightSource<'a>,
    pub arena: &'a mut [u8],
    pub cache: &'a mut [u8], // [layers, keys and values, slots, kv_heads, head_elements]
    pub isa: Isa,
}

/// Source of a program's weights.
#[derive(Clone, Copy)]
pub(super) enum WeightSource<'a> {
    /// The package's file.
    Mapped(&'a MappedWeights),
    /// The checkpoint, see [`super::streamed`].
    Evaluated(&'a EvaluatedWeights<'a>),
}

impl<'a> WeightSource<'a> {
    /// A weight that is a single row of FP32.
    fn vector(self, index: usize) -> Result<Cow<'a, [f32]>> {
        Ok(match self {
            WeightSource::Mapped(mapped) => Cow::Borrowed(mapped.data(index)),
            WeightSource::Evaluated(evaluated) => Cow::Owned(evaluated.rows(index, &[0])?),
        })
    }
}

/// Runs an expression with `$t` bound to the Rust type of a float's dtype.
macro_rules! with_float {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $t = f32;
                $body
            }
            DType::BF16 => {
                type $t = bf16;
                $body
            }
            other => return Err(Error::internal(format!("an operand in {other}"), "floats in a checked plan")),
        }
    };
}

impl StepRun<'_> {
    /// Runs one call.
    ///
    /// # Errors
    /// [`Error::Internal`] if the program is not the one that was validated.
    pub fn kernel(&mut self, kernel: &ProgramKernel) -> Result<()> {
        let isa = self.isa;
        let program = self.program;
        let weights = self.weights;
        match *kernel {
            ProgramKernel::Gather { indices, table, out } => {
                let indices = match indices {
                    Indices::TokenIds => self.step.tokens(),
                    Indices::Positions => self.positions,
                    Indices::LogitsRows => self.step.logits_rows(),
                };
                match table {
                    Table::Weight(w) => {
                        let width = program.weights[w].columns;
                        with_float!(program.weights[w].dtype, T => {
                            let ([], [out]) = self.buffers([], [out])?;
                            match weights {
                                WeightSource::Mapped(mapped) => {
                                    let table = RowsRef::new(mapped.data::<T>(w), width, width);
                                    rowwise::gather(table, indices, out.rows_mut());
                                }
                                WeightSource::Evaluated(evaluated) => {
                                    let rows = evaluated.rows(w, indices)?;
                                    let rows: Vec<T> = rows.into_iter().map(FloatElement::from_f32).collect();
                                    let in_order: Vec<u32> = (0..indices.len() as u32).collect();
                                    rowwise::gather(RowsRef::new(&rows, width, width), &in_order, out.rows_mut());
                                }
                            }
                        });
                    }
                    Table::View(x) => {
                        let ([x], [out]) = self.buffers([x], [out])?;
                        rowwise::gather(x.rows::<f32>(), indices, out.rows_mut());
                    }
                }
            }
            ProgramKernel::LayerNorm { x, gamma, beta, eps, out } => {
                let (gamma, beta) = (weights.vector(gamma)?, weights.vector(beta)?);
                let ([x], [out]) = self.buffers([x], [out])?;
                with_float!(out.spec.dtype, O => {
                    rowwise::layer_norm::<O>(isa, x.rows(), &gamma, &beta, eps, out.rows_mut());
                });
            }
            ProgramKernel::Linear { x, x_scales, weight, scales, group, epilogue, out } => {
                let ([x, x_scales], [out]) = self.buffers([x, x_scales.unwrap_or(x)], [out])?;
                let x = match x.spec.dtype {
                    DType::F32 => Activations::F32(x.rows()),
                    DType::BF16 => Activations::Bf16(x.rows()),
                    DType::I8 => Activations::I8 { codes: x.rows(), scales: x_scales.rows() },
                    other => return Err(Error::internal(format!("activations in {other}"), "floats or bytes")),
                };
                let mapped = match weights {
                    WeightSource::Mapped(mapped) => mapped,
                    WeightSource::Evaluated(evaluated) => {
                        let of = LinearWeight { weight, scales, group };
                        with_float!(out.spec.dtype, O => {
                            evaluated.linear(isa, x, of, epilogue, out.rows_mut::<O>())?;
                        });
                        return Ok(());
                    }
                };
                let spec = &program.weights[weight];
                let Storage::Packed { packing, .. } = spec.storage else {
                    return Err(Error::internal(format!("`{}` is stored by rows", spec.name), "a packed weight"));
                };
                let shape = LinearShape { outputs: spec.rows, inputs: spec.columns, group };
                let scales = scales.map_or(&[][..], |scales| mapped.data::<u8>(scales));
                let weight = PackedWeight::new(packing, mapped.data::<u8>(weight), scales, shape)?;
                with_float!(out.spec.dtype, O => linear(isa, x, weight, epilogue, out.rows_mut::<O>())?);
            }
            ProgramKernel::Quantize { x, scale, out, scales } => {
                let ([x], [codes, scales]) = self.buffers([x], [out, scales])?;
                let (codes, scales) = (codes.rows_mut(), scales.rows_mut());
                with_float!(x.spec.dtype, T => rowwise::quantize::<T>(isa, x.rows(), scale, codes, scales));
            }
            ProgramKernel::Rotary { x, cos, sin, head_dim, out } => {
                let ([x, cos, sin], [out]) = self.buffers([x, cos, sin], [out])?;
                rowwise::rotary::<f32>(isa, x.rows(), cos.rows(), sin.rows(), head_dim, out.rows_mut());
            }
            ProgramKernel::Store { x, layer, kind } => self.store(x, layer, kind)?,
            ProgramKernel::Attention { q, layer, scale, out } => {
                with_float!(program.cache.dtype, C => self.attention::<C>(q, layer, scale, out)?)
            }
            ProgramKernel::Convert { x, out } => self.unary(Unary::Convert, x, out)?,
            ProgramKernel::Relu2 { x, out } => self.unary(Unary::Relu2, x, out)?,
            ProgramKernel::FakeQuantizeF8 { x, scale, out } => self.unary(Unary::FakeQuantizeF8(scale), x, out)?,
            ProgramKernel::AddScalar { x, scalar, out } => self.unary(Unary::AddScalar(scalar), x, out)?,
            ProgramKernel::Add { x, y, out } => {
                let ([x, y], [out]) = self.buffers([x, y], [out])?;
                rowwise::add(x.rows(), y.rows(), out.rows_mut());
            }
        }
        Ok(())
    }

    fn unary(&mut self, op: Unary, x: View, out: usize) -> Result<()> {
        let ([x], [out]) = self.buffers([x], [out])?;
        with_float!(x.spec.dtype, T => with_float!(out.spec.dtype, O => {
            rowwise::unary::<T, O>(op, x.rows(), out.rows_mut());
        }));
        Ok(())
    }

    /// The columns of a buffer of floats, `[rows, width]`.
    pub fn values(&self, x: View) -> Result<Vec<f32>> {
        let rows = self.row_count(&self.program.buffers[x.buffer]);
        let mut values = Vec::with_capacity(rows * x.width);
        let x = source(self.arena, self.program, self.limits, x, 0);
        with_float!(x.spec.dtype, T => {
            let x = x.rows::<T>();
            (0..rows).for_each(|row| values.extend(x.row(row).iter().map(|value| value.to_f32())));
        });
        Ok(values)
    }

    fn store(&mut self, x: View, layer: usize, kind: KeysOrValues) -> Result<()> {
        let cache = &self.program.cache;
        let (head_dim, padded_dim, kv_heads) = (cache.head_dim, cache.padded_dim(), cache.kv_heads);
        let head_elements = head_elements(cache, self.limits)?;
        let bytes = cache_range(cache, self.limits, layer, kind)?;
        let x = source(self.arena, self.program, self.limits, x, 0);
        with_float!(cache.dtype, C => with_float!(x.spec.dtype, T => {
            let heads: &mut [C] = bytemuck::cast_slice_mut(&mut self.cache[bytes]);
            let x = x.rows::<T>();
            for (row, (slot, position)) in self.slots.iter().zip(self.positions).enumerate() {
                let (slot, position) = (*slot as usize, *position as usize);
                for (head, x) in x.row(row).chunks_exact(head_dim).enumerate() {
                    let head = &mut heads[(slot * kv_heads + head) * head_elements..][..head_elements];
                    match kind {
                        KeysOrValues::Keys => attention::store_keys(x, padded_dim, position, head),
                        KeysOrValues::Values => attention::store_values(x, padded_dim, position, head),
                    }
                }
            }
        }));
        Ok(())
    }

    fn attention<C: FloatElement>(&mut self, q: View, layer: usize, scale: f32, out: usize) -> Result<()> {
        let cache = &self.program.cache;
        let range = |kind| cache_range(cache, self.limits, layer, kind);
        let keys: &[C] = bytemuck::cast_slice(&self.cache[range(KeysOrValues::Keys)?]);
        let values: &[C] = bytemuck::cast_slice(&self.cache[range(KeysOrValues::Values)?]);
        let (slots, positions, isa) = (self.slots, self.positions, self.isa);
        let (head_dim, padded_dim) = (cache.head_dim, cache.padded_dim());
        let head_elements = head_elements(cache, self.limits)?;
        let kv_heads = cache.kv_heads;
        let heads = q.width / head_dim;
        let rows = positions.len();
        let ([q], [out]) = split(self.arena, self.program, self.limits, [q], [(out, rows)])?;
        let q = q.rows::<f32>();
        // Operands of one head of the query rows starting at `first`.
        let operands = |first: usize, head: usize| {
            let kv_head = slots[first] as usize * kv_heads + head / (heads / kv_heads);
            let block = kv_head * head_elements..(kv_head + 1) * head_elements;
            let head_cache =
                attention::CachedHead { keys: &keys[block.clone()], values: &values[block], head_dim, padded_dim };
            let (from_first, q_stride) = q.from_row(first);
            (&from_first[head * head_dim..], q_stride, head_cache, positions[first] as usize + 1)
        };
        with_float!(out.spec.dtype, O => {
            let RowsMut { data, stride, rows } = out.rows_mut::<O>();
            let data = &mut data[..rows * stride];
            // Many rows: each task takes a few whole rows, so that neighbouring rows share loads.
            let group_rows = |group: usize, out: &mut [O]| {
                let (mut row, end) = (group * QUERY_GROUP, rows.min((group + 1) * QUERY_GROUP));
                while row < end {
                    let same = |next: &usize| slots[*next] == slots[row];
                    let count = (row..end).take_while(same).count();
                    for head in 0..heads {
                        let (q, q_stride, cache, len) = operands(row, head);
                        let out = &mut out[(row - group * QUERY_GROUP) * stride + head * head_dim..];
                        attention::attend(isa, count, q, q_stride, cache, len, scale, out, stride);
                    }
                    row += count;
                }
            };
            // Few rows: each task takes one head of one row.
            let one_head = |index: usize, out: &mut [O]| {
                let (q, q_stride, cache, len) = operands(index / heads, index % heads);
                attention::attend(isa, 1, q, q_stride, cache, len, scale, out, head_dim);
            };
            let threads = rayon::current_num_threads();
            let work: usize = positions.iter().map(|p| *p as usize + 1).sum::<usize>() * heads;
            if threads == 1 || work < SERIAL_ATTENTION {
                data.chunks_mut(QUERY_GROUP * stride).enumerate().for_each(|(i, out)| group_rows(i, out));
            } else if rows >= 2 * threads * QUERY_GROUP {
                data.par_chunks_mut(QUERY_GROUP * stride).enumerate().for_each(|(i, out)| group_rows(i, out));
            } else {
                data.par_chunks_exact_mut(head_dim).enumerate().for_each(|(i, out)| one_head(i, out));
            }
        });
        Ok(())
    }
}

impl<'a> StepRun<'a> {
    fn row_count(&self, spec: &BufferSpec) -> usize {
        match spec.rows {
            RowCount::Tokens => self.step.tokens().len(),
            RowCount::LogitsRows => self.step.logits_rows().len(),
        }
    }

    /// Borrows buffers to read and, disjoint from them and from each other, buffers to write.
    fn buffers<const N: usize, const M: usize>(
        &mut self,
        reads: [View; N],
        outs: [usize; M],
    ) -> Result<([ReadView<'_>; N], [WriteView<'_>; M])> {
        let outs = outs.map(|out| (out, self.row_count(&self.program.buffers[out])));
        split(self.arena, self.program, self.limits, reads, outs)
    }
}

/// Columns of a buffer to read.
struct ReadView<'a> {
    bytes: &'a [u8], // from the first row's first element
    spec: &'a BufferSpec,
    view: View,
}

/// A buffer to write.
struct WriteView<'a> {
    bytes: &'a mut [u8],
    spec: &'a BufferSpec,
    rows: usize,
}

impl<'a> ReadView<'a> {
    fn rows<T: bytemuck::Pod>(&self) -> RowsRef<'a, T> {
        let elements: &'a [T] = bytemuck::cast_slice(self.bytes);
        RowsRef::new(&elements[self.view.column..], self.spec.width, self.view.width)
    }
}

impl<'a> WriteView<'a> {
    fn rows_mut<T: bytemuck::Pod>(self) -> RowsMut<'a, T> {
        RowsMut { data: bytemuck::cast_slice_mut(self.bytes), stride: self.spec.width, rows: self.rows }
    }
}

fn byte_range(spec: &BufferSpec, limits: &Limits) -> Range<usize> {
    spec.offset..spec.offset + spec.rows.max(limits) * spec.width * spec.dtype.bytes()
}

fn source<'a>(arena: &'a [u8], program: &'a Program, limits: &Limits, view: View, arena_start: usize) -> ReadView<'a> {
    let spec = &program.buffers[view.buffer];
    let range = byte_range(spec, limits);
    ReadView { bytes: &arena[range.start - arena_start..range.end - arena_start], spec, view }
}

/// Splits the buffers to write, at their current number of rows, out of the arena; in a valid program, reads lie
/// between them.
fn split<'a, const N: usize, const M: usize>(
    arena: &'a mut [u8],
    program: &'a Program,
    limits: &Limits,
    reads: [View; N],
    outs: [(usize, usize); M],
) -> Result<([ReadView<'a>; N], [WriteView<'a>; M])> {
    /// A buffer to write, with its index among the requested ones, and the arena before it with its offset.
    struct Cut<'a> {
        place: usize,
        target: WriteView<'a>,
        before: (usize, &'a [u8]),
    }
    let mut in_order: [usize; M] = std::array::from_fn(|place| place);
    let range = |place: usize| byte_range(&program.buffers[outs[place].0], limits);
    in_order.sort_unstable_by_key(|place| range(*place).start);
    if in_order.windows(2).any(|pair| range(pair[0]).end > range(pair[1]).start) {
        return Err(Error::internal("buffers to write that overlap", "a checked plan"));
    }
    let (mut rest, mut rest_start) = (arena, 0);
    let mut cuts = in_order.map(|place| {
        let range = range(place);
        let (before, behind) = std::mem::take(&mut rest).split_at_mut(range.start - rest_start);
        let (bytes, behind) = behind.split_at_mut(range.len());
        let before = (rest_start, &*before);
        (rest, rest_start) = (behind, range.end);
        let (out, rows) = outs[place];
        Cut { place, target: WriteView { bytes, spec: &program.buffers[out], rows }, before }
    });
    let rest = &*rest;
    let sources = reads.map(|view| {
        let offset = program.buffers[view.buffer].offset;
        let holds = |gap: &(usize, &'a [u8])| (gap.0..gap.0 + gap.1.len()).contains(&offset);
        let (start, bytes) = cuts.iter().map(|cut| cut.before).find(holds).unwrap_or((rest_start, rest));
        source(bytes, program, limits, view, start)
    });
    cuts.sort_unstable_by_key(|cut| cut.place);
    Ok((sources, cuts.map(|cut| cut.target)))
}

/// Elements of one head of one slot in the cache.
fn head_elements(cache: &CacheSpec, limits: &Limits) -> Result<usize> {
    cache.head_elements(limits).ok_or_else(|| Error::internal("a cache whose size overflows", "a checked plan"))
}

/// Bytes of one layer's keys or values, all slots, in the cache.
fn cache_range(cache: &CacheSpec, limits: &Limits, layer: usize, kind: KeysOrValues) -> Result<Range<usize>> {
    let bytes = cache.kv_heads * head_elements(cache, limits)? * limits.slots * cache.dtype.bytes();
    let index = 2 * layer + usize::from(kind == KeysOrValues::Values);
    Ok(index * bytes..(index + 1) * bytes)
}
