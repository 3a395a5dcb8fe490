//! Errors that the precisions allow, measured as [`row_error`](super::row_error) does.
//!
//! A GPU plan rounds to BF16 what the CPU keeps in FP32: results of linear layers, dequantized weights, queries and
//! probabilities. The limits come from evaluating the networks layer by layer with that rounding
//! (`tests/tensorrt_semantics.rs`), for tiny-chat, four shapes of random weights, and models of 4 and 32 layers all of
//! which matter. From 4 layers to 32 errors doubled; so limits grow with the cube root of the depth. docs/verify.md has
//! the numbers, and the tests fail if one of them comes within a factor of 1.5 of its limit.

/// Depth up to which the limits are constant.
const LAYERS: f32 = 4.0;

/// Largest error of a row of a plan in this precision on a GPU. A precision of another version gets the limit of the
/// widest known one.
pub fn limit_on_gpu(precision: &str, layers: usize) -> f32 {
    limit(precision, [1e-4, 0.05, 0.3], layers)
}

/// Largest error of a row of a CPU plan against its reference, where that was computed with another instruction set or
/// packing: sums are added up in another order, which moves a few values to a neighbour in BF16 or E4M3.
pub fn limit_on_cpu(precision: &str, layers: usize) -> f32 {
    limit(precision, [1e-4, 0.03, 0.2], layers)
}

/// The limit of a precision, given those of FP32, of BF16 products and of everything else at few layers.
fn limit(precision: &str, [f32, bf16, other]: [f32; 3], layers: usize) -> f32 {
    let limit = match precision {
        "f32" => f32,
        "bf16" | "int8" | "int4" => bf16,
        _ => other,
    };
    limit * (layers as f32 / LAYERS).max(1.0).cbrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_double_from_4_layers_to_32() {
        assert_eq!(limit_on_gpu("bf16", 2), limit_on_gpu("bf16", 4));
        assert!((limit_on_gpu("int4", 32) - 0.1).abs() < 1e-6 && (limit_on_cpu("fp8", 32) - 0.4).abs() < 1e-6);
        assert!(limit_on_gpu("new", 1) >= limit_on_gpu("fp8", 1) && limit_on_gpu("f32", 4) < 1e-3);
    }
}
