//! The library's entry point: an opened package, and everything that can be started from it.

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
use crate::backend::{Executor, ExecutorOptions, Limits, Selection, open_noted_cpu_model, select};
use crate::engine::{Package, PlanInfo};
use crate::error::{Error, Result};
use crate::text::{ChatFormat, Message, Tokenizer};
use crate::verify;

/// Options for opening a [`Model`]. The defaults suit a single user of this machine.
#[derive(Debug, Clone, Default)]
pub struct ModelOptions {
    executor: ExecutorOptions,
    slots: Option<usize>,
    chat_format: Option<String>,
}

impl ModelOptions {
    /// Selects the plan's target: `"cpu"`, `"a100"`, `"h100"`. By default the target of a GPU that is present with its
    /// library, otherwise `"cpu"`.
    #[must_use]
    pub fn target(mut self, target: impl Into<String>) -> ModelOptions {
        self.executor.target = Some(target.into());
        self
    }

    /// Selects the GPU by index. By default the first one that a plan was compiled for.
    #[must_use]
    pub fn device(mut self, index: usize) -> ModelOptions {
        self.executor.gpu.device = Some(index);
        self
    }

    /// Number of threads of a CPU plan, shared by everything opened from the model. By default one per core that this
    /// process may use.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> ModelOptions {
        self.executor.cpu.threads = Some(threads);
        self
    }

    /// Number of sequences that an [`Engine`] or a [`Batcher`] of this model runs at once, and for which KV memory is
    /// reserved. The number that the plan was built for is both the default and the limit. A session or a chat always
    /// uses one.
    #[must_use]
    pub fn slots(mut self, slots: usize) -> ModelOptions {
        self.slots = Some(slots);
        self
    }

    /// Selects the chat format: `"nemotron"`, `"chatml"`, `"raw"`, one of the checkpoint's templates by name, or a template
    /// file whose name ends in `.jinja`. By default the package's own. Opening fails if the package's tokenizer breaks
    /// the format's markers into letters.
    #[must_use]
    pub fn chat_format(mut self, choice: impl Into<String>) -> ModelOptions {
        self.chat_format = Some(choice.into());
        self
    }

    /// Runs a GPU plan that has not been verified on this machine. By default the first opening on a new combination of
    /// card, driver, library and plan compares the plan's answers with each other and with those that the CPU gave when
    /// the package was built, which takes seconds, and refuses a plan that answers wrongly.
    #[must_use]
    pub fn accept_unverified(mut self, accept: bool) -> ModelOptions {
        self.executor.accept_unverified = accept;
        self
    }

    /// Receives information for people while a model is opened: the plan that was selected and why, and the memory a
    /// GPU needs.
    #[must_use]
    pub fn on_fact(mut self, hear: impl Fn(&str) + Send + Sync + 'static) -> ModelOptions {
        self.executor.gpu.report = GpuReport::to(move |event| {
            if let GpuEvent::Fact(text) = event {
                hear(text);
            }
        });
        self
    }

    /// The instruction set of the CPU's kernels and other executor options without a stability promise.
    #[doc(hidden)]
    #[must_use]
    pub fn executor_options(mut self, executor: ExecutorOptions) -> ModelOptions {
        self.executor = executor;
        self
    }

    /// Opens the engine package at `path`, a folder written by `aotron build`.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open(self, path: impl AsRef<Path>) -> Result<Model> {
        self.open_package(Package::open(path.as_ref())?)
    }

    /// Opens a model from a package that is already open.
    ///
    /// # Errors
    /// As [`Model::open`].
    #[doc(hidden)]
    pub fn open_package(self, package: Package) -> Result<Model> {
        let (format, tokenizer) = package.text(self.chat_format.as_deref())?;
        if let (Some(tokenizer), Some(_)) = (&tokenizer, &self.chat_format) {
            format.problems(tokenizer).refuse()?;
        }
        let (format, tokenizer) = (Arc::new(format), tokenizer.map(Arc::new));
        let selection = select(&package, &self.executor)?;
        self.executor.gpu.report.fact(&selection.reason);
        let cpu = match selection.device {
            None => Some(open_noted_cpu_model(&package, &self.executor)?),
            Some(_) => None,
        };
        let plan = package.manifest().plans.get(selection.plan).cloned().ok_or_else(|| {
            Error::internal(format!("plan {} was selected", selection.plan), "the index of a plan in the manifest")
        })?;
        let shared = ModelShared { package, plan, selection, options: self, tokenizer, format, cpu };
        Ok(Model { shared: Arc::new(shared) })
    }
}

/// An opened engine package: plan, weights, tokenizer and chat format. Cheap to clone.
///
/// Everything opened from a model with a CPU plan shares its mapped weights and its threads; each session, chat,
/// batcher or engine has its own KV memory. On a GPU each of them loads its own copy of the weights, so there a single
/// [`Engine`] is the way to serve several conversations.
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
    shared: Arc<ModelShared>,
}

struct ModelShared {
    package: Package,
    plan: PlanInfo,
    selection: Selection,
    options: ModelOptions,
    tokenizer: Option<Arc<Tokenizer>>,
    format: Arc<ChatFormat>,
    /// Set if a CPU plan runs.
    cpu: Option<CpuModel>,
}

impl Model {
    /// Opens the engine package at `path`, a folder written by `aotron build`, with the plan that suits this machine.
    ///
    /// # Errors
    /// [`Error::NoSuchPackage`] or [`Error::NotAPackage`]; [`Error::NoPlan`] with the reason for each plan, if none
    /// runs here; [`Error::Package`] or [`Error::Format`] for a damaged package; [`Error::Request`] for an option out
    /// of range.
    pub fn open(path: impl AsRef<Path>) -> Result<Model> {
        Model::options().open(path)
    }

    /// Options for opening a model.
    pub fn options() -> ModelOptions {
        ModelOptions::default()
    }

    /// Starts a conversation in the package's chat format, with its defaults for sampling and the length of answers.
    ///
    /// # Errors
    /// [`Error::Request`] if the package has no tokenizer; otherwise as [`Model::session`].
    pub fn chat(&self) -> Result<Chat> {
        let mut chat = Chat::new(self.session()?, self.shared.format.clone())?;
        chat.set_sampling(self.default_sampling());
        chat.set_max_tokens(self.default_max_tokens());
        Ok(chat)
    }

    /// Opens a session: one generation after another, on its own sequence.
    ///
    /// # Errors
    /// [`Error::Request`] if its KV memory cannot be reserved; errors of opening the GPU executor.
    pub fn session(&self) -> Result<Session> {
        Ok(Session::new(self.executor(Some(1))?, self.shared.tokenizer.clone()))
    }

    /// Opens a batcher: many requests together, step by step on the caller's thread, with at most `max_queued` waiting.
    ///
    /// # Errors
    /// As [`Model::session`], and [`Error::Request`] for more slots than the plan has.
    pub fn batcher(&self, max_queued: usize) -> Result<Batcher> {
        Ok(Batcher::new(self.executor(self.shared.options.slots)?, self.shared.tokenizer.clone(), max_queued))
    }

    /// Starts an engine: many requests together, from any thread.
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

    /// A request that continues a text. The text is encoded as it is, without the chat template; the package's stops
    /// and defaults apply.
    ///
    /// # Errors
    /// [`Error::Request`] if the package has no tokenizer; [`Error::Tokenizer`] if the text cannot be encoded.
    pub fn text_request(&self, text: &str) -> Result<GenerationRequest> {
        let ids = self.needed_tokenizer()?.encode(text)?;
        let request = GenerationRequest::new(ids).stop_ids(self.shared.format.stop_ids());
        Ok(self.with_defaults(request.stop_strings(&self.shared.format.stop_strings)))
    }

    /// A request for the assistant's next turn, in the package's chat format and with its defaults. Rendering and
    /// encoding happen on the caller's thread.
    ///
    /// # Errors
    /// [`Error::Request`] if the package has no tokenizer or the chat format rejects these messages;
    /// [`Error::Tokenizer`] if the text cannot be encoded.
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
            Error::Request(format!("{path} has no tokenizer, so it only accepts token ids: GenerationRequest::new"))
        })
    }

    /// Opens an executor for the plan.
    fn executor(&self, slots: Option<usize>) -> Result<Box<dyn Executor>> {
        let ModelShared { package, selection, options, cpu, .. } = &*self.shared;
        if let Some(cpu) = cpu {
            return Ok(Box::new(cpu.executor(slots)?));
        }
        let executor = &options.executor;
        let options = ExecutorOptions {
            cpu: CpuOptions { slots, ..executor.cpu.clone() },
            gpu: GpuOptions { slots, ..executor.gpu.clone() },
            ..executor.clone()
        };
        verify::open(package, selection, &options)
    }

    /// The package's folder.
    pub fn path(&self) -> &Path {
        self.shared.package.path()
    }

    /// The tokenizer; a package without one works with token ids only.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.shared.tokenizer.as_ref()
    }

    /// The chat format.
    pub fn chat_format(&self) -> &Arc<ChatFormat> {
        &self.shared.format
    }

    /// The limits that the plan was built for. An engine or a batcher may use fewer slots.
    pub fn limits(&self) -> &Limits {
        &self.shared.plan.limits
    }

    /// The target of the running plan: `"cpu"`, `"a100"`, `"h100"`.
    pub fn target(&self) -> &str {
        &self.shared.plan.target
    }

    /// The precision of the running plan.
    pub fn precision(&self) -> &str {
        &self.shared.plan.precision
    }

    /// The index of the GPU that the plan runs on; `None` for the CPU.
    pub fn device(&self) -> Option<usize> {
        self.shared.selection.device
    }

    /// A sentence that names the selected plan and the reason for selecting it.
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
