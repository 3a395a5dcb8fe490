//! The closed set of operations, and the rule that gives each its result type.

use std::fmt;

use super::dim::{Dim, Sym};
use crate::quantize::Scheme;
use crate::tensor::DType;

/// An element type and a symbolic shape.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Type {
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<Dim>,
}

impl Type {
    /// A type from anything that converts to dimensions.
    pub fn new(dtype: DType, shape: impl IntoIterator<Item = Dim>) -> Type {
        Type { dtype, shape: shape.into_iter().collect() }
    }

    /// The last dimension if it is known: the width of a row.
    pub fn width(&self) -> Option<usize> {
        self.shape.last().and_then(|d| d.as_fixed())
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        write!(f, "{}[{}]", self.dtype, dims.join(", "))
    }
}

/// What a step supplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Input {
    /// Token ids, `i32[B·T]`.
    TokenIds,
    /// Each token's position in its sequence, `i32[B·T]`.
    Positions,
    /// Tokens each sequence had in the cache before the step, `i32[B]`.
    PastTokens,
    /// Indices into the step's tokens whose logits are wanted, `i32[R]`.
    LogitsRows,
    /// A layer's keys, `[B, kv_heads, S, head_dim]`.
    KeyCache(usize),
    /// A layer's values, `[B, kv_heads, S, head_dim]`.
    ValueCache(usize),
}

/// A value that is known before any step: an expression over the checkpoint's tensors, evaluated by the packer.
#[derive(Debug, Clone, PartialEq)]
pub enum Const {
    /// A tensor of the checkpoint, by its Hugging Face name.
    Tensor(String),
    /// `inner + scalar`, added in FP32.
    AddScalar(Box<Const>, f32),
    /// Matrices of equal width, one above the other.
    ConcatRows(Vec<Const>),
    /// `f32[positions, rotary_dim / 2]`: see [`Trig`].
    RotaryTable {
        /// Cosine or sine.
        trig: Trig,
        /// Base of the frequencies.
        theta: f64,
        /// Rotating dimensions of a head.
        rotary_dim: usize,
        /// Rows: positions 0 .. positions.
        positions: usize,
    },
    /// `inner` rounded to another element type, ties to even.
    Cast(Box<Const>, DType),
    /// The codes of a matrix, `[rows, columns]` of the scheme's dtype: see [`crate::quantize`].
    Codes(Box<Const>, Scheme),
    /// The scales of a matrix's codes, `f32[rows, blocks]`.
    Scales {
        /// The matrix.
        matrix: Box<Const>,
        /// How its rows are quantized.
        scheme: Scheme,
        /// Its columns.
        columns: usize,
    },
}

impl Const {
    /// The checkpoint tensors the expression reads.
    pub fn tensors<'a>(&'a self, names: &mut Vec<&'a str>) {
        match self {
            Const::Tensor(name) => names.push(name),
            Const::AddScalar(inner, _) | Const::Cast(inner, _) | Const::Codes(inner, _) => inner.tensors(names),
            Const::Scales { matrix, .. } => matrix.tensors(names),
            Const::ConcatRows(parts) => parts.iter().for_each(|p| p.tensors(names)),
            Const::RotaryTable { .. } => {}
        }
    }
}

impl fmt::Display for Const {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Const::Tensor(name) => f.write_str(name),
            Const::AddScalar(inner, scalar) => write!(f, "({inner} + {scalar})"),
            Const::ConcatRows(parts) => {
                let parts: Vec<String> = parts.iter().map(Const::to_string).collect();
                write!(f, "rows({})", parts.join("; "))
            }
            Const::RotaryTable { trig, theta, rotary_dim, positions } => {
                write!(f, "rotary_{trig}(theta {theta}, dims {rotary_dim}, positions {positions})")
            }
            Const::Cast(inner, dtype) => write!(f, "{dtype}({inner})"),
            Const::Codes(inner, scheme) => write!(f, "codes({inner}; {scheme})"),
            Const::Scales { matrix, scheme, .. } => write!(f, "scales({matrix}; {scheme})"),
        }
    }
}

/// Which function of the rotary angle `position · theta^(−2i / rotary_dim)`, `i < rotary_dim / 2`
/// (Su et al., "RoFormer"; frequencies and angles are rounded to FP32 as transformers does).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trig {
    /// Cosine.
    Cos,
    /// Sine.
    Sin,
}

impl fmt::Display for Trig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Trig::Cos => "cos",
            Trig::Sin => "sin",
        })
    }
}

/// One operation. Each defines one value; operands are listed in the order given here.
/// A new op needs its type rule below, a CPU kernel (`backend/cpu/lower.rs`) and a lowering to TensorRT
/// (`backend/tensorrt/lower.rs`): each is an exhaustive `match`, so a missing one does not compile.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// Supplied by the step.
    Input(Input),
    /// Known before any step.
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
        /// Inputs that share a scale; `None`: all of a row.
        block: Option<usize>,
    },
    /// `(x)`: `scale` times the nearest E4M3 float to `x / scale`, FP32; what is out of E4M3's range becomes its end.
    /// A backend with FP8 products quantizes here and takes the scale out of the sums.
    RoundToF8 {
        /// What an E4M3 one stands for.
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
    /// tokens written behind each sequence's past ones. It replaces its operand.
    CacheUpdate,
    /// `(q [B·T, heads · head_dim], keys, values [B, kv_heads, S, head_dim], past_tokens [B])`: causal attention of
    /// each new token over its sequence up to itself, `f32[B·T, heads · head_dim]`; softmax in FP32
    /// (Vaswani et al.; grouped queries as Ainslie et al.: head h reads kv head `h / (heads / kv_heads)`).
    Attention {
        /// Multiplies `q · k`.
        scale: f32,
    },
    /// `(x)`: `max(x, 0)²`.
    Relu2,
    /// `(x, y)` of one type: `x + y`.
    Add,
}

impl Op {
    /// The op's kind, for messages and dumps.
    pub fn kind(&self) -> &'static str {
        match self {
            Op::Input(_) => "input",
            Op::Const(_) => "const",
            Op::AddScalar(_) => "add_scalar",
            Op::Cast(_) => "cast",
            Op::Gather => "gather",
            Op::LayerNorm { .. } => "layer_norm",
            Op::Linear => "linear",
            Op::QuantizedLinear { .. } => "quantized_linear",
            Op::RoundToF8 { .. } => "round_to_f8",
            Op::Columns { .. } => "columns",
            Op::RotaryAngle { .. } => "rotary_angle",
            Op::Rotary { .. } => "rotary",
            Op::CacheUpdate => "cache_update",
            Op::Attention { .. } => "attention",
            Op::Relu2 => "relu2",
            Op::Add => "add",
        }
    }

    /// Attributes for the text dump, with a leading space where there are any.
    pub(super) fn attributes(&self) -> String {
        match self {
            Op::Input(input) => format!(" {input:?}"),
            Op::Const(expr) => format!(" {expr}"),
            Op::AddScalar(scalar) => format!(" {scalar}"),
            Op::Cast(dtype) => format!(" {dtype}"),
            Op::LayerNorm { eps } => format!(" eps {eps:e}"),
            Op::QuantizedLinear { block: Some(block) } => format!(" blocks of {block}"),
            Op::QuantizedLinear { block: None } => " blocks of a row".into(),
            Op::Columns { start, width } => format!(" {start}..{}", start + width),
            Op::RotaryAngle { trig, theta, rotary_dim } => format!(" {trig} theta {theta} dims {rotary_dim}"),
            Op::Rotary { head_dim } => format!(" head_dim {head_dim}"),
            Op::Attention { scale } | Op::RoundToF8 { scale } => format!(" scale {scale}"),
            Op::Gather | Op::Linear | Op::CacheUpdate | Op::Relu2 | Op::Add => String::new(),
        }
    }

    /// The type of the op's value. `Input` and `Const` state theirs, so they are not asked.
    /// The error says which operand is wrong, what it is and what was expected.
    pub(super) fn infer(&self, operands: &[&Type]) -> Result<Type, String> {
        use DType::{F32, I32};
        let count = |n: usize| {
            (operands.len() == n).then_some(()).ok_or_else(|| format!("takes {n} operands, got {}", operands.len()))
        };
        let rank = |what: &str, t: &Type, n: usize| {
            (t.shape.len() == n).then_some(()).ok_or_else(|| format!("{what} is {t}, expected {n} dimensions"))
        };
        let float = |what: &str, t: &Type| {
            t.dtype.is_float().then_some(()).ok_or_else(|| format!("{what} is {t}, expected floats"))
        };
        let is = |what: &str, t: &Type, dtype: DType| {
            (t.dtype == dtype).then_some(()).ok_or_else(|| format!("{what} is {t}, expected {dtype}"))
        };
        let equal = |what: &str, t: &Type, dim: Dim, expected: Dim| {
            (dim == expected).then_some(()).ok_or_else(|| format!("{what} is {t}: found {dim}, expected {expected}"))
        };
        match self {
            Op::Input(_) | Op::Const(_) => Err("has no operands to infer a type from".into()),
            Op::AddScalar(_) | Op::Relu2 => {
                count(1)?;
                float("x", operands[0])?;
                Ok(operands[0].clone())
            }
            Op::Cast(dtype) => {
                count(1)?;
                float("x", operands[0])?;
                if !dtype.is_float() {
                    return Err("casts between floats only".into());
                }
                Ok(Type { dtype: *dtype, shape: operands[0].shape.clone() })
            }
            Op::Gather => {
                count(2)?;
                let [indices, table] = [operands[0], operands[1]];
                is("indices", indices, I32)?;
                rank("indices", indices, 1)?;
                rank("table", table, 2)?;
                float("table", table)?;
                Ok(Type::new(F32, [indices.shape[0], table.shape[1]]))
            }
            Op::LayerNorm { .. } => {
                count(3)?;
                let x = operands[0];
                rank("x", x, 2)?;
                is("x", x, F32)?;
                for (what, t) in [("gamma", operands[1]), ("beta", operands[2])] {
                    rank(what, t, 1)?;
                    float(what, t)?;
                    equal(what, t, t.shape[0], x.shape[1])?;
                }
                Ok(x.clone())
            }
            Op::Linear => {
                count(2)?;
                let [x, weight] = [operands[0], operands[1]];
                rank("x", x, 2)?;
                rank("weight", weight, 2)?;
                float("x", x)?;
                is("weight", weight, x.dtype)?;
                equal("weight", weight, weight.shape[1], x.shape[1])?;
                Ok(Type::new(F32, [x.shape[0], weight.shape[0]]))
            }
            Op::QuantizedLinear { block } => {
                count(3)?;
                let [x, codes, scales] = [operands[0], operands[1], operands[2]];
                rank("x", x, 2)?;
                float("x", x)?;
                rank("codes", codes, 2)?;
                if !codes.dtype.is_code() {
                    return Err(format!("codes is {codes}, expected i8, i4 or f8"));
                }
                equal("codes", codes, codes.shape[1], x.shape[1])?;
                rank("scales", scales, 2)?;
                is("scales", scales, F32)?;
                equal("scales", scales, scales.shape[0], codes.shape[0])?;
                let columns = codes.width().ok_or_else(|| format!("codes is {codes}: width must be known"))?;
                let blocks = match block {
                    Some(0) => return Err("blocks have at least one input".into()),
                    Some(block) => columns.div_ceil(*block),
                    None => 1,
                };
                equal("scales", scales, scales.shape[1], blocks.into())?;
                Ok(Type::new(F32, [x.shape[0], codes.shape[0]]))
            }
            Op::RoundToF8 { scale } => {
                count(1)?;
                float("x", operands[0])?;
                if !(scale.is_finite() && *scale > 0.0) {
                    return Err(format!("the scale is {scale}, expected a positive number"));
                }
                Ok(Type { dtype: F32, shape: operands[0].shape.clone() })
            }
            Op::Columns { start, width } => {
                count(1)?;
                rank("x", operands[0], 2)?;
                let have = operands[0].width().ok_or_else(|| format!("x is {}: width must be known", operands[0]))?;
                match start.checked_add(*width) {
                    Some(end) if end <= have && *width > 0 => {
                        Ok(Type::new(operands[0].dtype, [operands[0].shape[0], (*width).into()]))
                    }
                    _ => Err(format!("columns {start}.. of {width} are outside x, which is {}", operands[0])),
                }
            }
            Op::RotaryAngle { rotary_dim, .. } => {
                count(1)?;
                is("positions", operands[0], I32)?;
                rank("positions", operands[0], 1)?;
                if rotary_dim % 2 != 0 || *rotary_dim == 0 {
                    return Err(format!("rotary_dim {rotary_dim} is not a positive even number"));
                }
                Ok(Type::new(F32, [operands[0].shape[0], (rotary_dim / 2).into()]))
            }
            Op::Rotary { head_dim } => {
                count(3)?;
                let [x, cos, sin] = [operands[0], operands[1], operands[2]];
                rank("x", x, 2)?;
                is("x", x, F32)?;
                for (what, t) in [("cos", cos), ("sin", sin)] {
                    rank(what, t, 2)?;
                    is(what, t, F32)?;
                    equal(what, t, t.shape[0], x.shape[0])?;
                    equal(what, t, t.shape[1], cos.shape[1])?;
                }
                match (x.width(), cos.width()) {
                    (Some(width), Some(half))
                        if *head_dim > 0 && width % head_dim == 0 && half > 0 && 2 * half <= *head_dim =>
                    {
                        Ok(x.clone())
                    }
                    _ => Err(format!("heads of {head_dim} do not fit x {x} with angles {cos}")),
                }
            }
            Op::CacheUpdate => {
                count(3)?;
                let [cache, new, past] = [operands[0], operands[1], operands[2]];
                cache_type("cache", cache)?;
                rank("new", new, 2)?;
                is("new", new, cache.dtype)?;
                is("past_tokens", past, I32)?;
                let width = cache_width(cache);
                if new.width() != width || width.is_none() {
                    return Err(format!("new is {new}, which does not fill a position of {cache}"));
                }
                Ok(cache.clone())
            }
            Op::Attention { .. } => {
                count(4)?;
                let [q, keys, values, past] = [operands[0], operands[1], operands[2], operands[3]];
                rank("q", q, 2)?;
                is("q", q, F32)?;
                cache_type("keys", keys)?;
                is("past_tokens", past, I32)?;
                if keys != values {
                    return Err(format!("keys are {keys} but values are {values}"));
                }
                match (q.width(), keys.shape[1].as_fixed(), keys.shape[3].as_fixed()) {
                    (Some(width), Some(kv_heads), Some(head_dim))
                        if kv_heads > 0 && head_dim > 0 && width % (kv_heads * head_dim) == 0 && width > 0 =>
                    {
                        Ok(q.clone())
                    }
                    _ => Err(format!("q is {q}, not a multiple of the kv heads of {keys}")),
                }
            }
            Op::Add => {
                count(2)?;
                if operands[0] != operands[1] {
                    return Err(format!("x is {} but y is {}", operands[0], operands[1]));
                }
                float("x", operands[0])?;
                Ok(operands[0].clone())
            }
        }
    }
}

fn cache_type(what: &str, t: &Type) -> Result<(), String> {
    let fits = t.shape.len() == 4 && t.shape[0] == Dim::sym(Sym::B) && t.shape[2] == Dim::sym(Sym::S);
    (fits && t.dtype.is_float()).then_some(()).ok_or_else(|| format!("{what} is {t}, expected [B, heads, S, width]"))
}

fn cache_width(t: &Type) -> Option<usize> {
    t.shape[1].as_fixed()?.checked_mul(t.shape[3].as_fixed()?)
}
