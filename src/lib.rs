//! An ahead-of-time compiler and a lightweight runtime for NVIDIA's Nemotron-3-8B-Chat-4k-RLHF and its architecture.
//!
//! The *compiler* turns a checkpoint into an **engine package**, one folder with everything needed to run the model
//! (`aotron build`, or [`build`](build())). This page is about the other half: running a package.
//!
//! # Load
//!
//! A [`Model`] is an opened package: tokenizer, chat format, weights, and the plan that suits this machine.
//!
//! ```no_run
//! # fn main() -> aotron::Result<()> {
//! use aotron::Model;
//!
//! let model = Model::open("engines/tiny-chat")?;
//! println!("{} runs in {}: {}", model.path().display(), model.precision(), model.selection_reason());
//! # Ok(())
//! # }
//! ```
//!
//! # Chat and stream
//!
//! A [`Chat`] keeps the messages of a conversation. An answer is an iterator over its text, computed on demand, which
//! ends in a [`Completion`]. ([`Chat::send_with`] takes a callback instead.)
//!
//! ```no_run
//! use std::io::Write;
//!
//! use aotron::{Model, SamplingParams, Turn};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let mut chat = Model::open("engines/tiny-chat")?.chat()?;
//!     for piece in chat.send("What is the capital of France?")? {
//!         print!("{}", piece?);
//!         std::io::stdout().flush()?;
//!     }
//!     println!();
//!
//!     // One answer with settings of its own.
//!     let turn = Turn::new("Tell me more.").sampling(SamplingParams::sampled(0.7).top_p(0.9)).stop_string("\n\n");
//!     let mut answer = chat.send(turn)?;
//!     for piece in answer.by_ref() {
//!         print!("{}", piece?);
//!     }
//!     let completion = answer.finish()?;
//!     println!("\n({} tokens, {:?})", completion.completion_tokens, completion.finish_reason);
//!     Ok(())
//! }
//! ```
//!
//! A chat runs on a [`Session`], which also accepts a [`GenerationRequest`] with any token ids, computes
//! [scores](Session::score) of a text, and lets you [choose the tokens](TextStream::choosing).
//!
//! # Batch
//!
//! An [`Engine`] serves many requests together on a thread of its own. Its handles can be cloned and used from any
//! thread. Dropping a response cancels its request, and a full queue refuses requests. The result of a request does not
//! depend on the others.
//!
//! ```no_run
//! # fn main() -> aotron::Result<()> {
//! use aotron::{DrainMode, Message, Model};
//!
//! let model = Model::options().slots(8).open("engines/tiny-chat")?;
//! let engine = model.engine()?;
//! let handle = engine.handle();
//! let questions = ["What is the capital of France?", "What is 17 + 25?"];
//! let answers = questions
//!     .iter()
//!     .map(|question| handle.submit_wait(model.chat_request(&[Message::user(*question)])?))
//!     .collect::<aotron::Result<Vec<_>>>()?;
//! for (question, answer) in questions.iter().zip(answers) {
//!     println!("{question} {}", answer.wait()?.text);
//! }
//! engine.shutdown(DrainMode::Accepted)
//! # }
//! ```
//!
//! What an engine has computed of a prompt it does not compute again, as long as it is in a slot or, on the CPU, in the
//! blocks that [`EngineOptions::prefix_cache_bytes`] bounds.
//!
//! A [`Batcher`] does the same step by step on the caller's thread. Complete programs are in `examples/`: a chat, a
//! batch, scores, and a custom sampler.
//!
//! # Features
//!
//! All are on by default. Without them the library is pure Rust: no C++, and no command-line dependencies.
//!
//! | feature | adds |
//! | --- | --- |
//! | `cli` | the program `aotron` |
//! | `serve` | the HTTP server, `aotron serve` |
//! | `tensorrt` | plans for NVIDIA GPUs: the shim over TensorRT (C++) and the GPU's driver, both opened at run time |
//!
//! # How it works
//!
//! ```text
//!   checkpoint ──► graph ──► passes ──► lowering ──► engine package        build time
//!   (.nemo, HF)   (typed IR) (reports)  (kernels,    (a folder: manifest,
//!                                        arena,       plans, packed weights,
//!                                        weights)     tokenizer)
//!                                                         │
//!   text ◄── session / batcher ◄── executor ◄─────────────┘                run time
//!            (KV slots, sampling,   (runs a plan;
//!             stops, template)       knows no text)
//! ```
//!
//! # The modules
//!
//! Imports go one way only: a module may use those above it in this list.
//!
//! | module | contents |
//! | --- | --- |
//! | `error`, `tensor`, `isa`, `memory`, `mmap`, `tensor_file` | the error type, element types and borrowed tensors, CPU features, the machine's memory, mapped files, safetensors |
//! | `checkpoint` | readers: from a `.nemo` file or a Hugging Face folder to a config and named, validated, memory-mapped tensors |
//! | `quantize` | quantization of a row of weights into codes and scales |
//! | `graph` | the typed intermediate representation of one forward step |
//! | `text` | tokenizer, streaming decoder, chat template |
//! | `model` | the architecture: builds a graph from a config |
//! | `engine` | the package: manifest, limits, opening and writing |
//! | `backend` | `Step`, the `Executor` trait, weight files written in one pass, the CPU (lowering, packing, kernels), TensorRT (libraries, lowering, running on a GPU) |
//! | `verify` | the cases that a plan must pass before it answers, and the reference answers in a package |
//! | `compile` | recipes, passes, and [`build`](build()), which runs the upper half of the diagram |
//! | `runtime` | sampling, stops, [`Session`] (one conversation), [`Batcher`] (many), [`Engine`] (many, from any thread), the prefix cache; it depends on neither graphs nor checkpoints |
//! | `serve` | the HTTP server over an [`Engine`]; HTTPS with the feature `tls` |
//!
//! The program's command line is not part of the library.
//!
//! # Guarantees
//!
//! - **Same request, same tokens.** On the CPU a sequence's logits are bit-identical whatever else is in the batch and
//!   however its prompt was split into chunks.
//! - **No half-written packages.** A package appears by a single rename, after all of it is on disk.
//! - **Files and requests are not trusted.** Everything read is validated before it is used; errors name the file,
//!   tensor, op or limit and what was expected.

// Modules for other parts of this repository, with no stability promise: the public, documented API is re-exported
// below.
#[doc(hidden)]
pub mod backend;
#[doc(hidden)]
pub mod checkpoint;
#[doc(hidden)]
pub mod compile;
#[doc(hidden)]
pub mod engine;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
#[doc(hidden)]
pub mod graph;
#[doc(hidden)]
pub mod isa;
#[doc(hidden)]
pub mod memory;
#[doc(hidden)]
pub mod mmap;
mod model;
#[doc(hidden)]
pub mod quantize;
#[doc(hidden)]
pub mod runtime;
#[cfg(feature = "serve")]
#[doc(hidden)]
pub mod serve;
#[cfg(test)]
#[path = "../tests/skips.rs"]
mod skips;
#[doc(hidden)]
pub mod tensor;
#[doc(hidden)]
pub mod tensor_file;
#[doc(hidden)]
pub mod text;
#[doc(hidden)]
pub mod verify;

pub use error::{Error, PlanRefusal, PlanRefusals, RefusalReason, Result};

/// Executors run the steps of a [`Session`], a [`Batcher`] or an [`Engine`]. A [`Model`] opens those of its plan; use
/// these types to write your own.
pub mod executor {
    pub use crate::backend::{Chunk, DeferredLogits, Executor, KvBlock, Logits, NextToken, Rows, Span, Step, Top};
}

#[doc(inline)]
pub use compile::{BuildRequest, BuildSummary, PlanSummary, Precision, Progress, Recipe, Target, build};
#[doc(inline)]
pub use engine::Limits;
#[doc(inline)]
pub use isa::{CpuFeatures, Isa};
#[doc(inline)]
pub use runtime::{
    Answer, Batcher, Chat, Completion, DrainMode, Engine, EngineHandle, EngineOptions, EngineStatus, Event,
    FinishReason, GenerationRequest, Grammar, Model, ModelOptions, PrefixCacheStatus, PrefixReuse, RequestId,
    ResponseStream, Sampler, SamplingParams, Session, StopMatch, TextStream, Ticket, Timings, TokenConstraint,
    TokenLogprobs, TokenMask, TokenReport, TokenReports, Turn, log_probability,
};
#[doc(inline)]
pub use text::{ChatFormat, Message, Role, StreamDecoder, Tokenizer};
