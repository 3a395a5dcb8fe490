//! Opens engine packages for the commands.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use aotron::backend::cpu::CpuOptions;
use aotron::backend::tensorrt::{GpuEvent, GpuOptions, GpuReport, KernelCompilation};
use aotron::backend::{Executor, ExecutorOptions, Selection, select};
use aotron::checkpoint::is_checkpoint;
use aotron::compile::Progress;
use aotron::engine::{Package, PlanInfo, is_package};
use aotron::runtime::Session;
use aotron::text::{ChatFormat, Tokenizer};
use aotron::verify;

use super::args::{ChatFlags, EngineFlags, PinFlags};
use super::term::{self, Stages};

/// Folders above a path in which a package is looked for.
const OUTER_FOLDERS: usize = 3;

/// An opened package, ready to run.
pub struct OpenedEngine {
    pub package: Package,
    /// The chat format to use.
    pub format: ChatFormat,
    /// The tokenizer for that format.
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub executor: Box<dyn Executor>,
    pub selection: Selection,
    pub load_seconds: f64,
}

impl EngineFlags {
    /// The flags of a command that names nothing but the package.
    pub fn of(engine: &Path) -> EngineFlags {
        EngineFlags {
            engine: engine.to_path_buf(),
            pin: PinFlags::default(),
            threads: None,
            isa: None,
            target: None,
            device: None,
            copy_weights: false,
            accept_unverified: false,
            lazy_kernels: false,
            no_cuda_graphs: false,
        }
    }

    /// The package only, without opening its plan.
    pub fn package(&self) -> aotron::Result<Package> {
        refuse_checkpoint(&self.engine)?;
        self.pin.open(&self.engine)
    }

    /// Options for running its CPU plan, with KV memory for `slots` sequences.
    pub fn cpu_options(&self, slots: usize) -> CpuOptions {
        CpuOptions { threads: self.threads, isa: self.isa, slots: Some(slots), copy_weights: self.copy_weights }
    }

    /// Options for running its plan, with KV memory for `slots` sequences.
    pub fn options(&self, slots: usize) -> ExecutorOptions {
        let stages = Arc::new(Stages::new());
        let hear = move |event: &GpuEvent<'_>| match event {
            GpuEvent::Fact(text) => term::note(text),
            GpuEvent::Loading { done_bytes: 0, total_bytes } => stages.stage("loading", *total_bytes),
            GpuEvent::Loading { done_bytes, total_bytes } if done_bytes == total_bytes => stages.finish(),
            GpuEvent::Loading { done_bytes, .. } => stages.reach(*done_bytes),
            GpuEvent::Compiling { done, total } if done == total => stages.finish(),
            GpuEvent::Compiling { done: 0, total } => stages.steps("compiling", *total as u64, "step sizes"),
            GpuEvent::Compiling { done, .. } => stages.reach(*done as u64),
        };
        let gpu = GpuOptions {
            device: self.device,
            slots: Some(slots),
            no_graphs: self.no_cuda_graphs,
            kernels: match self.lazy_kernels {
                true => KernelCompilation::OnFirstUse,
                false => KernelCompilation::AtOpening,
            },
            report: GpuReport::to(hear),
        };
        ExecutorOptions {
            target: self.target.clone(),
            cpu: self.cpu_options(slots),
            gpu,
            accept_unverified: self.accept_unverified,
        }
    }

    /// Says so if a GPU was chosen and the plan that runs is the CPU's.
    pub fn note_device(&self, selection: &Selection) {
        if let (Some(device), None) = (self.device, selection.device) {
            term::warn(format!("--device {device} has no effect: {}", selection.reason));
        }
    }

    /// The plan that would be selected.
    pub fn plan(&self, slots: usize) -> anyhow::Result<PlanInfo> {
        let package = self.package()?;
        let selection = select(&package, &self.options(slots))?;
        package.manifest().plans.get(selection.plan).cloned().context("the plan that runs is not in the manifest")
    }

    /// Opens the package, its tokenizer and its plan for one sequence at a time.
    pub fn open(&self) -> aotron::Result<OpenedEngine> {
        self.open_for(1)
    }

    /// As [`EngineFlags::open`], with the chat format that `chat` chooses.
    pub fn open_chat(&self, chat: &ChatFlags) -> aotron::Result<OpenedEngine> {
        self.open_with(self.options(1), |package| chat.open(package))
    }

    /// Opens the package, its tokenizer and its plan for `slots` sequences.
    pub fn open_for(&self, slots: usize) -> aotron::Result<OpenedEngine> {
        self.open_with(self.options(slots), |package| package.text(None))
    }

    /// As [`EngineFlags::open_for`], for measuring: no step runs kernels that are not its own.
    pub fn open_to_measure(&self, slots: usize) -> aotron::Result<OpenedEngine> {
        let mut options = self.options(slots);
        options.gpu.kernels = KernelCompilation::BeforeUse;
        self.open_with(options, |package| package.text(None))
    }

    fn open_with(
        &self,
        options: ExecutorOptions,
        text: impl Fn(&Package) -> aotron::Result<(ChatFormat, Option<Tokenizer>)>,
    ) -> aotron::Result<OpenedEngine> {
        let started = Instant::now();
        let package = self.package()?;
        let (format, tokenizer) = text(&package)?;
        let tokenizer = tokenizer.map(Arc::new);
        let selection = select(&package, &options)?;
        self.note_device(&selection);
        // Do not report the selection if there was no choice.
        if package.manifest().plans.len() > 1 || selection.device.is_some() {
            term::note(&selection.reason);
        }
        let executor = verify::open(&package, &selection, &options)?;
        let load_seconds = started.elapsed().as_secs_f64();
        Ok(OpenedEngine { package, format, tokenizer, executor, selection, load_seconds })
    }

    /// Verifies the digests of all files in the package.
    pub fn verify(&self) -> aotron::Result<()> {
        let package = self.package()?;
        let stages = Stages::new();
        stages.stage("verifying", package.manifest().files.iter().map(|f| f.bytes).sum());
        package.verify(&|bytes| stages.advance(bytes))
    }
}

impl OpenedEngine {
    /// The selected plan.
    pub fn plan(&self) -> anyhow::Result<PlanInfo> {
        let plan = self.package.manifest().plans.get(self.selection.plan);
        plan.cloned().context("the plan that runs is not in the manifest")
    }

    /// Turns the opened engine into a session, which keeps its tokenizer and plan.
    pub fn into_session(self) -> Session {
        Session::new(self.executor, self.tokenizer)
    }
}

/// Refuses a checkpoint where a package belongs, with the command that makes one of it, and what is inside of a package.
pub fn refuse_checkpoint(path: &Path) -> aotron::Result<()> {
    let outer = path.ancestors().skip(1).take(OUTER_FOLDERS).find(|outer| is_package(outer));
    if let (false, true, Some(outer)) = (is_package(path), path.exists(), outer) {
        let outer = if outer.as_os_str().is_empty() { Path::new(".") } else { outer };
        let outer = shell_word(outer);
        return Err(aotron::Error::package(
            path,
            format!("this is inside of an engine package; give its folder: {outer}"),
        ));
    }
    match !is_package(path) && is_checkpoint(path) {
        true => {
            let build = format!("`aotron build {}` makes one of it", shell_word(path));
            Err(aotron::Error::package(path, format!("this is a checkpoint, not an engine package; {build}")))
        }
        false => Ok(()),
    }
}

/// A path quoted for pasting into a shell.
pub fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%".contains(c);
    if text.chars().all(plain) && !text.starts_with('-') {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Notes that the output will be token ids, if the package has no tokenizer.
pub fn note_ids_only(package: &Package) {
    term::note(format!("{} has no tokenizer: the answer is token ids", package.path().display()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_survive_a_shell() {
        assert_eq!(shell_word(Path::new("engines/tiny-chat")), "engines/tiny-chat");
        assert_eq!(shell_word(Path::new("my engine's")), r"'my engine'\''s'");
    }
}
