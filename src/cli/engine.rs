//! Opening an engine package for a command.

use std::sync::Arc;
use std::time::Instant;

use aotron::backend::cpu::CpuOptions;
use aotron::backend::{Executor, ExecutorOptions, cpu_program, open};
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
    pub load_seconds: f64,
}

impl EngineFlags {
    /// The package alone.
    pub fn package(&self) -> aotron::Result<Package> {
        Package::open(&self.engine)
    }

    /// How to run its plan; KV memory is reserved for that many sequences.
    pub fn cpu_options(&self, slots: usize) -> CpuOptions {
        CpuOptions { threads: self.threads, isa: self.isa, slots: Some(slots) }
    }

    /// Opens the package, its tokenizer and its plan, for one sequence at a time.
    pub fn open(&self) -> aotron::Result<Engine> {
        let started = Instant::now();
        let package = self.package()?;
        let tokenizer = package.tokenizer()?.map(Arc::new);
        let executor = open(&package, &ExecutorOptions { cpu: self.cpu_options(1), ..ExecutorOptions::default() })?;
        Ok(Engine { package, tokenizer, executor, load_seconds: started.elapsed().as_secs_f64() })
    }

    /// Checks every byte of the package against its digests.
    pub fn verify(&self) -> aotron::Result<()> {
        use aotron::compile::Progress;
        let package = self.package()?;
        let stages = Stages::new();
        stages.stage("verifying", package.manifest().files.iter().map(|f| f.bytes).sum());
        package.verify(&|bytes| stages.advance(bytes))
    }
}

impl Engine {
    /// The plan that runs.
    pub fn plan(&self) -> aotron::Result<PlanInfo> {
        cpu_program(&self.package).map(|(plan, _)| plan.clone())
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
