//! Runs a program: mapped weights, one arena, one block of KV memory, a pool of threads. A step allocates nothing.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::program::{ALIGN, Kernel, Program};
use super::run::Run;
use crate::backend::constants::stored_dtype;
use crate::backend::{Executor, Limits, Logits, Step};
use crate::error::{Error, Result};
use crate::isa::Isa;
use crate::tensor_file::TensorFile;

/// The environment variable that, set to 1, has each step start with an arena of NaN, as builds with debug assertions do:
/// a kernel that reads what none wrote is then seen in the logits. `make test` sets it, since tests run optimized.
const POISON_VARIABLE: &str = "AOTRON_CPU_POISON";

/// How to run a program on this machine.
#[derive(Debug, Clone, Default)]
pub struct CpuOptions {
    /// Threads; `None` takes one per core that this process may use.
    pub threads: Option<usize>,
    /// Instruction set; `None` takes the one that [`CPU_VARIABLE`](crate::isa::CPU_VARIABLE) names, or the best there is.
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
    poison: bool,
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

pub(super) struct Weights {
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
            isa: options.isa.map_or_else(Isa::from_environment, Ok)?,
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
            poison: cfg!(debug_assertions) || std::env::var_os(POISON_VARIABLE).is_some_and(|value| value == "1"),
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

    /// A sentence for a user whose CPU has better packings than those that the plan was built with.
    pub fn repacking_note(&self) -> Option<String> {
        self.program.repacking_note(self.isa.features())
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

    /// The stored elements of a weight.
    pub(super) fn data<T: bytemuck::Pod>(&self, index: usize) -> &[T] {
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
        if self.poison {
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
                    *largest = largest.max(run.magnitude(*x)?);
                }
                run.kernel(kernel)?;
            }
            Ok(())
        })
    }
}
