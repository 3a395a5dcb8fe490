//! The closed set of operations, each with a descriptor from which everything else about it derives.

use super::constant::{Const, Trig};
use super::descriptor::{Accepts, Narrowing, OpDescriptor, operand};
use super::value_type::{Input, Type};
use crate::tensor::DType::{self, F32, I32};

/// One operation. Each defines one value; operands are listed in the order given here.
///
/// To add an op, give it a variant and a descriptor in this file, and lower it in `backend/cpu/lower.rs` and
/// `backend/tensorrt/lower.rs`: all three are exhaustive `match`es, so a missing one does not compile. The dump, the type
/// rule, and the passes that fold constants and narrow to BF16 read the descriptor.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// Supplied by the step.
    Input(Input),
    /// Known at build time.
    Const(Const),
    /// `(x)`: `x + scalar`.
    AddScalar(f32),
    /// `(x)`: rounded to another element type, ties to even.
    Cast(DType),
    /// `(indices [n], table [rows, width])`: rows of the table, `[n, width]`. An index outside the table is an error
    /// of the caller.
    Gather,
    /// `(x [n, width], gamma [width], beta [width])`: `(x − mean) / sqrt(var + eps) · gamma + beta`, population
    /// variance, statistics in FP32 (Ba et al., "Layer Normalization").
    LayerNorm {
        /// Added to the variance.
        eps: f64,
    },
    /// `(x [n, in], weight [out, in])`: `x · weightᵀ`, `f32[n, out]`, accumulated in FP32.
    Linear,
    /// `(x [n, in], codes [out, in], scales f32[out, blocks])`: `x · weightᵀ`, `f32[n, out]`, accumulated in FP32, with
    /// `weight[o, i] = codes[o, i] · scales[o, i / block]`; the last block of a row may be shorter.
    QuantizedLinear {
        /// Quantization group size in inputs; `None`: per-channel scales.
        block: Option<usize>,
    },
    /// `(x)`: quantizes to a code and back, FP32: `scale` times the code nearest to `x / scale`, saturating. A backend
    /// with a GEMM of such codes quantizes here and moves the scale out of the sums.
    FakeQuantize {
        /// Type of the code: F8, or I8 with codes from -128 to 127.
        code: DType,
        /// Value that a code of 1 stands for.
        scale: f32,
    },
    /// `(x [n, width])`: columns `start .. start + width`.
    Columns {
        /// First column.
        start: usize,
        /// Number of columns.
        width: usize,
    },
    /// `(positions [n])`: `f32[n, rotary_dim / 2]`.
    RotaryAngle {
        /// Cosine or sine.
        trig: Trig,
        /// Base of the frequencies.
        theta: f64,
        /// Rotating dimensions of a head.
        rotary_dim: usize,
    },
    /// `(x [n, heads · head_dim], cos [n, r/2], sin [n, r/2])`: rotates dims `(j, j + r/2)` of each head by the
    /// row's angle, `j < r/2`; dims from `r` on pass through.
    Rotary {
        /// Width of one head.
        head_dim: usize,
    },
    /// `(cache [B, heads, S, head_dim], new [B·T, heads · head_dim], past_tokens [B])`: the cache with the new
    /// tokens written after each sequence's past ones. It replaces its operand.
    CacheUpdate,
    /// `(q [B·T, heads · head_dim], keys, values [B, kv_heads, S, head_dim], past_tokens [B])`: causal attention of
    /// each new token over its sequence up to itself, `f32[B·T, heads · head_dim]`; softmax in FP32
    /// (Vaswani et al.; grouped queries as Ainslie et al.: head h reads kv head `h / (heads / kv_heads)`).
    Attention {
        /// Scale of `q · k`.
        scale: f32,
    },
    /// `(x)`: `max(x, 0)²`.
    Relu2,
    /// `(x, y)` of one type: `x + y`.
    Add,
}

impl Op {
    /// The op's descriptor.
    pub(super) fn descriptor(&self) -> OpDescriptor<'_> {
        use Accepts::{Any, Codes, Exactly, Floats, SameAs};
        const CACHE: &[&str] = &["B", "heads", "S", "head_dim"];
        match self {
            Op::Input(input) => OpDescriptor::stated("input", format!("{input:?}")),
            Op::Const(expr) => OpDescriptor::stated("const", expr.to_string()),
            Op::AddScalar(scalar) => OpDescriptor::new("add_scalar", const { &[operand("x", Floats).of_any_shape()] })
                .attributes(scalar.to_string())
                .folding(move |inner| Const::AddScalar(Box::new(inner), *scalar))
                .result(move |x| Ok(x.operand(0).clone())),
            Op::Cast(dtype) => OpDescriptor::new("cast", const { &[operand("x", Floats).of_any_shape()] })
                .attributes(dtype.to_string())
                .folding(move |inner| Const::Cast(Box::new(inner), *dtype))
                .result(move |x| match dtype.is_float() {
                    true => Ok(Type { dtype: *dtype, shape: x.operand(0).shape.clone() }),
                    false => Err("casts between floats only".into()),
                }),
            Op::Gather => OpDescriptor::new(
                "gather",
                const {
                    &[
                        operand("indices", Exactly(I32)).of(&["n"]),
                        // An activation is gathered in its own type.
                        operand("table", Floats).of(&["rows", "width"]).narrowed(Narrowing::CheckpointTensors),
                    ]
                },
            )
            .result(move |x| x.typed(F32, ["n", "width"])),
            Op::LayerNorm { eps } => OpDescriptor::new(
                "layer_norm",
                const {
                    &[
                        operand("x", Exactly(F32)).of(&["n", "width"]),
                        operand("gamma", Floats).of(&["width"]),
                        operand("beta", Floats).of(&["width"]),
                    ]
                },
            )
            .attributes(format!("eps {eps:e}"))
            .result(move |x| Ok(x.operand(0).clone())),
            Op::Linear => OpDescriptor::new(
                "linear",
                const {
                    &[
                        operand("x", Floats).of(&["n", "in"]).narrowed(Narrowing::Always),
                        operand("weight", SameAs(0)).of(&["out", "in"]).narrowed(Narrowing::Always),
                    ]
                },
            )
            .result(move |x| x.typed(F32, ["n", "out"])),
            Op::QuantizedLinear { block } => OpDescriptor::new(
                "quantized_linear",
                const {
                    &[
                        operand("x", Floats).of(&["n", "in"]),
                        operand("codes", Codes).of(&["out", "in"]),
                        operand("scales", Exactly(F32)).of(&["out", "blocks"]),
                    ]
                },
            )
            .attributes(block.map_or("blocks of a row".into(), |block| format!("blocks of {block}")))
            .result(move |x| {
                let blocks = match block {
                    Some(0) => return Err("the group size is 0, expected at least 1".into()),
                    Some(block) => x.known("in")?.div_ceil(*block),
                    None => 1,
                };
                x.expect("blocks", blocks.into())?;
                x.typed(F32, ["n", "out"])
            }),
            Op::FakeQuantize { code, scale } => {
                OpDescriptor::new("fake_quantize", const { &[operand("x", Floats).of_any_shape()] })
                    .attributes(format!("{code} scale {scale}"))
                    .result(move |x| match (code, scale.is_finite() && *scale > 0.0) {
                        (DType::F8 | DType::I8, true) => Ok(Type { dtype: F32, shape: x.operand(0).shape.clone() }),
                        (DType::F8 | DType::I8, false) => {
                            Err(format!("the scale is {scale}, expected a positive number"))
                        }
                        _ => Err(format!("inputs are quantized to f8 or i8, not to {code}")),
                    })
            }
            Op::Columns { start, width } => {
                OpDescriptor::new("columns", const { &[operand("x", Any).of(&["n", "width"])] })
                    .attributes(format!("{start}..{}", start.saturating_add(*width)))
                    .result(move |x| match start.checked_add(*width) {
                        Some(end) if *width > 0 && end <= x.known("width")? => {
                            Ok(Type::new(x.operand(0).dtype, [x.dim("n")?, (*width).into()]))
                        }
                        _ => Err(format!("columns {start}.. of {width} are outside x, which is {}", x.operand(0))),
                    })
            }
            Op::RotaryAngle { trig, theta, rotary_dim } => {
                OpDescriptor::new("rotary_angle", const { &[operand("positions", Exactly(I32)).of(&["n"])] })
                    .attributes(format!("{trig} theta {theta} dims {rotary_dim}"))
                    .result(move |x| match rotary_dim.is_multiple_of(2) && *rotary_dim > 0 {
                        true => Ok(Type::new(F32, [x.dim("n")?, (rotary_dim / 2).into()])),
                        false => Err(format!("rotary_dim {rotary_dim} is not a positive even number")),
                    })
            }
            Op::Rotary { head_dim } => OpDescriptor::new(
                "rotary",
                const {
                    &[
                        operand("x", Exactly(F32)).of(&["n", "width"]),
                        operand("cos", Exactly(F32)).of(&["n", "half"]),
                        operand("sin", Exactly(F32)).of(&["n", "half"]),
                    ]
                },
            )
            .attributes(format!("head_dim {head_dim}"))
            .result(move |x| {
                let (width, half) = (x.known("width")?, x.known("half")?);
                if *head_dim > 0 && width.is_multiple_of(*head_dim) && half > 0 && half <= head_dim / 2 {
                    return Ok(x.operand(0).clone());
                }
                Err(format!("head_dim {head_dim} does not match x {} and cos {}", x.operand(0), x.operand(1)))
            }),
            Op::CacheUpdate => OpDescriptor::new(
                "cache_update",
                const {
                    &[
                        operand("cache", Floats).of(CACHE),
                        operand("new", SameAs(0)).of(&["n", "width"]).narrowed(Narrowing::Always),
                        operand("past_tokens", Exactly(I32)).of(&["B"]),
                    ]
                },
            )
            .result(move |x| {
                match x.known("heads")?.checked_mul(x.known("head_dim")?) == Some(x.known("width")?) {
                    true => Ok(x.operand(0).clone()),
                    false => {
                        Err(format!("new is {}, which does not match a position of {}", x.operand(1), x.operand(0)))
                    }
                }
            }),
            Op::Attention { scale } => OpDescriptor::new(
                "attention",
                const {
                    &[
                        operand("q", Exactly(F32)).of(&["n", "width"]),
                        operand("keys", Floats).of(CACHE),
                        operand("values", SameAs(1)).of(CACHE),
                        operand("past_tokens", Exactly(I32)).of(&["B"]),
                    ]
                },
            )
            .attributes(format!("scale {scale}"))
            .result(move |x| {
                let position = x.known("heads")?.checked_mul(x.known("head_dim")?);
                let width = x.known("width")?;
                match position.is_some_and(|position| position > 0 && width > 0 && width.is_multiple_of(position)) {
                    true => Ok(x.operand(0).clone()),
                    false => Err(format!("q is {}, not a multiple of the kv heads of {}", x.operand(0), x.operand(1))),
                }
            }),
            Op::Relu2 => OpDescriptor::new("relu2", const { &[operand("x", Floats).of_any_shape()] })
                .result(move |x| Ok(x.operand(0).clone())),
            Op::Add => OpDescriptor::new(
                "add",
                const { &[operand("x", Floats).of_any_shape(), operand("y", SameAs(0)).of_any_shape()] },
            )
            .result(move |x| match x.operand(0).shape == x.operand(1).shape {
                true => Ok(x.operand(0).clone()),
                false => Err(format!("x is {} but y is {}", x.operand(0), x.operand(1))),
            }),
        }
    }
}
