//! Options of the TensorRT executor, and the events it reports while it opens and runs.

use std::fmt;
use std::sync::Arc;

/// Options for running a TensorRT plan on this machine.
#[derive(Debug, Clone, Default)]
pub struct GpuOptions {
    /// Index of the GPU; `None` picks the first one the plan was built for.
    pub device: Option<usize>,
    /// Sequences to reserve KV memory for; `None` reserves as many as the plan, the recipe and the memory allow.
    pub slots: Option<usize>,
    /// Disables recording of decode runs as CUDA graphs.
    pub no_graphs: bool,
    /// When kernels are compiled.
    pub kernels: KernelCompilation,
    /// Receives events.
    pub report: GpuReport,
}

/// When TensorRT for RTX compiles the kernels of a step's size (batch, or tokens of a prompt). Plans of TensorRT 11 hold
/// theirs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KernelCompilation {
    /// While the plan opens, for the sizes that are to be expected, so that no request waits. Later starts find them in the
    /// kernel cache. Other sizes as with [`KernelCompilation::OnFirstUse`].
    #[default]
    AtOpening,
    /// The plan opens at once. The first decode step of a batch size waits for its kernels; prefill runs slower ones until
    /// its own are compiled in the background.
    OnFirstUse,
    /// The plan opens at once, and every step waits for its own kernels: for measurements.
    BeforeUse,
}

/// Callback that receives the events of opening and running a plan; by default there is none.
#[derive(Clone, Default)]
pub struct GpuReport(Option<Arc<Hear>>);

type Hear = dyn Fn(&GpuEvent<'_>) + Send + Sync;

/// Event passed to a [`GpuReport`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GpuEvent<'a> {
    /// A sentence for people, such as the chosen GPU and its memory use.
    Fact(&'a str),
    /// Weights are being copied to the GPU.
    Loading {
        /// Bytes copied so far.
        done_bytes: u64,
        /// Bytes to copy in all.
        total_bytes: u64,
    },
    /// Steps are run once each before the first request, which compiles their kernels and captures them.
    Compiling {
        /// Runs made so far.
        done: usize,
        /// Runs to make in all.
        total: usize,
    },
}

impl GpuReport {
    /// Reports events to `hear`.
    pub fn to(hear: impl Fn(&GpuEvent<'_>) + Send + Sync + 'static) -> GpuReport {
        GpuReport(Some(Arc::new(hear)))
    }

    /// Reports a sentence.
    pub fn fact(&self, text: &str) {
        self.event(&GpuEvent::Fact(text));
    }

    pub(super) fn event(&self, event: &GpuEvent<'_>) {
        if let Some(hear) = &self.0 {
            hear(event);
        }
    }
}

impl fmt::Debug for GpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "GpuReport" } else { "no GpuReport" })
    }
}
