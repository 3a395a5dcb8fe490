//! All integration tests in one binary.

/// Logits against transformers in FP32, batch and chunk invariance.
mod numerics;
