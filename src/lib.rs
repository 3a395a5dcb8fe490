//! An ahead-of-time compiler and a lightweight runtime for NVIDIA's Nemotron-3-8B-Chat-4k-RLHF and its architecture.
//!
//! A *builder* compiles a checkpoint into an **engine package**, one folder with everything that running the model needs
//! (`aotron build`, or [`build`](build())). This page shows the other half: a package answers.
//!
//! # Load
//!
//! A [`Model`] is a package that is open: plan, weights, tokenizer and chat format, with the plan that suits this machine.
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
//! A [`Chat`] keeps the messages of a conversation. An answer is an iterator over its text, computed as it is asked for;
//! at its end there is a [`Completion`]. ([`Chat::send_with`] takes a callback instead.)
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
//! Below a chat is a [`Session`]: a [`GenerationRequest`] for any token ids, [scores](Session::score) of a text, and
//! [tokens of your own choice](TextStream::choosing).
//!
//! # Batch
//!
//! An [`Engine`] serves many requests together on a thread of its own. Its handles can be cloned and used from any thread;
//! a response that is dropped is cancelled, and a full queue refuses. What a request gets does not depend on the others.
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
//! A [`Batcher`] does the same step by step on the caller's thread. Whole programs are in `examples/`: a chat, a batch,
//! scores, a sampler of one's own.
//!
//! # Features
//!
//! Both are on by default. A library user without them compiles Rust alone: no C++, nothing of the command line.
//!
//! | feature | what it adds |
//! | --- | --- |
//! | `cli` | the program `aotron` |
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
//! # The rooms
//!
//! Imports go downward only, in this order; a room may use those above it in the list.
//!
//! | room | what lives there |
//! | --- | --- |
//! | `error`, `tensor`, `isa`, `mmap`, `tensor_file` | the error type, element types and borrowed tensors, CPU features, mapped files, safetensors |
//! | `checkpoint` | readers: a `.nemo` or a Hugging Face folder becomes a config and named, validated, mapped tensors |
//! | `quantize` | how a row of weights becomes small codes and scales |
//! | `graph` | the typed intermediate representation of one forward step |
//! | `text` | tokenizer, streaming decoder, chat template |
//! | `model` | the architecture: a config becomes a graph |
//! | `engine` | the package: manifest, limits, opening and writing |
//! | `backend` | `Step`, the `Executor` trait, the files of weights written in one pass, the CPU (lowering, packing, kernels), TensorRT (libraries, lowering, running on a GPU) |
//! | `compile` | recipes, passes, and [`build`](build()), which runs the upper half of the picture |
//! | `runtime` | sampling, stops, [`Session`] (one conversation), [`Batcher`] (many), [`Engine`] (many, from any thread); it sees neither graphs nor checkpoints |
//!
//! The program's command line is not part of the library.
//!
//! # What holds everywhere
//!
//! - **Same request, same tokens.** On the CPU a sequence's logits are bit-identical whatever else is in the batch and
//!   however its prompt was cut into chunks.
//! - **Nothing half-written is taken for whole.** A package appears by one rename, after all of it is on disk.
//! - **Files and requests are not trusted.** Everything read is validated before it is used; errors name the file,
//!   tensor, op or limit and what was expected.

// Modules that other parts of this repository use, but no promise to anyone else: all that is public and documented is
// re-exported below.
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
pub mod mmap;
mod model;
#[doc(hidden)]
pub mod quantize;
#[doc(hidden)]
pub mod runtime;
#[cfg(test)]
#[path = "../tests/skips.rs"]
mod skips;
#[doc(hidden)]
pub mod tensor;
#[doc(hidden)]
pub mod tensor_file;
#[doc(hidden)]
pub mod text;

pub use error::{Error, PlanRefusal, PlanRefusals, RefusalReason, Result};

/// Executors, which run the steps of a [`Session`], a [`Batcher`] or an [`Engine`]. A [`Model`] opens those of its plan;
/// these are the types to write another one with.
pub mod executor {
    pub use crate::backend::{Chunk, DeferredLogits, Executor, Logits, NextToken, Rows, Span, Step, Top};
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
    FinishReason, GenerationRequest, Model, ModelOptions, RequestId, ResponseStream, Sampler, SamplingParams, Session,
    TextStream, Ticket, Timings, Turn, log_probability,
};
#[doc(inline)]
pub use text::{ChatFormat, Message, Role, StreamDecoder, Tokenizer};
