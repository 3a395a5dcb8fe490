//! Runs a program: mapped weights, one arena, one block of KV memory, a thread pool. A step allocates nothing.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::kernels::attention::LANES;
use super::observe::InputObserver;
use super::program::{ALIGN, Program, ProgramKernel};
use super::run::{StepRun, WeightSource};
use crate::backend::constants::stored_dtype;
use crate::backend::{Executor, ExecutorPromises, KvBlock, Limits, Logits, Step};
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::tensor_file::TensorFile;

/// Environment variable that, when set to 1, fills the arena with NaN before each step, as builds with debug assertions
/// do: reading memory that no kernel wrote then shows up in the logits. `make test` sets it, since tests run optimized.
const POISON_VARIABLE: &str = "AOTRON_CPU_POISON";

/// Options for running a program on this machine.
#[derive(Debug, Clone, Default)]
pub struct CpuOptions {
    /// Number of threads; `None` uses one per core available to this process.
    pub threads: Option<usize>,
    /// Instruction set; `None` uses the one named by [`CPU_VARIABLE`](crate::isa::CPU_VARIABLE), or the best available.
    pub isa: Option<Isa>,
    /// Sequences to reserve KV memory for; at most, and by default, those of the plan.
    pub slots: Option<usize>,
    /// Reads the weights into memory instead of mapping their file, which may then be modified.
    pub copy_weights: bool,
}

/// An open CPU plan: its program, mapped weights and threads, shared by all its executors.
#[derive(Clone)]
pub struct CpuModel {
    program: Arc<Program>,
    weights: Arc<MappedWeights>,
    pool: Arc<rayon::ThreadPool>,
    isa: Isa,
}

/// CPU executor: its own KV memory and activations over a shared [`CpuModel`].
pub struct CpuExecutor {
    pub(super) program: Arc<Program>,
    pub(super) limits: Limits,
    weights: Arc<MappedWeights>,
    pub(super) arena: Memory,
    cache: Memory,
    positions: Vec<u32>, // [tokens of the step]
    slots: Vec<u32>,     // [tokens of the step]
    pool: Arc<rayon::ThreadPool>,
    isa: Isa,
    poison: bool,
}

/// Zeroed, cache-line-aligned memory whose pages the operating system commits on first touch. (An allocation with an
/// explicit alignment would be zeroed eagerly, all of it at once.)
pub(super) struct Memory {
    bytes: Box<[u8]>,
    start: usize,
    len: usize,
}

impl Memory {
    pub(super) fn reserve(len: usize, what: &str, limits: &Limits) -> Result<Memory> {
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

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Reserves one number per token of a step.
fn reserve_tokens(limits: &Limits) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    let tokens = limits.max_step_tokens;
    let refuse = |_| Error::Request(format!("cannot reserve memory for steps of {tokens} tokens"));
    numbers.try_reserve_exact(tokens).map_err(refuse)?;
    Ok(numbers)
}

pub(super) struct MappedWeights {
    file: TensorFile,
    ranges: Vec<Range<usize>>, // per weight of the program, in bytes of the file
}

impl CpuModel {
    /// Maps the weights and starts the threads. `weights` holds the tensors that the program names, as written by the
    /// packer. `options.slots` is ignored here; each executor has its own.
    ///
    /// # Errors
    /// [`Error::Package`] if the program is inconsistent, or a weight is missing or has the wrong shape;
    /// [`Error::Request`] if an option is out of range.
    pub fn new(program: Program, plan_path: &Path, weights: TensorFile, options: &CpuOptions) -> Result<CpuModel> {
        program.validate().map_err(|e| Error::package(plan_path, format!("{e}; build the package again")))?;
        let weights = MappedWeights::new(&program, weights)?;
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
            isa: options.isa.map_or_else(Isa::from_environment, Ok)?,
        })
    }

    /// Reserves memory for an executor. `slots` is the number of sequences to reserve KV memory for; at most, and by
    /// default, the plan's.
    ///
    /// # Errors
    /// [`Error::Request`] if `slots` is zero or more than the plan's, or if the memory cannot be reserved.
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
            poison: cfg!(debug_assertions) || std::env::var_os(POISON_VARIABLE).is_some_and(|value| value == "1"),
            program: self.program.clone(),
            limits,
            weights: self.weights.clone(),
            pool: self.pool.clone(),
        })
    }

    /// The plan's limits.
    pub fn limits(&self) -> &Limits {
        &self.program.limits
    }

    /// A sentence for the user if this CPU supports faster packings than the plan was built with.
    pub fn repacking_note(&self) -> Option<String> {
        self.program.repacking_note(self.isa.features())
    }

    /// Number of threads in use.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }
}

impl CpuExecutor {
    /// Creates an executor with its own weights and threads: [`CpuModel::new`] followed by [`CpuModel::executor`].
    ///
    /// # Errors
    /// Any error of either.
    pub fn new(program: Program, plan_path: &Path, weights: TensorFile, options: &CpuOptions) -> Result<CpuExecutor> {
        CpuModel::new(program, plan_path, weights, options)?.executor(options.slots)
    }

    /// Instruction set and packing, which together decide the bits of the logits.
    pub fn arithmetic(&self) -> String {
        format!("{}, packed for {}", self.isa, self.program.cpu)
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Number of threads in use.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }
}

impl MappedWeights {
    fn new(program: &Program, file: TensorFile) -> Result<MappedWeights> {
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
        Ok(MappedWeights { file, ranges })
    }

    /// Stored elements of a weight.
    pub(super) fn data<T: bytemuck::Pod>(&self, index: usize) -> &[T] {
        bytemuck::cast_slice(&self.file.mapped()[self.ranges[index].clone()])
    }
}

impl Executor for CpuExecutor {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn forward(&mut self, step: &Step) -> Result<Logits<'_>> {
        let kernels = 0..self.program.kernels.len();
        self.run_kernels(step, kernels, None)?;
        let logits = &self.program.buffers[self.program.logits];
        let bytes = step.logits_rows().len() * logits.width * 4;
        Logits::new(bytemuck::cast_slice(&self.arena.bytes()[logits.offset..logits.offset + bytes]), logits.width)
    }

    fn promises(&self) -> ExecutorPromises {
        ExecutorPromises { same_bits: true, ignores_unwritten: true }
    }

    fn fill_slot(&mut self, slot: usize, byte: u8) -> Result<bool> {
        for range in self.slot_ranges(slot)? {
            let part = self.cache.bytes_mut().get_mut(range);
            part.ok_or_else(|| Error::internal("a slot outside of the cache", "a checked plan"))?.fill(byte);
        }
        Ok(true)
    }

    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<bool> {
        let capacity = self.limits.max_sequence_tokens;
        if tokens > capacity {
            return Err(Error::Step(format!("{tokens} tokens to copy, but a sequence holds at most {capacity}")));
        }
        let cache = &self.program.cache;
        let overflow = || Error::internal("a cache whose size overflows", "a checked plan");
        let head = cache.head_elements(&self.limits).ok_or_else(overflow)? * cache.dtype.bytes();
        // Keys are in groups of positions, so whole groups are copied; what lies past the end is never read.
        let copied = tokens.next_multiple_of(LANES) * cache.padded_dim() * cache.dtype.bytes();
        let heads = cache.kv_heads;
        for (from, to) in self.slot_ranges(from)?.zip(self.slot_ranges(to)?) {
            for index in 0..heads {
                let source = from.start + index * head..from.start + index * head + copied.min(head);
                self.cache.bytes_mut().copy_within(source, to.start + index * head);
            }
        }
        Ok(true)
    }

    /// As few tokens as can be copied whole: keys are in groups of so many positions. A sequence that is found in blocks
    /// has at most so many tokens to compute again, and a block's lists of ids are nothing next to its bytes.
    fn kv_block(&self) -> Option<KvBlock> {
        Some(KvBlock { tokens: LANES, bytes: LANES.checked_mul(self.program.cache.bytes_per_token())? })
    }

    fn read_kv_block(&self, slot: usize, index: usize, into: &mut [u8]) -> Result<()> {
        let (ranges, run) = self.block_ranges(slot, index, into.len())?;
        for (range, part) in ranges.zip(into.chunks_exact_mut(run)) {
            let stored = self.cache.bytes().get(range);
            part.copy_from_slice(
                stored.ok_or_else(|| Error::internal("a block outside of the cache", "a checked plan"))?,
            );
        }
        Ok(())
    }

    fn write_kv_block(&mut self, slot: usize, index: usize, from: &[u8]) -> Result<()> {
        let (ranges, run) = self.block_ranges(slot, index, from.len())?;
        for (range, part) in ranges.zip(from.chunks_exact(run)) {
            let stored = self.cache.bytes_mut().get_mut(range);
            stored
                .ok_or_else(|| Error::internal("a block outside of the cache", "a checked plan"))?
                .copy_from_slice(part);
        }
        Ok(())
    }

    /// Nothing to do: attention never reads past the end of a sequence.
    fn mend_slot(&mut self, _slot: usize) -> Result<()> {
        Ok(())
    }
}

impl CpuExecutor {
    /// Bytes of one slot in the cache of every layer, keys and values.
    fn slot_ranges(&self, slot: usize) -> Result<impl Iterator<Item = Range<usize>> + use<>> {
        let (cache, slots) = (&self.program.cache, self.limits.slots);
        if slot >= slots {
            return Err(Error::Step(format!("slot {slot}, but the engine has {slots} slots")));
        }
        let elements = cache.slot_elements(&self.limits);
        let bytes = elements.and_then(|elements| elements.checked_mul(cache.dtype.bytes()));
        let bytes = bytes.ok_or_else(|| Error::internal("a cache whose size overflows", "a checked plan"))?;
        Ok((0..2 * cache.layers).map(move |half| (half * slots + slot) * bytes..(half * slots + slot + 1) * bytes))
    }

    /// Bytes of a block of a slot: one range for each head of each layer's keys and values, all of the returned length.
    /// `block_bytes` is the length of the caller's memory for it.
    fn block_ranges(
        &self,
        slot: usize,
        index: usize,
        block_bytes: usize,
    ) -> Result<(impl Iterator<Item = Range<usize>> + use<>, usize)> {
        let cache = &self.program.cache;
        let blocks = self.limits.max_sequence_tokens.div_ceil(LANES);
        if index >= blocks {
            return Err(Error::Step(format!("block {index} of a slot's keys and values, which has {blocks}")));
        }
        let expected = self.kv_block().map_or(0, |block| block.bytes);
        if block_bytes != expected {
            return Err(Error::Step(format!("{block_bytes} bytes for a block of keys and values of {expected} bytes")));
        }
        let overflow = || Error::internal("a cache whose size overflows", "a checked plan");
        let head = cache.head_elements(&self.limits).ok_or_else(overflow)? * cache.dtype.bytes();
        let run = LANES * cache.padded_dim() * cache.dtype.bytes();
        let heads = cache.kv_heads;
        let start = move |slot: Range<usize>, number: usize| slot.start + number * head + index * run;
        let of_slot = move |slot: Range<usize>| {
            (0..heads).map(move |number| start(slot.clone(), number)..start(slot.clone(), number) + run)
        };
        Ok((self.slot_ranges(slot)?.flat_map(of_slot), run))
    }

    /// Runs some kernels of a step, in order. `observer` is shown the inputs of linear layers. Kernels that do not start
    /// with the program's first continue from what is in the arena.
    pub(super) fn run_kernels(
        &mut self,
        step: &Step,
        kernels: Range<usize>,
        mut observer: Option<&mut dyn InputObserver>,
    ) -> Result<()> {
        step.check_fits(&self.limits)?;
        self.positions.clear();
        self.slots.clear();
        for span in step.spans() {
            self.positions.extend((span.past_tokens..span.past_tokens + span.len).map(|p| p as u32));
            self.slots.extend(std::iter::repeat_n(span.slot as u32, span.len));
        }
        if self.poison && kernels.start == 0 {
            self.arena.bytes_mut().fill(0xff); // all-ones is NaN in every float type: reads of unwritten memory show up
        }
        let mut run = StepRun {
            step,
            positions: &self.positions,
            slots: &self.slots,
            program: &self.program,
            limits: &self.limits,
            weights: WeightSource::Mapped(&self.weights),
            arena: self.arena.bytes_mut(),
            cache: self.cache.bytes_mut(),
            isa: self.isa,
        };
        self.pool.install(|| {
            for kernel in &run.program.kernels[kernels] {
                if let (Some(observer), ProgramKernel::Linear { x, weight, .. }) = (&mut observer, kernel)
                    && observer.wants(*weight)
                {
                    let inputs = run.values(*x)?;
                    observer.inputs(*weight, x.width, &inputs)?;
                }
                run.kernel(kernel)?;
            }
            Ok(())
        })
    }
}
