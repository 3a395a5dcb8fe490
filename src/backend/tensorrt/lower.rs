//! Lowering of the graph to a TensorRT network. The network computes in the graph's types: FP32 sums, norms, rotary
//! embeddings and residuals around BF16 GEMMs. TensorRT fuses the casts with their neighbours, so they cost no
//! launches.
//!
//! Activations are `[B·T, width]`, and `[B, heads, T, head_dim]` from the rotary embedding through attention. Weights
//! are inputs of the network, so that plans share one copy and need not embed them. Quantized codes are stored `[in,
//! out]`, which TensorRT's GEMMs read directly; as inputs stored `[out, in]`, they would be transposed in every step.
//! 4-bit codes are constants of the network: as inputs they would be unpacked to BF16 in every step. E4M3 codes are
//! either ([`Fp8Weights`]). Where inputs are 8-bit
//! integers too, codes are stored `[out, in]`.

mod integers;
mod profiles;
mod quantized;

use std::collections::HashMap;
use std::sync::Arc;

use self::quantized::common_divisor;
pub use super::weights::{Constants, PlanWeight, WeightLayout};
use super::{AttentionMask, Layers, Network, NetworkTensor, OptimizationProfile};
use crate::backend::constants::ConstRows;
pub use crate::engine::tensorrt::{AttentionInput, Fp8Weights, Sizes};
use crate::engine::tensorrt::{Binding, BindingRole, Extent, StepSize};
use crate::error::{Error, Result};
use crate::graph::{Const, Graph, Input, Node, Op, Type, Value};
use crate::tensor::DType;

/// Name of the input with each sequence's length after the step, `i32[B]`: the keys that attention reads.
pub const TOTAL_TOKENS: &str = "total_tokens";
/// Name of the input with the keys that each query attends to, `bool[B, 1, T, S]`.
pub const ATTENTION_MASK: &str = "attention_mask";
/// Name of the output with the logits of the requested rows, `f32[R, vocab]`.
pub const LOGITS: &str = "logits";
/// Name of the output with the largest logits of each requested row in descending order, `f32[R, k]`.
pub const TOP_LOGITS: &str = "top_logits";
/// Name of the output with their token ids, `i32[R, k]`.
pub const TOP_IDS: &str = "top_ids";
/// Name of the output with sums of each requested row of logits, `f32[R, p]`, each of `vocab / p` logits. A NaN or an
/// infinity among the logits shows in them, whatever TopK makes of one.
pub const LOGIT_SUMS: &str = "logit_sums";
/// Most sums of a row. With one sum of a wide row, TensorRT for RTX shares the row out among blocks and needs a second
/// kernel to clear their counter.
const MOST_SUMS: usize = 64;
/// TensorRT's limit for k in TopK.
pub const MOST_TOP_TOKENS: usize = 3840;

/// Source of the keys and values that attention reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attends {
    /// The cache, as far as the input says. Works for any step, but in prefill TensorRT copies the layer's whole cache.
    Cache(AttentionInput),
    /// The step's own keys and values, for the context plan: sequences have no past, so the cache is only written. The
    /// mask is causal, so padding after a sequence's tokens does not reach them.
    Chunk,
}

/// A network with its bindings, weights and profiles.
#[derive(Debug)]
pub struct LoweredNetwork<N = Network> {
    /// The network, ready to be built.
    pub network: N,
    /// Inputs and outputs, weights first.
    pub bindings: Vec<Binding>,
    /// Weights: inputs in the order of the bindings, and embedded constants.
    pub weights: Vec<PlanWeight>,
    /// Profiles of the steps it can run: prefill, then, if it attends to the cache, decode, by batch ascending.
    pub profiles: Vec<OptimizationProfile>,
}

/// Choices of a lowering that neither the graph nor the sizes make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoweringOptions {
    /// The way that the plan holds E4M3 codes.
    pub fp8_weights: Fp8Weights,
    /// Largest batches of decode profiles, ascending; those from the sizes' largest batch on are ignored. Empty: one
    /// profile for every batch.
    pub decode_batches: Vec<usize>,
}

/// Lowers a graph into an empty network, with the default [`LoweringOptions`].
///
/// # Errors
/// [`Error::Graph`] naming an op that cannot be lowered where it stands; [`Error::TensorRt`] with TensorRT's message.
pub fn lower<N: Layers>(
    graph: &Graph,
    network: N,
    attends: Attends,
    sizes: &Sizes,
    constants: &Constants,
) -> Result<LoweredNetwork<N>> {
    lower_with(graph, network, attends, sizes, constants, &LoweringOptions::default())
}

/// Lowers a graph into an empty network.
///
/// # Errors
/// As [`lower`].
pub fn lower_with<N: Layers>(
    graph: &Graph,
    network: N,
    attends: Attends,
    sizes: &Sizes,
    constants: &Constants,
    options: &LoweringOptions,
) -> Result<LoweredNetwork<N>> {
    let mut lowering = NetworkLowering {
        graph,
        attends,
        sizes,
        constants,
        options,
        arbitrary: Arc::default(),
        network,
        places: Vec::with_capacity(graph.nodes().len()),
        per_token: HashMap::new(),
        step_shape: None,
        cached_keys: AttentionMask::Causal,
        weights: Vec::new(),
        bindings: Vec::new(),
    };
    if let Attends::Cache(input) = attends {
        lowering.cached_keys = lowering.attention_input(input)?;
    }
    for (_, node) in graph.iter() {
        lowering.network.scope(&node.name);
        let place = lowering.node(node)?;
        lowering.places.push(place);
    }
    lowering.finish()
}

/// Representation of a graph value in the network.
#[derive(Debug, Clone, Copy)]
enum LoweredValue {
    /// A tensor of the graph's shape.
    Plain(NetworkTensor),
    /// `[B, heads, T, head_dim]`, where the graph has `[B·T, heads · head_dim]`.
    Heads { tensor: NetworkTensor, heads: usize, head_dim: usize },
    /// A layer's cache after the step, `[B, heads, S, head_dim]`, and the new entries, `[B, heads, T, head_dim]`.
    Cache { cache: NetworkTensor, new: NetworkTensor },
    /// Columns `[start, start + width)` of `[B·T, all]`, which attention reads as heads.
    Columns { of: NetworkTensor, all: usize, start: usize, width: usize },
    /// E4M3 floats or 8-bit integers, and their scale.
    Codes { codes: NetworkTensor, scale: NetworkTensor },
    /// Codes or scales of a quantized weight, added by the linear layer that reads them.
    WeightPart,
}

struct NetworkLowering<'g, N> {
    graph: &'g Graph,
    attends: Attends,
    sizes: &'g Sizes,
    constants: &'g Constants,
    options: &'g LoweringOptions,
    /// Shared content of arbitrary constants, as long as the longest one.
    arbitrary: Arc<[u8]>,
    network: N,
    places: Vec<LoweredValue>,
    /// `[B·T, width]` values reshaped to `[B, T, width]`, cached because every layer uses the same rotary angles.
    per_token: HashMap<Value, NetworkTensor>,
    /// `i64[2]`: B and T.
    step_shape: Option<NetworkTensor>,
    /// The keys of the cache that queries attend to.
    cached_keys: AttentionMask,
    weights: Vec<PlanWeight>,
    bindings: Vec<Binding>,
}

impl<N: Layers> NetworkLowering<'_, N> {
    fn node(&mut self, node: &Node) -> Result<LoweredValue> {
        let dtype = node.ty.dtype;
        match &node.op {
            Op::Input(input) => self.input(node, *input),
            Op::Const(Const::Codes(..) | Const::Scales { .. }) => Ok(LoweredValue::WeightPart),
            Op::Const(expr) => {
                let content = plain_form(node, expr, &node.ty)?;
                let shape: Vec<usize> = match node.ty.shape.len() {
                    1 => vec![content.width()],
                    _ => vec![content.rows(), content.width()],
                };
                Ok(LoweredValue::Plain(self.weight(PlanWeight::rows(&node.name, dtype, shape, content))?))
            }
            Op::AddScalar(scalar) => {
                let [x] = operands(node)?;
                let x = self.plain(x)?;
                let scalar = self.network.scalar(*scalar, rank(node)?)?;
                let scalar = self.typed(scalar, DType::F32, dtype)?;
                Ok(LoweredValue::Plain(self.network.sum(x, scalar)?))
            }
            Op::Cast(to) => {
                let [x] = operands(node)?;
                let from = self.graph.node(x).ty.dtype;
                Ok(match self.place(x) {
                    LoweredValue::Heads { tensor, heads, head_dim } => {
                        LoweredValue::Heads { tensor: self.typed(tensor, from, *to)?, heads, head_dim }
                    }
                    LoweredValue::Columns { of, all, start, width } => {
                        LoweredValue::Columns { of: self.typed(of, from, *to)?, all, start, width }
                    }
                    _ => {
                        let x = self.plain(x)?;
                        LoweredValue::Plain(self.typed(x, from, *to)?)
                    }
                })
            }
            Op::Gather => {
                let [indices, table] = operands(node)?;
                let from = self.graph.node(table).ty.dtype;
                let (indices, table) = (self.plain(indices)?, self.plain(table)?);
                let rows = self.network.gather(table, indices)?;
                Ok(LoweredValue::Plain(self.typed(rows, from, dtype)?))
            }
            Op::LayerNorm { eps } => {
                let [x, gamma, beta] = operands(node)?;
                let row = |this: &mut Self, value: Value| {
                    let from = this.graph.node(value).ty.dtype;
                    let width = size(this.graph.node(value).ty.width(), node)?;
                    let vector = this.plain(value)?;
                    let vector = this.network.reshape(vector, &[1, width])?;
                    this.typed(vector, from, dtype)
                };
                let (gamma, beta) = (row(self, gamma)?, row(self, beta)?);
                let x = self.plain(x)?;
                Ok(LoweredValue::Plain(self.network.layer_norm(x, gamma, beta, *eps as f32)?))
            }
            Op::Linear => {
                let [x, weight] = operands(node)?;
                let from = self.graph.node(x).ty.dtype;
                let (x, weight) = (self.plain(x)?, self.plain(weight)?);
                let product = self.network.linear(x, weight)?;
                Ok(LoweredValue::Plain(self.typed(product, from, dtype)?))
            }
            Op::Columns { start, width } => {
                let [x] = operands(node)?;
                if let Some(columns) = self.columns_of_constants(x, *start, *width)? {
                    return Ok(columns);
                }
                let x = self.plain(x)?;
                Ok(LoweredValue::Plain(self.columns(node, x, *start, *width)?))
            }
            Op::RotaryAngle { trig, theta, rotary_dim } => {
                let [positions] = operands(node)?;
                let rows = self.sizes.position_tokens;
                let expr = Const::RotaryTable { trig: *trig, theta: *theta, rotary_dim: *rotary_dim, positions: rows };
                let name = format!("{}.table", node.name);
                let ty = Type::new(dtype, [rows.into(), (rotary_dim / 2).into()]);
                let content = plain_form(node, &expr, &ty)?;
                let table = self.weight(PlanWeight::rows(&name, dtype, vec![rows, rotary_dim / 2], content))?;
                let positions = self.plain(positions)?;
                Ok(LoweredValue::Plain(self.network.gather(table, positions)?))
            }
            Op::Rotary { head_dim } => {
                let [x, cos, sin] = operands(node)?;
                let half = size(self.graph.node(cos).ty.width(), node)?;
                let (tensor, heads) = self.heads(node, x, *head_dim)?;
                let (cos, sin) = (self.per_token(cos, half)?, self.per_token(sin, half)?);
                let rotary_dims = u32::try_from(2 * half).map_err(|_| fail(node, "its rotary dims are too many"))?;
                let tensor = self.network.rotary(tensor, cos, sin, rotary_dims)?;
                Ok(LoweredValue::Heads { tensor, heads, head_dim: *head_dim })
            }
            Op::CacheUpdate => {
                let [cache, new, past_tokens] = operands(node)?;
                let head_dim = node.ty.width().ok_or_else(|| fail(node, "its head_dim must be known"))?;
                let (new, _) = self.heads(node, new, head_dim)?;
                let (cache, past_tokens) = (self.plain(cache)?, self.plain(past_tokens)?);
                let cache = self.network.cache_update(cache, new, past_tokens)?;
                Ok(LoweredValue::Cache { cache, new })
            }
            Op::Attention { scale } => {
                let [q, keys, values, _] = operands(node)?;
                self.attention(node, *scale, [q, keys, values])
            }
            Op::Relu2 => {
                let [x] = operands(node)?;
                let x = self.plain(x)?;
                let x = self.network.relu(x)?;
                Ok(LoweredValue::Plain(self.network.product(x, x)?))
            }
            Op::Add => {
                let [x, y] = operands(node)?;
                let (x, y) = (self.plain(x)?, self.plain(y)?);
                Ok(LoweredValue::Plain(self.network.sum(x, y)?))
            }
            Op::FakeQuantize { code, scale } => {
                let [x] = operands(node)?;
                let x = self.plain(x)?;
                let scale = self.network.scalar(*scale, 0)?;
                Ok(LoweredValue::Codes { codes: self.network.quantize(x, scale, *code)?, scale })
            }
            Op::QuantizedLinear { block } => {
                let [x, codes, scales] = operands(node)?;
                let product = match (self.place(x), self.graph.node(codes).ty.dtype, block) {
                    (LoweredValue::Codes { codes: x, scale }, DType::I8, None) => {
                        self.integer_linear(node, (x, scale), [codes, scales])?
                    }
                    _ => self.quantized_linear(node, *block, [x, codes, scales])?,
                };
                Ok(LoweredValue::Plain(product))
            }
        }
    }

    /// Adds an input. Inputs have the graph's shapes, except that token ids and positions are `[B, T]`: the network
    /// takes B and T from the shape of the token ids.
    fn input(&mut self, node: &Node, input: Input) -> Result<LoweredValue> {
        let [b, t, r] = [StepSize::B, StepSize::T, StepSize::R].map(Extent::Step);
        let cache = || {
            let &[_, kv_heads, _, head_dim] = &node.ty.shape[..] else {
                return Err(fail(node, "a cache has four dimensions"));
            };
            let (Some(kv_heads), Some(head_dim)) = (kv_heads.as_fixed(), head_dim.as_fixed()) else {
                return Err(fail(node, "a cache's heads must be known"));
            };
            Ok(vec![b, Extent::Fixed(kv_heads), Extent::Fixed(self.sizes.max_sequence_tokens), Extent::Fixed(head_dim)])
        };
        let (role, shape) = match input {
            Input::TokenIds => (BindingRole::TokenIds, vec![b, t]),
            Input::Positions => (BindingRole::Positions, vec![b, t]),
            Input::PastTokens => (BindingRole::PastTokens, vec![b]),
            Input::LogitsRows => (BindingRole::LogitsRows, vec![r]),
            Input::KeyCache(layer) => (BindingRole::KeyCache(layer), cache()?),
            Input::ValueCache(layer) => (BindingRole::ValueCache(layer), cache()?),
        };
        let dims: Result<Vec<i64>> = shape
            .iter()
            .map(|extent| match extent {
                Extent::Fixed(n) => size(Some(*n), node),
                Extent::Step(_) => Ok(-1),
            })
            .collect();
        let tensor = self.network.input(&node.name, node.ty.dtype, &dims?)?;
        self.bind(&node.name, role, node.ty.dtype, &shape);
        if input == Input::TokenIds {
            self.step_shape = Some(self.network.shape(tensor)?);
        }
        Ok(LoweredValue::Plain(match input {
            Input::TokenIds | Input::Positions => self.network.reshape(tensor, &[-1])?,
            _ => tensor,
        }))
    }

    /// Adds the input that tells attention which keys of the cache to read.
    fn attention_input(&mut self, input: AttentionInput) -> Result<AttentionMask> {
        let [b, t] = [StepSize::B, StepSize::T].map(Extent::Step);
        let tokens = self.sizes.max_sequence_tokens;
        match input {
            AttentionInput::Lengths => {
                let lengths = self.network.input(TOTAL_TOKENS, DType::I32, &[-1])?;
                self.bind(TOTAL_TOKENS, BindingRole::TotalTokens, DType::I32, &[b]);
                Ok(AttentionMask::Lengths(lengths))
            }
            AttentionInput::Mask => {
                let capacity = i64::try_from(tokens);
                let capacity = capacity.map_err(|_| Error::TensorRt(format!("a size of {tokens} is too large")))?;
                let mask = self.network.input(ATTENTION_MASK, DType::Bool, &[-1, 1, -1, capacity])?;
                let shape = [b, Extent::Fixed(1), t, Extent::Fixed(tokens)];
                self.bind(ATTENTION_MASK, BindingRole::AttentionMask, DType::Bool, &shape);
                Ok(AttentionMask::Explicit(mask))
            }
        }
    }

    fn bind(&mut self, name: &str, role: BindingRole, dtype: DType, shape: &[Extent]) {
        self.bindings.push(Binding { name: name.into(), role, dtype, shape: shape.to_vec() });
    }

    /// Adds a weight as an input or as an embedded constant.
    fn weight(&mut self, weight: PlanWeight) -> Result<NetworkTensor> {
        let PlanWeight { name, dtype, in_plan, .. } = &weight;
        let shape = weight.shape_in_plan();
        let dims: Option<Vec<i64>> = shape.iter().map(|n| i64::try_from(*n).ok()).collect();
        let dims = dims.ok_or_else(|| Error::TensorRt(format!("weight {name} is too large: {shape:?}")))?;
        let tensor = if *in_plan {
            let bytes = self.constant(&weight)?;
            self.network.constant(bytes, *dtype, &dims)?
        } else {
            self.network.input(name, *dtype, &dims)?
        };
        self.weights.push(weight);
        Ok(tensor)
    }

    /// TensorRT's attention does not scale the scores, so the queries are scaled, before rounding to the cache's type.
    fn attention(&mut self, node: &Node, scale: f32, [q, keys, values]: [Value; 3]) -> Result<LoweredValue> {
        let (
            LoweredValue::Cache { cache: keys, new: new_keys },
            LoweredValue::Cache { cache: values, new: new_values },
        ) = (self.place(keys), self.place(values))
        else {
            return Err(fail(node, "its keys and values are not caches that the step updated"));
        };
        let cache = &self.graph.node(node.operands[1]).ty;
        let head_dim = cache.width().ok_or_else(|| fail(node, "its head_dim must be known"))?;
        let (stored, given) = (cache.dtype, self.graph.node(q).ty.dtype);
        let (q, heads) = self.heads(node, q, head_dim)?;
        let scale = self.network.scalar(scale, 4)?;
        let scale = self.typed(scale, DType::F32, given)?;
        let q = self.network.product(q, scale)?;
        let q = self.typed(q, given, stored)?;
        let tensor = match self.attends {
            Attends::Cache(_) => self.network.attention(q, keys, values, self.cached_keys)?,
            Attends::Chunk => self.network.attention(q, new_keys, new_values, AttentionMask::Causal)?,
        };
        let tensor = self.typed(tensor, stored, node.ty.dtype)?;
        Ok(LoweredValue::Heads { tensor, heads, head_dim })
    }

    /// Columns `[start, start + width)` of a matrix.
    fn columns(&mut self, node: &Node, of: NetworkTensor, start: usize, width: usize) -> Result<NetworkTensor> {
        let first = self.network.integers(&[0])?;
        let shape = self.network.shape(of)?;
        let rows = self.network.gather(shape, first)?;
        let width = self.network.integers(&[size(Some(width), node)?])?;
        let sizes = self.network.concat(&[rows, width])?;
        self.network.slice(of, &[0, size(Some(start), node)?], sizes)
    }

    fn place(&self, value: Value) -> LoweredValue {
        self.places[value.index()]
    }

    /// A value in its shape in the graph.
    fn plain(&mut self, value: Value) -> Result<NetworkTensor> {
        match self.place(value) {
            LoweredValue::Plain(tensor) => Ok(tensor),
            LoweredValue::Cache { cache, .. } => Ok(cache),
            LoweredValue::Columns { of, start, width, .. } => self.columns(self.graph.node(value), of, start, width),
            LoweredValue::Codes { .. } | LoweredValue::WeightPart => {
                Err(fail(self.graph.node(value), "only a quantized linear layer can read it"))
            }
            LoweredValue::Heads { tensor, heads, head_dim } => {
                let width = size(heads.checked_mul(head_dim), self.graph.node(value))?;
                let tensor = self.network.transpose(tensor, &[0, 2, 1, 3])?;
                let tensor = self.network.reshape(tensor, &[-1, width])?;
                self.places[value.index()] = LoweredValue::Plain(tensor);
                Ok(tensor)
            }
        }
    }

    /// A value as `[B, heads, T, head_dim]`, and the number of heads.
    fn heads(&mut self, user: &Node, value: Value, head_dim: usize) -> Result<(NetworkTensor, usize)> {
        if let LoweredValue::Heads { tensor, heads, head_dim: same } = self.place(value)
            && same == head_dim
        {
            return Ok((tensor, heads));
        }
        if let LoweredValue::Columns { of, all, start, width } = self.place(value) {
            return self.heads_of_columns(user, of, [all, start, width], head_dim);
        }
        let width = self.graph.node(value).ty.width().filter(|width| head_dim > 0 && width % head_dim == 0);
        let heads = width.ok_or_else(|| fail(user, &format!("an operand is not of heads of {head_dim}")))? / head_dim;
        let tensor = self.plain(value)?;
        let tensor = self.split(user, tensor, &[size(Some(heads), user)?, size(Some(head_dim), user)?])?;
        Ok((self.network.transpose(tensor, &[0, 2, 1, 3])?, heads))
    }

    /// `[B·T, width]` as `[B, T, width]`.
    fn per_token(&mut self, value: Value, width: i64) -> Result<NetworkTensor> {
        if let Some(tensor) = self.per_token.get(&value) {
            return Ok(*tensor);
        }
        let tensor = self.plain(value)?;
        let graph = self.graph;
        let tensor = self.split(graph.node(value), tensor, &[width])?;
        self.per_token.insert(value, tensor);
        Ok(tensor)
    }

    /// `[B·T, …]` as `[B, T, inner…]`.
    fn split(&mut self, user: &Node, tensor: NetworkTensor, inner: &[i64]) -> Result<NetworkTensor> {
        let step = self.step_shape.ok_or_else(|| fail(user, "the graph has no token ids before it"))?;
        let inner = self.network.integers(inner)?;
        let shape = self.network.concat(&[step, inner])?;
        self.network.reshape_to(tensor, shape)
    }

    fn typed(&mut self, tensor: NetworkTensor, from: DType, to: DType) -> Result<NetworkTensor> {
        if from == to { Ok(tensor) } else { self.network.cast(tensor, to) }
    }

    fn finish(mut self) -> Result<LoweredNetwork<N>> {
        let refuse = |detail: String| Error::Graph { op: "network".into(), name: "tensorrt".into(), detail };
        let graph = self.graph;
        let mut logits = None;
        for output in graph.outputs() {
            let node = graph.node(*output);
            match self.place(*output) {
                LoweredValue::Cache { cache, .. } => {
                    self.network.output(cache, &node.name)?;
                    let before = node.operands.first().and_then(|cache| self.binding_of(*cache));
                    let before = before.ok_or_else(|| fail(node, "it updates something other than an input"))?;
                    let role = match before.role {
                        BindingRole::KeyCache(layer) => BindingRole::UpdatedKeys(layer),
                        BindingRole::ValueCache(layer) => BindingRole::UpdatedValues(layer),
                        _ => return Err(fail(node, "it updates something other than a cache")),
                    };
                    let shape = before.shape.clone();
                    self.bind(&node.name, role, node.ty.dtype, &shape);
                }
                _ if logits.is_none() => logits = Some((self.plain(*output)?, node)),
                _ => return Err(refuse(format!("the graph returns {} beside its logits", node.name))),
            }
        }
        let (logits, node) = logits.ok_or_else(|| refuse("the graph returns no logits".into()))?;
        let vocab_size = node.ty.width().ok_or_else(|| fail(node, "the vocabulary's size must be known"))?;
        let most = MOST_TOP_TOKENS.min(vocab_size);
        if self.sizes.top_tokens == 0 || self.sizes.top_tokens > MOST_TOP_TOKENS {
            let detail = format!("top_tokens is {}, accepted are 1 to {MOST_TOP_TOKENS}", self.sizes.top_tokens);
            return Err(refuse(detail));
        }
        self.network.scope("top");
        let top_tokens = self.sizes.top_tokens.min(most);
        let (values, ids) = self.network.top_k(logits, top_tokens as u32)?;
        // A sum rather than a test for NaN, which a compiler that assumes finite numbers may fold away, or a maximum, which
        // drops NaN on a GPU. A power of two, so that rows of sums are aligned wherever rows of logits are.
        let parts = common_divisor(vocab_size, MOST_SUMS);
        let [split, rest] = [parts, vocab_size / parts].map(|n| size(Some(n), node));
        let split = self.network.reshape(logits, &[-1, split?, rest?])?;
        let sums = self.network.last_sums(split)?;
        for (tensor, name, role, dtype, width) in [
            (logits, LOGITS, BindingRole::Logits, DType::F32, vocab_size),
            (values, TOP_LOGITS, BindingRole::TopLogits, DType::F32, top_tokens),
            (ids, TOP_IDS, BindingRole::TopIds, DType::I32, top_tokens),
            (sums, LOGIT_SUMS, BindingRole::LogitSums, DType::F32, parts),
        ] {
            self.network.output(tensor, name)?;
            self.bind(name, role, dtype, &[Extent::Step(StepSize::R), Extent::Fixed(width)]);
        }
        let profiles = self.profiles()?;
        let inputs = self.weights.iter().filter(|weight| !weight.in_plan);
        let weights = inputs.map(|weight| Binding {
            name: weight.name.clone(),
            role: BindingRole::Weight,
            dtype: weight.dtype,
            shape: weight.shape.iter().map(|n| Extent::Fixed(*n)).collect(),
        });
        let bindings = weights.chain(std::mem::take(&mut self.bindings)).collect();
        Ok(LoweredNetwork { network: self.network, bindings, weights: self.weights, profiles })
    }

    /// The binding of an input.
    fn binding_of(&self, value: Value) -> Option<&Binding> {
        let name = &self.graph.node(value).name;
        self.bindings.iter().find(|binding| binding.name == *name)
    }
}

fn rank(node: &Node) -> Result<u32> {
    u32::try_from(node.ty.shape.len()).map_err(|_| fail(node, "it has too many dimensions"))
}

fn size(n: Option<usize>, node: &Node) -> Result<i64> {
    n.and_then(|n| i64::try_from(n).ok()).ok_or_else(|| fail(node, "a size must be static and fit an i64"))
}

/// The operands of an op with `N` operands. The graph has checked the number.
fn operands<const N: usize>(node: &Node) -> Result<[Value; N]> {
    node.operands[..].try_into().map_err(|_| {
        let found = format!("op {} ({}) has {} operands", node.op.kind(), node.name, node.operands.len());
        Error::internal(found, format!("{N} operands"))
    })
}

fn plain_form(node: &Node, expr: &Const, ty: &Type) -> Result<ConstRows> {
    ConstRows::new(expr, ty).map_err(|detail| fail(node, &detail))
}

fn fail(node: &Node, detail: &str) -> Error {
    Error::Graph { op: node.op.kind().into(), name: node.name.clone(), detail: detail.into() }
}
