//! An ahead-of-time compiler and a lightweight runtime for NVIDIA's Nemotron-3-8B-Chat-4k-RLHF and its architecture.
//!
//! # The way of the data
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
//! | [`error`], [`tensor`], [`isa`], [`mmap`], [`tensor_file`] | the error type, element types and borrowed tensors, CPU features, mapped files, safetensors |
//! | [`checkpoint`] | readers: a `.nemo` or a Hugging Face folder becomes a config and named, validated, mapped tensors |
//! | [`quantize`] | how a row of weights becomes small codes and scales |
//! | [`graph`] | the typed intermediate representation of one forward step |
//! | [`text`] | tokenizer, streaming decoder, chat template |
//! | [`model`] | the architecture: a config becomes a graph |
//! | [`engine`] | the package: manifest, limits, opening and writing |
//! | [`backend`] | [`Step`](backend::Step), the [`Executor`](backend::Executor) trait, the files of weights written in one pass, the CPU (lowering, packing, kernels), TensorRT (libraries, lowering, running on a GPU) |
//! | [`compile`] | recipes, passes, and [`compile::build`], which runs the upper half of the picture |
//! | [`runtime`] | sampling, stops, [`Session`](runtime::Session) (one conversation), [`Batcher`](runtime::Batcher) (many); it sees neither graphs nor checkpoints |
//!
//! The program's command line is not part of the library.
//!
//! # From a checkpoint to an answer
//!
//! ```no_run
//! use std::{ops::ControlFlow, path::Path, sync::Arc};
//!
//! use aotron::backend::{self, ExecutorOptions};
//! use aotron::engine::Package;
//! use aotron::runtime::{Chat, SamplingParams, Session};
//!
//! # fn main() -> aotron::Result<()> {
//! let package = Package::open(Path::new("engines/tiny-chat"))?; // made by `aotron build`
//! let executor = backend::open(&package, &ExecutorOptions::default())?;
//! let session = Session::new(executor, package.tokenizer()?.map(Arc::new));
//! let mut chat = Chat::new(session, package.chat_format())?;
//! let answer = chat.send("What is the capital of France?", &SamplingParams::default(), 200, &mut |text| {
//!     print!("{text}");
//!     ControlFlow::Continue(())
//! })?;
//! println!("\n({} tokens, {:?})", answer.completion_tokens, answer.finish_reason);
//! # Ok(())
//! # }
//! ```
//!
//! # What holds everywhere
//!
//! - **Same request, same tokens.** On the CPU a sequence's logits are bit-identical whatever else is in the batch and
//!   however its prompt was cut into chunks (see [`backend::cpu::kernels`]).
//! - **Nothing half-written is taken for whole.** A package appears by one rename, after all of it is on disk.
//! - **Files and requests are not trusted.** Everything read is validated before it is used; errors name the file,
//!   tensor, op or limit and what was expected.

pub mod backend;
pub mod checkpoint;
pub mod compile;
pub mod engine;
pub mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod graph;
pub mod isa;
pub mod mmap;
pub mod model;
pub mod quantize;
pub mod runtime;
#[cfg(test)]
#[path = "../tests/skips.rs"]
mod skips;
pub mod tensor;
pub mod tensor_file;
pub mod text;

pub use error::{Error, Result};
pub use runtime::SamplingParams;
