//! Runs a program: mapped weights, one arena, one block of KV memory, a pool of threads. A step allocates nothing.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use half::bf16;
use rayon::prelude::*;

use super::kernels::attention::QUERY_GROUP;
use super::kernels::isa::Isa;
use super::kernels::matmul::{self, Packed};
use super::kernels::quantized::{self, Quantized};
use super::kernels::rowwise::{self, RowsMut, Unary};
use super::kernels::{Element, Rows, attention};
use super::program::{
    ALIGN, BufferSpec, CacheKind, CacheSpec, Epilogue, Indices, Kernel, Program, RowCount, Table, View,
};
use crate::backend::constants::stored_dtype;
use crate::backend::{Executor, Limits, Logits, Step};
use crate::error::{Error, Result};
use crate::tensor::DType;
use crate::tensor_file::TensorFile;

/// Query rows times heads times positions below which attention is not worth waking other threads.
const SERIAL_ATTENTION: usize = 1 << 10;

/// How to run a program on this machine.
#[derive(Debug, Clone, Default)]
pub struct CpuOptions {
    /// Threads; `None` takes one per core that this process may use.
    pub threads: Option<usize>,
    /// Instruction set; `None` takes the best there is.
    pub isa: Option<Isa>,
    /// Sequences to reserve KV memory for, at most and by default those of the plan.
    pub slots: Option<usize>,
}

/// A CPU plan that is open: its program, mapped weights and threads, which all its executors share.
#[derive(Clone)]
pub struct CpuModel {
    program: Arc<Program>,
    weights: Arc<Weights>,
    pool: Arc<rayon::ThreadPool>,
    isa: Isa,
}

/// The CPU executor: KV memory and activations of its own over a [`CpuModel`].
pub struct CpuExecutor {
    program: Arc<Program>,
    limits: Limits,
    weights: Arc<Weights>,
    arena: Memory,
    cache: Memory,
    positions: Vec<u32>, // [tokens of the step]
    slots: Vec<u32>,     // [tokens of the step]
    pool: Arc<rayon::ThreadPool>,
    isa: Isa,
}

/// Zeroed memory that starts at a cache line and that the operating system hands out as it is touched. (An allocation
/// that asks for alignment would be zeroed by hand, all of it at once.)
struct Memory {
    bytes: Box<[u8]>,
    start: usize,
    len: usize,
}

impl Memory {
    fn reserve(len: usize, what: &str, limits: &Limits) -> Result<Memory> {
        let refuse = || {
            Error::Request(format!(
                "cannot reserve {len} bytes for the {what} of {} sequences of {} tokens; ask for fewer slots",
                limits.slots, limits.max_sequence_tokens
            ))
        };
        let padded = len.checked_add(ALIGN).ok_or_else(refuse)?;
        let bytes = bytemuck::allocation::try_zeroed_slice_box::<u8>(padded).map_err(|()| refuse())?;
        let start = bytes.as_ptr().align_offset(ALIGN);
        if start > ALIGN {
            return Err(refuse());
        }
        Ok(Memory { bytes, start, len })
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Room for a number for each token of a step.
fn reserve_tokens(limits: &Limits) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    let tokens = limits.max_step_tokens;
    let refuse = |_| Error::Request(format!("cannot reserve memory for steps of {tokens} tokens"));
    numbers.try_reserve_exact(tokens).map_err(refuse)?;
    Ok(numbers)
}

struct Weights {
    file: TensorFile,
    ranges: Vec<Range<usize>>, // per weight of the program, in bytes of the file
}

impl CpuModel {
    /// Maps weights and starts threads. `weights` are those the program names, as the packer wrote them; of `options`,
    /// the slots are the executors' business.
    ///
    /// # Errors
    /// [`Error::Package`] if the program does not hold together or a weight is missing or has another shape;
    /// [`Error::Request`] if an option is out of range.
    pub fn new(program: Program, plan_path: &Path, weights: TensorFile, options: &CpuOptions) -> Result<CpuModel> {
        program.validate().map_err(|e| Error::package(plan_path, format!("{e}; build the package again")))?;
        let weights = Weights::new(&program, weights)?;
        let threads = match options.threads {
            Some(0) => return Err(Error::Request("0 threads; at least one is needed".into())),
            Some(n) if n > 1024 => return Err(Error::Request(format!("{n} threads; at most 1024 are supported"))),
            Some(n) => n,
            None => std::thread::available_parallelism().map_or(1, |n| n.get()),
        };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("aotron-cpu-{i}"))
            .build()
            .map_err(|e| Error::Request(format!("cannot start {threads} threads: {e}")))?;
        Ok(CpuModel {
            program: Arc::new(program),
            weights: Arc::new(weights),
            pool: Arc::new(pool),
            isa: options.isa.unwrap_or_else(Isa::detect),
        })
    }

    /// Reserves memory for an executor. `slots` are the sequences to reserve KV memory for, at most and by default
    /// those of the plan.
    ///
    /// # Errors
    /// [`Error::Request`] for more slots than the plan's or none, or if the memory cannot be reserved.
    pub fn executor(&self, slots: Option<usize>) -> Result<CpuExecutor> {
        let mut limits = self.program.limits.clone();
        if let Some(slots) = slots {
            if slots == 0 || slots > limits.slots {
                let most = limits.slots;
                return Err(Error::Request(format!("{slots} slots, but this engine was built for 1 to {most}")));
            }
            limits.slots = slots;
        }
        let cache_bytes = self.program.cache.total_bytes(&limits).unwrap_or(usize::MAX);
        Ok(CpuExecutor {
            arena: Memory::reserve(self.program.arena_bytes, "activations", &limits)?,
            cache: Memory::reserve(cache_bytes, "KV cache", &limits)?,
            positions: reserve_tokens(&limits)?,
            slots: reserve_tokens(&limits)?,
            isa: self.isa,
            program: self.program.clone(),
            limits,
            weights: self.weights.clone(),
            pool: self.pool.clone(),
        })
    }

    /// Limits of the plan.
    pub fn limits(&self) -> &Limits {
        &self.program.limits
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }
}

impl CpuExecutor {
    /// An executor with weights and threads of its own: [`CpuModel::new`] and [`CpuModel::executor`].
    ///
    /// # Errors
    /// As those two.
    pub fn new(program: Program, plan_path: &Path, weights: TensorFile, options: &CpuOptions) -> Result<CpuExecutor> {
        CpuModel::new(program, plan_path, weights, options)?.executor(options.slots)
    }

    /// Runs a step and keeps the largest magnitude of what products read: entry `w` of `largest`, `[weights of the
    /// program]`, becomes at least that of the inputs of every [`Kernel::Linear`] over weight `w`, infinite if one of
    /// them is NaN.
    ///
    /// # Errors
    /// As [`Executor::forward`].
    pub fn observe(&mut self, step: &Step, largest: &mut [f32]) -> Result<()> {
        self.run(step, Some(largest))
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }
}

impl Weights {
    fn new(program: &Program, file: TensorFile) -> Result<Weights> {
        let mut ranges = Vec::with_capacity(program.weights.len());
        for spec in &program.weights {
            let refuse = |detail: String| Error::package(file.path(), format!("{detail}; build the package again"));
            let (stored, data) =
                file.tensor(&spec.name).ok_or_else(|| refuse(format!("weight `{}` is missing", spec.name)))?;
            if stored.dtype != stored_dtype(spec.dtype) || stored.shape != spec.stored_shape() {
                return Err(refuse(format!(
                    "weight `{}` is {:?} {:?}, the plan expects {} {:?}",
                    spec.name,
                    stored.dtype,
                    stored.shape,
                    spec.dtype,
                    spec.stored_shape()
                )));
            }
            if !(data.as_ptr() as usize).is_multiple_of(spec.dtype.bytes()) {
                return Err(refuse(format!("weight `{}` is not aligned", spec.name)));
            }
            ranges.push(stored.bytes.clone());
        }
        Ok(Weights { file, ranges })
    }

    fn data<T: bytemuck::Pod>(&self, index: usize) -> &[T] {
        bytemuck::cast_slice(&self.file.mapped()[self.ranges[index].clone()])
    }
}

impl Executor for CpuExecutor {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn forward(&mut self, step: &Step) -> Result<Logits<'_>> {
        self.run(step, None)?;
        let logits = &self.program.buffers[self.program.logits];
        let bytes = step.logits_rows().len() * logits.width * 4;
        Logits::new(bytemuck::cast_slice(&self.arena.bytes()[logits.offset..logits.offset + bytes]), logits.width)
    }
}

impl CpuExecutor {
    fn run(&mut self, step: &Step, mut largest: Option<&mut [f32]>) -> Result<()> {
        if step.tokens().len() > self.limits.max_step_tokens || step.logits_rows().len() > self.limits.max_logits_rows {
            return Err(Error::Step("the step was made for another engine's limits".into()));
        }
        self.positions.clear();
        self.slots.clear();
        for span in step.spans() {
            self.positions.extend((span.past_tokens..span.past_tokens + span.len).map(|p| p as u32));
            self.slots.extend(std::iter::repeat_n(span.slot as u32, span.len));
        }
        let out_of_range = self.slots.iter().any(|s| *s as usize >= self.limits.slots)
            || self.positions.iter().any(|p| *p as usize >= self.limits.max_sequence_tokens)
            || step.tokens().iter().any(|t| *t as usize >= self.limits.vocab_size);
        if out_of_range {
            return Err(Error::Step("the step was made for another engine's limits".into()));
        }
        if cfg!(debug_assertions) {
            self.arena.bytes_mut().fill(0xff); // NaN: nothing may read what was not written
        }
        let mut run = Run {
            step,
            positions: &self.positions,
            slots: &self.slots,
            program: &self.program,
            limits: &self.limits,
            weights: &self.weights,
            arena: self.arena.bytes_mut(),
            cache: self.cache.bytes_mut(),
            isa: self.isa,
        };
        self.pool.install(|| {
            for kernel in &run.program.kernels {
                if let (Some(largest), Kernel::Linear { x, weight, .. }) = (&mut largest, kernel)
                    && let Some(largest) = largest.get_mut(*weight)
                {
                    *largest = largest.max(run.magnitude(*x));
                }
                run.kernel(kernel);
            }
        });
        Ok(())
    }
}

/// One step on its way. Every index and shape below was checked by [`Program::validate`] and against the step.
struct Run<'a> {
    step: &'a Step,
    positions: &'a [u32], // [tokens]
    slots: &'a [u32],     // [tokens]
    program: &'a Program,
    limits: &'a Limits,
    weights: &'a Weights,
    arena: &'a mut [u8],
    cache: &'a mut [u8], // [layers, keys and values, slots, kv_heads, head_elements]
    isa: Isa,
}

impl From<Epilogue> for matmul::Epilogue {
    fn from(epilogue: Epilogue) -> matmul::Epilogue {
        match epilogue {
            Epilogue::Store => matmul::Epilogue::Store,
            Epilogue::Relu2 => matmul::Epilogue::Relu2,
            Epilogue::Accumulate => matmul::Epilogue::Accumulate,
        }
    }
}

/// Runs an expression with `$t` bound to the Rust type of a dtype.
macro_rules! with_type {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            DType::BF16 => {
                type $t = bf16;
                $body
            }
            _ => {
                type $t = f32;
                $body
            }
        }
    };
}

impl Run<'_> {
    fn kernel(&mut self, kernel: &Kernel) {
        let isa = self.isa;
        let program = self.program;
        let weights = self.weights;
        match *kernel {
            Kernel::Gather { indices, table, out } => {
                let indices = match indices {
                    Indices::TokenIds => self.step.tokens(),
                    Indices::Positions => self.positions,
                    Indices::LogitsRows => self.step.logits_rows(),
                };
                match table {
                    Table::Weight(w) => {
                        let width = program.weights[w].columns;
                        with_type!(program.weights[w].dtype, T => {
                            let table = Rows::new(weights.data::<T>(w), width, width);
                            rowwise::gather(table, indices, self.rows_mut(out));
                        });
                    }
                    Table::View(x) => {
                        let ([x], out) = self.buffers([x], out);
                        rowwise::gather(x.rows::<f32>(), indices, out.rows_mut());
                    }
                }
            }
            Kernel::LayerNorm { x, gamma, beta, eps, out } => {
                let (gamma, beta) = (weights.data::<f32>(gamma), weights.data::<f32>(beta));
                let ([x], out) = self.buffers([x], out);
                with_type!(out.spec.dtype, O => {
                    rowwise::layer_norm::<O>(isa, x.rows(), gamma, beta, eps, out.rows_mut());
                });
            }
            Kernel::Linear { x, weight, epilogue, out } => {
                let spec = &program.weights[weight];
                let ([x], out) = self.buffers([x], out);
                with_type!(spec.dtype, T => {
                    if let Some(packed) = Packed::new(weights.data::<T>(weight), spec.rows, spec.columns) {
                        with_type!(out.spec.dtype, O => {
                            let out = out.rows_mut::<O>();
                            let epilogue = epilogue.into();
                            matmul::linear(isa, x.rows::<T>(), out.rows, packed, epilogue, out.data, out.stride);
                        });
                    }
                });
            }
            Kernel::QuantizedLinear { x, codes, scales, block, epilogue, out } => {
                let spec = &program.weights[codes];
                let ([x], out) = self.buffers([x], out);
                let (codes, scales) = (weights.data::<u8>(codes), weights.data::<f32>(scales));
                if let Some(weight) = Quantized::new(codes, scales, spec.dtype, [spec.rows, spec.columns], block) {
                    with_type!(x.spec.dtype, T => with_type!(out.spec.dtype, O => {
                        let (out, epilogue) = (out.rows_mut::<O>(), epilogue.into());
                        quantized::linear(isa, x.rows::<T>(), out.rows, weight, epilogue, out.data, out.stride);
                    }));
                }
            }
            Kernel::Rotary { x, cos, sin, head_dim, out } => {
                let ([x, cos, sin], out) = self.buffers([x, cos, sin], out);
                rowwise::rotary::<f32>(isa, x.rows(), cos.rows(), sin.rows(), head_dim, out.rows_mut());
            }
            Kernel::Store { x, layer, kind } => self.store(x, layer, kind),
            Kernel::Attention { q, layer, scale, out } => {
                with_type!(program.cache.dtype, C => self.attention::<C>(q, layer, scale, out))
            }
            Kernel::Convert { x, out } => self.unary(Unary::Convert, x, out),
            Kernel::Relu2 { x, out } => self.unary(Unary::Relu2, x, out),
            Kernel::RoundToF8 { x, scale, out } => self.unary(Unary::RoundToF8(scale), x, out),
            Kernel::AddScalar { x, scalar, out } => self.unary(Unary::AddScalar(scalar), x, out),
            Kernel::Add { x, y, out } => {
                let ([x, y], out) = self.buffers([x, y], out);
                rowwise::add(x.rows(), y.rows(), out.rows_mut());
            }
        }
    }

    fn unary(&mut self, op: Unary, x: View, out: usize) {
        let ([x], out) = self.buffers([x], out);
        with_type!(x.spec.dtype, T => with_type!(out.spec.dtype, O => {
            rowwise::unary::<T, O>(op, x.rows(), out.rows_mut());
        }));
    }

    /// The largest magnitude in the columns of a buffer; infinite if there is a NaN.
    fn magnitude(&self, x: View) -> f32 {
        let rows = self.row_count(&self.program.buffers[x.buffer]);
        let x = source(self.arena, self.program, self.limits, x, 0);
        with_type!(x.spec.dtype, T => {
            let x = x.rows::<T>();
            let values = (0..rows).flat_map(|row| x.row(row)).map(|value| value.to_f32().abs());
            values.fold(0.0, |most, v| if v.is_nan() { f32::INFINITY } else { most.max(v) })
        })
    }

    fn store(&mut self, x: View, layer: usize, kind: CacheKind) {
        let cache = &self.program.cache;
        let (head_dim, padded_dim, kv_heads) = (cache.head_dim, cache.padded_dim(), cache.kv_heads);
        let head_elements = cache.head_elements(self.limits).unwrap_or(0);
        let bytes = cache_range(cache, self.limits, layer, kind);
        let x = source(self.arena, self.program, self.limits, x, 0);
        with_type!(cache.dtype, C => with_type!(x.spec.dtype, T => {
            let heads: &mut [C] = bytemuck::cast_slice_mut(&mut self.cache[bytes]);
            let x = x.rows::<T>();
            for (row, (slot, position)) in self.slots.iter().zip(self.positions).enumerate() {
                let (slot, position) = (*slot as usize, *position as usize);
                for (head, x) in x.row(row).chunks_exact(head_dim).enumerate() {
                    let head = &mut heads[(slot * kv_heads + head) * head_elements..][..head_elements];
                    match kind {
                        CacheKind::Keys => attention::store_keys(x, padded_dim, position, head),
                        CacheKind::Values => attention::store_values(x, padded_dim, position, head),
                    }
                }
            }
        }));
    }

    fn attention<C: Element>(&mut self, q: View, layer: usize, scale: f32, out: usize) {
        let cache = &self.program.cache;
        let keys: &[C] = bytemuck::cast_slice(&self.cache[cache_range(cache, self.limits, layer, CacheKind::Keys)]);
        let values: &[C] = bytemuck::cast_slice(&self.cache[cache_range(cache, self.limits, layer, CacheKind::Values)]);
        let (slots, positions, isa) = (self.slots, self.positions, self.isa);
        let (head_dim, padded_dim) = (cache.head_dim, cache.padded_dim());
        let head_elements = cache.head_elements(self.limits).unwrap_or(0);
        let kv_heads = cache.kv_heads;
        let heads = q.width / head_dim;
        let rows = positions.len();
        let ([q], out) = split(self.arena, self.program, self.limits, [q], out, rows);
        let q = q.rows::<f32>();
        // What one head of the rows from `first` on is computed from.
        let operands = |first: usize, head: usize| {
            let kv_head = slots[first] as usize * kv_heads + head / (heads / kv_heads);
            let block = kv_head * head_elements..(kv_head + 1) * head_elements;
            let head_cache =
                attention::Head { keys: &keys[block.clone()], values: &values[block], head_dim, padded_dim };
            let (from_first, q_stride) = q.from_row(first);
            (&from_first[head * head_dim..], q_stride, head_cache, positions[first] as usize + 1)
        };
        with_type!(out.spec.dtype, O => {
            let RowsMut { data, stride, rows } = out.rows_mut::<O>();
            let data = &mut data[..rows * stride];
            // Many rows: a task takes a few whole rows, so that neighbours share what they load.
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
            // Few rows: a task takes one head of one row.
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
    }
}

impl<'a> Run<'a> {
    fn row_count(&self, spec: &BufferSpec) -> usize {
        match spec.rows {
            RowCount::Tokens => self.step.tokens().len(),
            RowCount::LogitsRows => self.step.logits_rows().len(),
        }
    }

    fn rows_mut<T: Element>(&mut self, out: usize) -> RowsMut<'_, T> {
        let ([], out) = self.buffers([], out);
        out.rows_mut()
    }

    /// Some buffers to read and one, apart from them, to write.
    fn buffers<const N: usize>(&mut self, reads: [View; N], out: usize) -> ([Source<'_>; N], Target<'_>) {
        let rows = self.row_count(&self.program.buffers[out]);
        split(self.arena, self.program, self.limits, reads, out, rows)
    }
}

/// Columns of a buffer to read.
struct Source<'a> {
    bytes: &'a [u8], // from the first row's first element
    spec: &'a BufferSpec,
    view: View,
}

/// A buffer to write.
struct Target<'a> {
    bytes: &'a mut [u8],
    spec: &'a BufferSpec,
    rows: usize,
}

impl<'a> Source<'a> {
    fn rows<T: Element>(&self) -> Rows<'a, T> {
        let elements: &'a [T] = bytemuck::cast_slice(self.bytes);
        Rows::new(&elements[self.view.column..], self.spec.width, self.view.width)
    }
}

impl<'a> Target<'a> {
    fn rows_mut<T: Element>(self) -> RowsMut<'a, T> {
        RowsMut { data: bytemuck::cast_slice_mut(self.bytes), stride: self.spec.width, rows: self.rows }
    }
}

fn byte_range(spec: &BufferSpec, limits: &Limits) -> Range<usize> {
    spec.offset..spec.offset + spec.rows.max(limits) * spec.width * spec.dtype.bytes()
}

fn source<'a>(arena: &'a [u8], program: &'a Program, limits: &Limits, view: View, arena_start: usize) -> Source<'a> {
    let spec = &program.buffers[view.buffer];
    let range = byte_range(spec, limits);
    Source { bytes: &arena[range.start - arena_start..range.end - arena_start], spec, view }
}

/// Splits the arena around `out`; a valid program's reads lie on either side of it.
fn split<'a, const N: usize>(
    arena: &'a mut [u8],
    program: &'a Program,
    limits: &Limits,
    reads: [View; N],
    out: usize,
    rows: usize,
) -> ([Source<'a>; N], Target<'a>) {
    let spec = &program.buffers[out];
    let range = byte_range(spec, limits);
    let (before, rest) = arena.split_at_mut(range.start);
    let (bytes, after) = rest.split_at_mut(range.len());
    let (before, after) = (&*before, &*after);
    let sources = reads.map(|view| {
        if program.buffers[view.buffer].offset < range.start {
            source(before, program, limits, view, 0)
        } else {
            source(after, program, limits, view, range.end)
        }
    });
    (sources, Target { bytes, spec, rows })
}

/// Bytes of one layer's keys or values, all slots, in the cache.
fn cache_range(cache: &CacheSpec, limits: &Limits, layer: usize, kind: CacheKind) -> Range<usize> {
    let bytes = cache.slot_elements(limits).unwrap_or(0) * limits.slots * cache.dtype.bytes();
    let index = 2 * layer + usize::from(kind == CacheKind::Values);
    index * bytes..(index + 1) * bytes
}
