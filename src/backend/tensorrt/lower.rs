//! Graph to network. The network computes in the types the graph states: FP32 sums, norms, rotations and residuals
//! around BF16 products. TensorRT joins the conversions with what is before and behind them, so they cost no launches.
//!
//! Activations are `[B·T, width]` and become `[B, heads, T, head_dim]` between rotation and attention. Weights are
//! inputs of the network, so that any number of plans share one copy and none has to be compiled into a plan.

use std::collections::HashMap;

use super::{Network, Profile, Range, Tensor};
pub use crate::engine::tensorrt::Sizes;
use crate::error::{Error, Result};
use crate::graph::{Const, Graph, Input, Node, Op, Value};
use crate::tensor::DType;

/// Name of the input with each sequence's tokens after the step, `i32[B]`: what attention reads.
pub const TOTAL_TOKENS: &str = "total_tokens";
/// Name of the output with the logits of the wanted rows, `f32[R, vocab]`.
pub const LOGITS: &str = "logits";
/// Name of the output with the largest logits of each wanted row, largest first, `f32[R, k]`.
pub const TOP_LOGITS: &str = "top_logits";
/// Name of the output with their token ids, `i32[R, k]`.
pub const TOP_IDS: &str = "top_ids";
/// The most that TensorRT's TopK gives.
pub const MOST_TOP_TOKENS: usize = 3840;

/// Which keys and values attention reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attends {
    /// The cache, as far as each sequence goes: any step. Prefill copies the layer's whole cache once to do so.
    Cache,
    /// The step's own: a first chunk, whose sequences have no past. The cache is written, not read.
    Chunk,
}

/// A weight that a plan takes as an input.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// The input's name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// What it holds.
    pub expr: Const,
}

/// A network and what it is to be given.
#[derive(Debug)]
pub struct Lowered {
    /// Ready to be built.
    pub network: Network,
    /// Its weights, in the order of their inputs.
    pub weights: Vec<Weight>,
    /// The steps it can run: prefill, then decode if it attends to the cache.
    pub profiles: Vec<Profile>,
}

/// Lowers a graph into an empty network.
///
/// # Errors
/// [`Error::Graph`] naming the op that has no lowering in the place it stands; [`Error::TensorRt`] with TensorRT's own
/// words.
pub fn lower(graph: &Graph, network: Network, attends: Attends, sizes: &Sizes) -> Result<Lowered> {
    let mut lowering = Lowering {
        graph,
        attends,
        sizes,
        network,
        places: Vec::with_capacity(graph.nodes().len()),
        per_token: HashMap::new(),
        step_shape: None,
        total_tokens: None,
        weights: Vec::new(),
        step_inputs: Vec::new(),
    };
    if attends == Attends::Cache {
        let total = lowering.network.input(TOTAL_TOKENS, DType::I32, &[-1])?;
        lowering.total_tokens = Some(total);
        lowering.step_inputs.push((TOTAL_TOKENS.into(), vec![Size::Sequences]));
    }
    for (_, node) in graph.iter() {
        lowering.network.scope(&node.name);
        let place = lowering.node(node)?;
        lowering.places.push(place);
    }
    lowering.finish()
}

/// A size of an input that differs from step to step, or does not.
#[derive(Debug, Clone, Copy)]
enum Size {
    Sequences,
    TokensPerSequence,
    LogitsRows,
    Fixed(i64),
}

/// Where a value of the graph is in the network.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// As the graph has it.
    Plain(Tensor),
    /// `[B, heads, T, head_dim]`, where the graph has `[B·T, heads · head_dim]`.
    Heads { tensor: Tensor, heads: usize, head_dim: usize },
    /// A layer's cache after the step, `[B, heads, S, head_dim]`, and what was written to it, `[B, heads, T, head_dim]`.
    Cache { cache: Tensor, new: Tensor },
}

struct Lowering<'g> {
    graph: &'g Graph,
    attends: Attends,
    sizes: &'g Sizes,
    network: Network,
    places: Vec<Place>,
    /// `[B·T, width]` values as `[B, T, width]`: the rotation's angles, used in every layer.
    per_token: HashMap<Value, Tensor>,
    /// `i64[2]`: B and T.
    step_shape: Option<Tensor>,
    total_tokens: Option<Tensor>,
    weights: Vec<Weight>,
    step_inputs: Vec<(String, Vec<Size>)>,
}

impl Lowering<'_> {
    fn node(&mut self, node: &Node) -> Result<Place> {
        let dtype = node.ty.dtype;
        match (&node.op, &node.operands[..]) {
            (Op::Input(input), _) => self.input(node, *input),
            (Op::Const(expr), _) => {
                let shape: Option<Vec<usize>> = node.ty.shape.iter().map(|d| d.as_fixed()).collect();
                let shape =
                    shape.ok_or_else(|| fail(node, &format!("a constant's sizes are known, not {}", node.ty)))?;
                self.weight(&node.name, dtype, shape, expr.clone())
            }
            (Op::AddScalar(scalar), &[x]) => {
                let x = self.plain(x)?;
                let scalar = self.network.scalar(*scalar, rank(node)?)?;
                let scalar = self.typed(scalar, DType::F32, dtype)?;
                Ok(Place::Plain(self.network.sum(x, scalar)?))
            }
            (Op::Cast(to), &[x]) => {
                let from = self.graph.node(x).ty.dtype;
                Ok(match self.place(x) {
                    Place::Heads { tensor, heads, head_dim } => {
                        Place::Heads { tensor: self.typed(tensor, from, *to)?, heads, head_dim }
                    }
                    _ => {
                        let x = self.plain(x)?;
                        Place::Plain(self.typed(x, from, *to)?)
                    }
                })
            }
            (Op::Gather, &[indices, table]) => {
                let from = self.graph.node(table).ty.dtype;
                let (indices, table) = (self.plain(indices)?, self.plain(table)?);
                let rows = self.network.gather(table, indices)?;
                Ok(Place::Plain(self.typed(rows, from, dtype)?))
            }
            (Op::LayerNorm { eps }, &[x, gamma, beta]) => {
                let row = |this: &mut Self, value: Value| {
                    let from = this.graph.node(value).ty.dtype;
                    let width = size(this.graph.node(value).ty.width(), node)?;
                    let vector = this.plain(value)?;
                    let vector = this.network.reshape(vector, &[1, width])?;
                    this.typed(vector, from, dtype)
                };
                let (gamma, beta) = (row(self, gamma)?, row(self, beta)?);
                let x = self.plain(x)?;
                Ok(Place::Plain(self.network.layer_norm(x, gamma, beta, *eps as f32)?))
            }
            (Op::Linear, &[x, weight]) => {
                let from = self.graph.node(x).ty.dtype;
                let (x, weight) = (self.plain(x)?, self.plain(weight)?);
                let product = self.network.linear(x, weight)?;
                Ok(Place::Plain(self.typed(product, from, dtype)?))
            }
            (Op::Columns { start, width }, &[x]) => {
                let x = self.plain(x)?;
                let first = self.network.integers(&[0])?;
                let shape = self.network.shape(x)?;
                let rows = self.network.gather(shape, first)?;
                let width = self.network.integers(&[size(Some(*width), node)?])?;
                let sizes = self.network.concat(&[rows, width])?;
                Ok(Place::Plain(self.network.slice(x, &[0, size(Some(*start), node)?], sizes)?))
            }
            (Op::RotaryAngle { trig, theta, rotary_dim }, &[positions]) => {
                let rows = self.sizes.max_sequence_tokens;
                let expr = Const::RotaryTable { trig: *trig, theta: *theta, rotary_dim: *rotary_dim, positions: rows };
                let name = format!("{}.table", node.name);
                let Place::Plain(table) = self.weight(&name, dtype, vec![rows, rotary_dim / 2], expr)? else {
                    return Err(fail(node, "its table is no plain value"));
                };
                let positions = self.plain(positions)?;
                Ok(Place::Plain(self.network.gather(table, positions)?))
            }
            (Op::Rotary { head_dim }, &[x, cos, sin]) => {
                let half = size(self.graph.node(cos).ty.width(), node)?;
                let (tensor, heads) = self.heads(node, x, *head_dim)?;
                let (cos, sin) = (self.per_token(cos, half)?, self.per_token(sin, half)?);
                let rotary_dims = u32::try_from(2 * half).map_err(|_| fail(node, "its rotary dims are too many"))?;
                let tensor = self.network.rotary(tensor, cos, sin, rotary_dims)?;
                Ok(Place::Heads { tensor, heads, head_dim: *head_dim })
            }
            (Op::CacheUpdate, &[cache, new, past_tokens]) => {
                let head_dim = node.ty.width().ok_or_else(|| fail(node, "its head_dim must be known"))?;
                let (new, _) = self.heads(node, new, head_dim)?;
                let (cache, past_tokens) = (self.plain(cache)?, self.plain(past_tokens)?);
                let cache = self.network.cache_update(cache, new, past_tokens)?;
                Ok(Place::Cache { cache, new })
            }
            (Op::Attention { scale }, &[q, keys, values, _]) => self.attention(node, *scale, [q, keys, values]),
            (Op::Relu2, &[x]) => {
                let x = self.plain(x)?;
                let x = self.network.relu(x)?;
                Ok(Place::Plain(self.network.product(x, x)?))
            }
            (Op::Add, &[x, y]) => {
                let (x, y) = (self.plain(x)?, self.plain(y)?);
                Ok(Place::Plain(self.network.sum(x, y)?))
            }
            (Op::QuantizedLinear { .. } | Op::RoundToF8 { .. }, _) => {
                Err(fail(node, "quantized layers are not lowered to TensorRT; build with precision bf16"))
            }
            (
                Op::AddScalar(_)
                | Op::Cast(_)
                | Op::Gather
                | Op::LayerNorm { .. }
                | Op::Linear
                | Op::Columns { .. }
                | Op::RotaryAngle { .. }
                | Op::Rotary { .. }
                | Op::CacheUpdate
                | Op::Attention { .. }
                | Op::Relu2
                | Op::Add,
                operands,
            ) => Err(fail(node, &format!("it has {} operands", operands.len()))),
        }
    }

    /// Step inputs are those of the graph, but tokens stand as `[B, T]`, from which the network learns T.
    fn input(&mut self, node: &Node, input: Input) -> Result<Place> {
        let sizes = match input {
            Input::TokenIds | Input::Positions => vec![Size::Sequences, Size::TokensPerSequence],
            Input::PastTokens => vec![Size::Sequences],
            Input::LogitsRows => vec![Size::LogitsRows],
            Input::KeyCache(_) | Input::ValueCache(_) => {
                let &[_, kv_heads, _, head_dim] = &node.ty.shape[..] else {
                    return Err(fail(node, "a cache has four dimensions"));
                };
                let capacity = size(Some(self.sizes.max_sequence_tokens), node)?;
                let (kv_heads, head_dim) = (size(kv_heads.as_fixed(), node)?, size(head_dim.as_fixed(), node)?);
                vec![Size::Sequences, Size::Fixed(kv_heads), Size::Fixed(capacity), Size::Fixed(head_dim)]
            }
        };
        let dims: Vec<i64> = sizes.iter().map(|size| if let Size::Fixed(n) = size { *n } else { -1 }).collect();
        let tensor = self.network.input(&node.name, node.ty.dtype, &dims)?;
        self.step_inputs.push((node.name.clone(), sizes));
        if input == Input::TokenIds {
            self.step_shape = Some(self.network.shape(tensor)?);
        }
        Ok(Place::Plain(match input {
            Input::TokenIds | Input::Positions => self.network.reshape(tensor, &[-1])?,
            _ => tensor,
        }))
    }

    fn weight(&mut self, name: &str, dtype: DType, shape: Vec<usize>, expr: Const) -> Result<Place> {
        let dims: Option<Vec<i64>> = shape.iter().map(|n| i64::try_from(*n).ok()).collect();
        let dims = dims.ok_or_else(|| Error::TensorRt(format!("weight {name} is too large: {shape:?}")))?;
        let tensor = self.network.input(name, dtype, &dims)?;
        self.weights.push(Weight { name: name.into(), dtype, shape, expr });
        Ok(Place::Plain(tensor))
    }

    /// TensorRT's attention does not scale, so the queries are, before they are rounded to the cache's type.
    fn attention(&mut self, node: &Node, scale: f32, [q, keys, values]: [Value; 3]) -> Result<Place> {
        let (Place::Cache { cache: keys, new: new_keys }, Place::Cache { cache: values, new: new_values }) =
            (self.place(keys), self.place(values))
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
            Attends::Cache => self.network.attention(q, keys, values, self.total_tokens)?,
            Attends::Chunk => self.network.attention(q, new_keys, new_values, None)?,
        };
        let tensor = self.typed(tensor, stored, node.ty.dtype)?;
        Ok(Place::Heads { tensor, heads, head_dim })
    }

    fn place(&self, value: Value) -> Place {
        self.places[value.index()]
    }

    /// A value in the shape the graph gives it.
    fn plain(&mut self, value: Value) -> Result<Tensor> {
        match self.place(value) {
            Place::Plain(tensor) => Ok(tensor),
            Place::Cache { cache, .. } => Ok(cache),
            Place::Heads { tensor, heads, head_dim } => {
                let width = size(heads.checked_mul(head_dim), self.graph.node(value))?;
                let tensor = self.network.transpose(tensor, &[0, 2, 1, 3])?;
                let tensor = self.network.reshape(tensor, &[-1, width])?;
                self.places[value.index()] = Place::Plain(tensor);
                Ok(tensor)
            }
        }
    }

    /// A value as `[B, heads, T, head_dim]`, and its heads.
    fn heads(&mut self, user: &Node, value: Value, head_dim: usize) -> Result<(Tensor, usize)> {
        if let Place::Heads { tensor, heads, head_dim: same } = self.place(value)
            && same == head_dim
        {
            return Ok((tensor, heads));
        }
        let width = self.graph.node(value).ty.width().filter(|width| head_dim > 0 && width % head_dim == 0);
        let heads = width.ok_or_else(|| fail(user, &format!("an operand is not of heads of {head_dim}")))? / head_dim;
        let tensor = self.plain(value)?;
        let tensor = self.split(user, tensor, &[size(Some(heads), user)?, size(Some(head_dim), user)?])?;
        Ok((self.network.transpose(tensor, &[0, 2, 1, 3])?, heads))
    }

    /// `[B·T, width]` as `[B, T, width]`.
    fn per_token(&mut self, value: Value, width: i64) -> Result<Tensor> {
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
    fn split(&mut self, user: &Node, tensor: Tensor, inner: &[i64]) -> Result<Tensor> {
        let step = self.step_shape.ok_or_else(|| fail(user, "the graph has no token ids before it"))?;
        let inner = self.network.integers(inner)?;
        let shape = self.network.concat(&[step, inner])?;
        self.network.reshape_to(tensor, shape)
    }

    fn typed(&mut self, tensor: Tensor, from: DType, to: DType) -> Result<Tensor> {
        if from == to { Ok(tensor) } else { self.network.cast(tensor, to) }
    }

    fn finish(mut self) -> Result<Lowered> {
        let refuse = |detail: String| Error::Graph { op: "network".into(), name: "tensorrt".into(), detail };
        let graph = self.graph;
        let mut logits = None;
        for output in graph.outputs() {
            let node = graph.node(*output);
            match self.place(*output) {
                Place::Cache { cache, .. } => self.network.output(cache, &node.name)?,
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
        let (values, ids) = self.network.top_k(logits, self.sizes.top_tokens.min(most) as u32)?;
        self.network.output(logits, LOGITS)?;
        self.network.output(values, TOP_LOGITS)?;
        self.network.output(ids, TOP_IDS)?;
        let profiles = self.profiles()?;
        Ok(Lowered { network: self.network, weights: self.weights, profiles })
    }

    /// A profile per kind of step. Decoding has one of its own because TensorRT has kernels for T = 1 that read the
    /// cache where it lies.
    fn profiles(&self) -> Result<Vec<Profile>> {
        let s = self.sizes;
        let prefill = (s.prefill_sequences, s.prefill_tokens, s.prefill_logits_rows);
        let decode = (s.decode_sequences, 1, s.decode_sequences);
        let steps = match self.attends {
            Attends::Cache => vec![prefill, decode],
            Attends::Chunk => vec![prefill],
        };
        steps.into_iter().map(|(sequences, tokens, rows)| self.profile(sequences, tokens, rows)).collect()
    }

    /// From one sequence, token and row to these; fastest at one sequence of so many tokens.
    fn profile(&self, sequences: usize, tokens: usize, rows: usize) -> Result<Profile> {
        let int = |n: usize| i64::try_from(n).map_err(|_| Error::TensorRt(format!("a size of {n} is too large")));
        let (sequences, tokens, rows) = (int(sequences)?, int(tokens)?, int(rows)?);
        let dims = |sizes: &[Size], [b, t, r]: [i64; 3]| -> Vec<i64> {
            let dim = |size: &Size| match size {
                Size::Sequences => b,
                Size::TokensPerSequence => t,
                Size::LogitsRows => r,
                Size::Fixed(n) => *n,
            };
            sizes.iter().map(dim).collect()
        };
        let ranges = self.step_inputs.iter().map(|(input, sizes)| Range {
            input: input.clone(),
            min: dims(sizes, [1, 1, 1]),
            opt: dims(sizes, [1, tokens, 1]),
            max: dims(sizes, [sequences, tokens, rows]),
        });
        Ok(Profile { ranges: ranges.collect() })
    }
}

fn rank(node: &Node) -> Result<u32> {
    u32::try_from(node.ty.shape.len()).map_err(|_| fail(node, "it has too many dimensions"))
}

fn size(n: Option<usize>, node: &Node) -> Result<i64> {
    n.and_then(|n| i64::try_from(n).ok()).ok_or_else(|| fail(node, "a size that must be known is not, or too large"))
}

fn fail(node: &Node, detail: &str) -> Error {
    Error::Graph { op: node.op.kind().into(), name: node.name.clone(), detail: detail.into() }
}
