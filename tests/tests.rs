//! All integration tests in one binary.

/// A sequence's logits do not depend on its batch or its chunks.
mod invariance;
/// Logits against transformers in FP32, batch and chunk invariance.
mod numerics;
