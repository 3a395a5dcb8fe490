//! Errors that the precisions allow.
//!
//! A GPU plan rounds to BF16 what the CPU keeps in FP32: results of linear layers, dequantized weights, queries and
//! probabilities. The limits come from evaluating the networks layer by layer with that rounding
//! (`tests/tensorrt_semantics.rs`), for tiny-chat and four shapes of random weights: docs/verify.md has the numbers, and
//! the test fails if one of them comes within a factor of 1.5 of its limit. Errors of single operations are independent,
//! so they grow with the square root of the number of layers; but so does what they are added to, the residual stream,
//! and measured errors did not depend on depth.

/// Largest error of a row, as [`row_error`](super::row_error) measures it, of a plan in this precision on a GPU. A
/// precision of another version gets the limit of the widest known one.
pub fn limit_on_gpu(precision: &str) -> f32 {
    match precision {
        "f32" => 1e-4,
        "bf16" | "int8" | "int4" => 0.05,
        _ => 0.3,
    }
}

/// Largest error of a row of a CPU plan against its reference, which was computed with another instruction set: sums
/// are added up in another order, which moves a few values to a neighbour in BF16 or E4M3.
pub fn limit_on_cpu(precision: &str) -> f32 {
    match precision {
        "f32" => 1e-4,
        "bf16" | "int8" | "int4" => 0.03,
        _ => 0.2,
    }
}
