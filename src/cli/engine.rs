//! Opening an engine package for a command.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use aotron::backend::cpu::CpuOptions;
use aotron::backend::tensorrt::{GpuEvent, GpuOptions, GpuReport};
use aotron::backend::{Executor, ExecutorOptions, Selection, open_selected, select};
use aotron::compile::Progress;
use aotron::engine::{Package, PlanInfo};
use aotron::runtime::Session;
use aotron::text::Tokenizer;

use super::args::EngineFlags;
use super::term::{self, Stages};

/// An opened package, ready to run.
pub struct Engine {
    pub package: Package,
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub executor: Box<dyn Executor>,
    pub selection: Selection,
    pub load_seconds: f64,
}

impl EngineFlags {
    /// The package alone.
    pub fn package(&self) -> aotron::Result<Package> {
        Package::open(&self.engine)
    }

    /// How to run its CPU plan; KV memory is reserved for that many sequences.
    pub fn cpu_options(&self, slots: usize) -> CpuOptions {
        CpuOptions { threads: self.threads, isa: self.isa, slots: Some(slots) }
    }

    /// How to run its plan; KV memory is reserved for that many sequences.
    pub fn options(&self, slots: usize) -> ExecutorOptions {
        let stages = Arc::new(Stages::new());
        let hear = move |event: &GpuEvent<'_>| match event {
            GpuEvent::Fact(text) => term::note(text),
            GpuEvent::Loading { done_bytes: 0, total_bytes } => stages.stage("loading", *total_bytes),
            GpuEvent::Loading { done_bytes, total_bytes } if done_bytes == total_bytes => stages.finish(),
            GpuEvent::Loading { done_bytes, .. } => stages.reach(*done_bytes),
        };
        let gpu = GpuOptions {
            device: self.device,
            slots: Some(slots),
            no_graphs: self.no_cuda_graphs,
            report: GpuReport::to(hear),
        };
        ExecutorOptions { target: self.target.clone(), cpu: self.cpu_options(slots), gpu }
    }

    /// The plan that would run.
    pub fn plan(&self, slots: usize) -> anyhow::Result<PlanInfo> {
        let package = self.package()?;
        let selection = select(&package, &self.options(slots))?;
        package.manifest().plans.get(selection.plan).cloned().context("the plan that runs is not in the manifest")
    }

    /// Opens the package, its tokenizer and its plan, for one sequence at a time.
    pub fn open(&self) -> aotron::Result<Engine> {
        self.open_for(1)
    }

    /// Opens the package, its tokenizer and its plan, for so many sequences.
    pub fn open_for(&self, slots: usize) -> aotron::Result<Engine> {
        let started = Instant::now();
        let package = self.package()?;
        let tokenizer = package.tokenizer()?.map(Arc::new);
        let options = self.options(slots);
        let selection = select(&package, &options)?;
        // Where there was no choice, nobody asks which it was.
        if package.manifest().plans.len() > 1 || selection.device.is_some() {
            term::note(&selection.reason);
        }
        let executor = open_selected(&package, &selection, &options)?;
        Ok(Engine { package, tokenizer, executor, selection, load_seconds: started.elapsed().as_secs_f64() })
    }

    /// Checks every byte of the package against its digests.
    pub fn verify(&self) -> aotron::Result<()> {
        let package = self.package()?;
        let stages = Stages::new();
        stages.stage("verifying", package.manifest().files.iter().map(|f| f.bytes).sum());
        package.verify(&|bytes| stages.advance(bytes))
    }
}

impl Engine {
    /// The plan that runs.
    pub fn plan(&self) -> anyhow::Result<PlanInfo> {
        let plan = self.package.manifest().plans.get(self.selection.plan);
        plan.cloned().context("the plan that runs is not in the manifest")
    }

    /// A session over the engine; its tokenizer and plan remain in use there.
    pub fn into_session(self) -> Session {
        Session::new(self.executor, self.tokenizer)
    }
}

/// Whether a package has a tokenizer, told to those who might expect text.
pub fn note_ids_only(package: &Package) {
    term::note(format!("{} has no tokenizer: the answer is token ids", package.path().display()));
}
