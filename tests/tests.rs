//! All integration tests in one binary.

/// The program, as its users run it.
mod cli;
/// Logits against transformers in FP32, batch and chunk invariance.
mod numerics;
