//! One handle over everything a package needs to answer.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::batcher::Batcher;
use super::chat::Chat;
use super::engine::{Engine, EngineOptions};
use super::request::GenerationRequest;
use super::sampling::SamplingParams;
use super::session::Session;
use crate::backend::cpu::{CpuModel, CpuOptions};
use crate::backend::tensorrt::{GpuEvent, GpuOptions, GpuReport};
use crate::backend::{Executor, ExecutorOptions, Limits, Selection, open_cpu_model, open_selected, select};
use crate::engine::{Package, PlanInfo};
use crate::error::{Error, Result};
use crate::text::{ChatFormat, Message, Tokenizer};

/// Options of opening a [`Model`]. The defaults suit one user of this machine.
#[derive(Debug, Clone, Default)]
pub struct ModelOptions {
    executor: ExecutorOptions,
    slots: Option<usize>,
}

impl ModelOptions {
    /// The target whose plan is to run: `"cpu"`, `"a100"`, `"h100"`. By default that of a GPU which is here with its
    /// library, else the CPU's.
    #[must_use]
    pub fn target(mut self, target: impl Into<String>) -> ModelOptions {
        self.executor.target = Some(target.into());
        self
    }

    /// The GPU to run on, by its number. By default the first that a plan is for.
    #[must_use]
    pub fn device(mut self, index: usize) -> ModelOptions {
        self.executor.gpu.device = Some(index);
        self
    }

    /// Threads of a CPU plan, which everything opened from the model shares. By default one per core that this process
    /// may use.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> ModelOptions {
        self.executor.cpu.threads = Some(threads);
        self
    }

    /// Sequences that an [`Engine`] or a [`Batcher`] of this model runs at once, at most and by default as many as the
    /// plan was built for. KV memory is reserved for so many. A session and a chat take one whatever this says.
    #[must_use]
    pub fn slots(mut self, slots: usize) -> ModelOptions {
        self.slots = Some(slots);
        self
    }

    /// Hears facts for people while a model is opened: which plan is taken and why, what memory a GPU is given.
    #[must_use]
    pub fn on_fact(mut self, hear: impl Fn(&str) + Send + Sync + 'static) -> ModelOptions {
        self.executor.gpu.report = GpuReport::to(move |event| {
            if let GpuEvent::Fact(text) = event {
                hear(text);
            }
        });
        self
    }

    /// The instruction set of the CPU's kernels, and other options of executors that are not promised to stay.
    #[doc(hidden)]
    #[must_use]
    pub fn executor_options(mut self, executor: ExecutorOptions) -> ModelOptions {
        self.executor = executor;
        self
    }

    /// Opens the engine package at `path`, a folder that `aotron build` made.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open(self, path: impl AsRef<Path>) -> Result<Model> {
        self.open_package(Package::open(path.as_ref())?)
    }

    /// Opens a package that was opened before.
    ///
    /// # Errors
    /// As [`Model::open`].
    #[doc(hidden)]
    pub fn open_package(self, package: Package) -> Result<Model> {
        let tokenizer = package.tokenizer()?.map(Arc::new);
        let selection = select(&package, &self.executor)?;
        self.executor.gpu.report.fact(&selection.reason);
        let cpu = match selection.device {
            None => Some(open_cpu_model(&package, &self.executor.cpu)?),
            Some(_) => None,
        };
        if let Some(note) = cpu.as_ref().and_then(CpuModel::repacking_note) {
            self.executor.gpu.report.fact(&note);
        }
        let plan = package.manifest().plans.get(selection.plan).cloned().ok_or_else(|| {
            Error::internal(format!("plan {} was selected", selection.plan), "the index of a plan in the manifest")
        })?;
        let format = package.chat_format();
        let shared = Shared { package, plan, selection, options: self, tokenizer, format, cpu };
        Ok(Model { shared: Arc::new(shared) })
    }
}

/// An engine package that is open: plan, weights, tokenizer and chat format. Cloning it is cheap.
///
/// Everything opened from a model of a CPU plan shares its mapped weights and its threads; each session, chat, batcher or
/// engine has KV memory of its own. On a GPU each of them loads the weights for itself, so there one [`Engine`] for many
/// conversations is the way to share.
///
/// ```no_run
/// use aotron::Model;
///
/// # fn main() -> aotron::Result<()> {
/// let model = Model::options().target("cpu").threads(4).open("engines/tiny-chat")?;
/// let answer = model.chat()?.send_with("What is the capital of France?", &mut |_| std::ops::ControlFlow::Continue(()))?;
/// println!("{}", answer.text);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Model {
    shared: Arc<Shared>,
}

struct Shared {
    package: Package,
    plan: PlanInfo,
    selection: Selection,
    options: ModelOptions,
    tokenizer: Option<Arc<Tokenizer>>,
    format: Arc<ChatFormat>,
    /// Where a CPU plan runs.
    cpu: Option<CpuModel>,
}

impl Model {
    /// Opens the engine package at `path`, a folder that `aotron build` made, with the plan that suits this machine.
    ///
    /// # Errors
    /// [`Error::NoSuchPackage`] or [`Error::NotAPackage`]; [`Error::NoPlan`] with what each plan lacks, if none runs
    /// here; [`Error::Package`] or [`Error::Format`] for a package that is damaged; [`Error::Request`] for an option out
    /// of range.
    pub fn open(path: impl AsRef<Path>) -> Result<Model> {
        Model::options().open(path)
    }

    /// Options to open a model with.
    pub fn options() -> ModelOptions {
        ModelOptions::default()
    }

    /// A conversation, in the package's chat format and with its defaults for sampling and the length of answers.
    ///
    /// # Errors
    /// [`Error::Request`] where the package has no tokenizer; as [`Model::session`].
    pub fn chat(&self) -> Result<Chat> {
        let mut chat = Chat::new(self.session()?, self.shared.format.clone())?;
        chat.set_sampling(self.default_sampling());
        chat.set_max_tokens(self.default_max_tokens());
        Ok(chat)
    }

    /// A session: generations one after the other, on a sequence of its own.
    ///
    /// # Errors
    /// [`Error::Request`] if its KV memory cannot be reserved; what a GPU's executor reports of opening it.
    pub fn session(&self) -> Result<Session> {
        Ok(Session::new(self.executor(Some(1))?, self.shared.tokenizer.clone()))
    }

    /// A batcher: many requests together, step by step on the caller's thread, with at most `max_queued` waiting.
    ///
    /// # Errors
    /// As [`Model::session`], and [`Error::Request`] for more slots than the plan has.
    pub fn batcher(&self, max_queued: usize) -> Result<Batcher> {
        Ok(Batcher::new(self.executor(self.shared.options.slots)?, self.shared.tokenizer.clone(), max_queued))
    }

    /// An engine: many requests together, from any thread.
    ///
    /// # Errors
    /// As [`Model::batcher`].
    pub fn engine(&self) -> Result<Engine> {
        self.engine_with(EngineOptions::default())
    }

    /// As [`Model::engine`], with options.
    ///
    /// # Errors
    /// As [`Model::engine`].
    pub fn engine_with(&self, options: EngineOptions) -> Result<Engine> {
        Engine::start(self.executor(self.shared.options.slots)?, self.shared.tokenizer.clone(), options)
    }

    /// A request that continues a text: its ids are encoded as they are, without the chat template, and the package's
    /// stops and defaults hold.
    ///
    /// # Errors
    /// [`Error::Request`] where the package has no tokenizer; [`Error::Tokenizer`] for a text it refuses.
    pub fn text_request(&self, text: &str) -> Result<GenerationRequest> {
        let ids = self.needed_tokenizer()?.encode(text)?;
        let request = GenerationRequest::new(ids).stop_ids(self.shared.format.stop_ids());
        Ok(self.with_defaults(request.stop_strings(&self.shared.format.stop_strings)))
    }

    /// A request for the assistant's next turn, in the package's chat format and with its defaults. This renders and
    /// encodes on the caller's thread.
    ///
    /// # Errors
    /// [`Error::Request`] where the package has no tokenizer or the chat format does not take these messages;
    /// [`Error::Tokenizer`] for a text it refuses.
    pub fn chat_request(&self, messages: &[Message]) -> Result<GenerationRequest> {
        Ok(self.with_defaults(GenerationRequest::chat(self.needed_tokenizer()?, &self.shared.format, messages)?))
    }

    fn with_defaults(&self, request: GenerationRequest) -> GenerationRequest {
        request.sampling(self.default_sampling()).max_tokens(self.default_max_tokens())
    }

    fn default_sampling(&self) -> SamplingParams {
        SamplingParams::from(&self.shared.package.manifest().generation)
    }

    fn default_max_tokens(&self) -> usize {
        self.shared.package.manifest().generation.max_tokens
    }

    fn needed_tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer().map(AsRef::as_ref).ok_or_else(|| {
            let path = self.path().display();
            Error::Request(format!("{path} has no tokenizer, so it takes token ids only: GenerationRequest::new"))
        })
    }

    /// An executor of the plan.
    fn executor(&self, slots: Option<usize>) -> Result<Box<dyn Executor>> {
        let Shared { package, selection, options, cpu, .. } = &*self.shared;
        if let Some(cpu) = cpu {
            return Ok(Box::new(cpu.executor(slots)?));
        }
        let executor = &options.executor;
        let options = ExecutorOptions {
            cpu: CpuOptions { slots, ..executor.cpu.clone() },
            gpu: GpuOptions { slots, ..executor.gpu.clone() },
            ..executor.clone()
        };
        open_selected(package, selection, &options)
    }

    /// The package's folder.
    pub fn path(&self) -> &Path {
        self.shared.package.path()
    }

    /// The tokenizer; a package without one takes and gives token ids only.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.shared.tokenizer.as_ref()
    }

    /// The chat format.
    pub fn chat_format(&self) -> &Arc<ChatFormat> {
        &self.shared.format
    }

    /// The limits the plan was built for. Of its slots an engine or a batcher may use fewer.
    pub fn limits(&self) -> &Limits {
        &self.shared.plan.limits
    }

    /// The target whose plan runs: `"cpu"`, `"a100"`, `"h100"`.
    pub fn target(&self) -> &str {
        &self.shared.plan.target
    }

    /// The precision of the plan that runs.
    pub fn precision(&self) -> &str {
        &self.shared.plan.precision
    }

    /// The number of the GPU it runs on; none for the CPU.
    pub fn device(&self) -> Option<usize> {
        self.shared.selection.device
    }

    /// A sentence that says which plan runs and why it is this one.
    pub fn selection_reason(&self) -> &str {
        &self.shared.selection.reason
    }

    /// The package.
    #[doc(hidden)]
    pub fn package(&self) -> &Package {
        &self.shared.package
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, target) = (self.path(), self.target());
        f.debug_struct("Model").field("path", &path).field("target", &target).finish_non_exhaustive()
    }
}
