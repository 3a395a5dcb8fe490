//! The runtime: from a prompt's ids to an answer, over any [`Executor`](crate::backend::Executor).
//!
//! A [`GenerationRequest`] says what is wanted. A [`Session`] serves one conversation on one slot, a [`Batcher`] many
//! requests on all slots; both hand every row of logits to the same state machine, which runs
//!
//! ```text
//! logits -> Sampler -> id -> stop ids -> StreamDecoder -> StopFilter -> text
//! ```
//!
//! so that the same request gives the same tokens in either. A [`Chat`] keeps the messages of a conversation on top of
//! a session.

mod batcher;
mod chat;
mod defaults;
mod generation;
mod request;
mod sampler;
mod session;
mod slots;
mod stop;

#[cfg(test)]
mod scripted;

pub use batcher::{Batcher, Event, RequestId};
pub use chat::Chat;
pub use request::{Completion, FinishReason, GenerationRequest, Timings};
pub use sampler::{Sampler, SamplingParams, log_probability};
pub use session::Session;
pub use stop::StopFilter;
