//! The runtime: from a prompt's ids to an answer, over any [`Executor`](crate::backend::Executor).
//!
//! A [`GenerationRequest`] describes one generation. A [`Session`] serves one conversation on one slot, a [`Batcher`]
//! many requests on all slots. Both pass every row of logits to the same state machine, which runs
//!
//! ```text
//! logits -> Sampler -> id -> stop ids -> StreamDecoder -> StopFilter -> text
//! ```
//!
//! so the same request gives the same tokens in either. What leaves a slot of a batcher is kept in a prefix cache, from
//! which it is copied back, bit for bit. A [`Chat`] keeps the messages of a conversation on top of
//! a session.

mod batcher;
mod chat;
mod constraint;
mod defaults;
mod engine;
mod generation;
mod model;
mod prefix_cache;
mod report;
mod request;
mod response;
mod sampler;
mod sampling;
mod session;
mod slots;
mod stop;
mod stream;

#[cfg(test)]
mod scripted;

pub use batcher::{Batcher, Event, RequestId};
pub use chat::{Answer, Chat, Turn};
pub use constraint::{Grammar, TokenConstraint, TokenMask};
#[cfg(feature = "serve")]
pub(crate) use engine::words_of_panic;
pub use engine::{DrainMode, Engine, EngineHandle, EngineOptions, EngineStatus, Ticket};
pub use model::{Model, ModelOptions};
pub use prefix_cache::{PrefixCacheStatus, PrefixReuse};
pub use report::{MAX_TOP_LOGPROBS, TokenLogprobs, TokenReport, TokenReports};
pub use request::{Completion, FinishReason, GenerationRequest, StopMatch, Timings};
pub use response::ResponseStream;
pub use sampler::{Sampler, log_probability};
pub use sampling::SamplingParams;
pub use session::Session;
pub use stop::StopFilter;
pub use stream::TextStream;
