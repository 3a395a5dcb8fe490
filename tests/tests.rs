//! All integration tests in one binary.

/// The program, as its users run it.
mod cli;
/// Hostile and broken inputs through the real program.
mod hostile;
/// A sequence's logits do not depend on its batch or its chunks.
mod invariance;
/// Builds killed at random moments.
mod kill;
/// Lowering to the CPU.
mod lowering;
/// Logits against transformers in FP32.
mod numerics;
/// The 500 conversations of tiny-chat.
mod tiny_chat;
