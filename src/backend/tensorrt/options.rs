//! Options of a TensorRT executor, and the events it reports while it opens and runs.

use std::fmt;
use std::sync::Arc;

/// How to run a TensorRT plan on this machine.
#[derive(Debug, Clone, Default)]
pub struct GpuOptions {
    /// The GPU's number; `None` takes the first that the plan was built for.
    pub device: Option<usize>,
    /// Sequences to reserve KV memory for; `None` takes as many as plan, recipe and memory allow.
    pub slots: Option<usize>,
    /// Do not record decoding as CUDA graphs.
    pub no_graphs: bool,
    /// Hears of what is going on.
    pub report: GpuReport,
}

/// Who hears what opening and running a plan has to say.
#[derive(Clone, Default)]
pub struct GpuReport(Option<Arc<Hear>>);

type Hear = dyn Fn(&GpuEvent<'_>) + Send + Sync;

/// What a [`GpuReport`] hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GpuEvent<'a> {
    /// A sentence for people: what is chosen, what memory is used.
    Fact(&'a str),
    /// Weights are being copied to the GPU.
    Loading {
        /// Bytes that are there.
        done_bytes: u64,
        /// All.
        total_bytes: u64,
    },
}

impl GpuReport {
    /// Has it heard. By default nobody does.
    pub fn to(hear: impl Fn(&GpuEvent<'_>) + Send + Sync + 'static) -> GpuReport {
        GpuReport(Some(Arc::new(hear)))
    }

    /// Says a sentence.
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
