//! Graph to program: picks kernels, fuses what a kernel can do on its way out, and plans the arena.

use std::collections::HashMap;

use super::kernels::linear::{self, Operand};
use super::program::*;
use crate::backend::Limits;
use crate::backend::constants::ConstRows;
use crate::error::{Error, Result};
use crate::graph::{Const, Dim, Graph, Input, Node, Op, Sym, Type, Value};
use crate::isa::{CpuFeatures, Isa};
use crate::tensor::DType;

/// The CPU that a program is lowered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTarget {
    /// What it has: packings are chosen for it.
    pub features: CpuFeatures,
    /// Whether linear layers with 8-bit integer weights get their inputs in 8 bits too, each row by its own scale.
    pub quantize_activations: bool,
}

impl CpuTarget {
    /// This machine, with activations as the graph has them.
    pub fn native() -> CpuTarget {
        CpuTarget { features: Isa::detect().features(), quantize_activations: false }
    }
}

/// A program and, for each of its weights, the content to pack.
#[derive(Debug, Clone, PartialEq)]
pub struct Lowered {
    /// The plan.
    pub program: Program,
    /// One per [`Program::weights`].
    pub constants: Vec<ConstRows>,
}

/// Lowers a graph to the CPU.
///
/// Fused: a linear layer with the squared ReLU or the residual addition behind it; any kernel with the conversion of its
/// result; column slices and conversions into the cache cost nothing.
///
/// # Errors
/// [`Error::Graph`] naming the op that has no lowering in the place it stands.
pub fn lower(graph: &Graph, limits: &Limits, target: CpuTarget) -> Result<Lowered> {
    let mut lowering = Lowering {
        graph,
        limits,
        target,
        quantized: HashMap::new(),
        users: graph.users(),
        places: vec![None; graph.nodes().len()],
        weight_indices: HashMap::new(),
        weights: Vec::new(),
        constants: Vec::new(),
        buffers: Vec::new(),
        kernels: Vec::new(),
        cache: None,
    };
    for (value, node) in graph.iter() {
        if lowering.places[value.index()].is_none() {
            let place = lowering.node(value, node)?;
            lowering.places[value.index()] = Some(place);
        }
    }
    lowering.finish()
}

/// Where a value is while the program runs.
#[derive(Debug, Clone, PartialEq)]
enum Place {
    Input(Input),
    Const,
    View(View),
    Cache { layer: usize, kind: CacheKind },
}

struct Lowering<'g> {
    graph: &'g Graph,
    limits: &'g Limits,
    target: CpuTarget,
    /// Columns that are also there as 8-bit integers, and those with their scales.
    quantized: HashMap<View, (View, View)>,
    users: Vec<Vec<Value>>,
    places: Vec<Option<Place>>,
    weight_indices: HashMap<(Value, Storage), usize>,
    weights: Vec<WeightSpec>,
    constants: Vec<ConstRows>,
    buffers: Vec<BufferSpec>,
    kernels: Vec<Kernel>,
    cache: Option<CacheSpec>,
}

impl Lowering<'_> {
    fn node(&mut self, value: Value, node: &Node) -> Result<Place> {
        let x = node.operands.first().copied();
        match (&node.op, x) {
            (Op::Input(Input::KeyCache(layer)), _) => self.cache_input(node, *layer, CacheKind::Keys),
            (Op::Input(Input::ValueCache(layer)), _) => self.cache_input(node, *layer, CacheKind::Values),
            (Op::Input(input), _) => Ok(Place::Input(*input)),
            (Op::Const(_), _) => Ok(Place::Const),
            (Op::Gather, Some(x)) => {
                let indices = self.indices(node, x)?;
                let table = match self.place(node.operands[1]) {
                    Some(Place::Const) => Table::Weight(self.weight(node.operands[1], Storage::RowMajor)?),
                    _ => Table::View(self.view(node, node.operands[1])?),
                };
                let out = self.buffer(node, DType::F32)?;
                self.emit(Kernel::Gather { indices, table, out }, out)
            }
            (Op::RotaryAngle { trig, theta, rotary_dim }, Some(x)) => {
                let indices = self.indices(node, x)?;
                let positions = self.limits.max_sequence_tokens;
                let expr = Const::RotaryTable { trig: *trig, theta: *theta, rotary_dim: *rotary_dim, positions };
                let ty = Type::new(DType::F32, [positions.into(), (rotary_dim / 2).into()]);
                let content = ConstRows::new(&expr, &ty).map_err(|detail| fail(node, &detail))?;
                let table = Table::Weight(self.add_weight(
                    WeightSpec {
                        name: format!("{}.table", node.name),
                        storage: Storage::RowMajor,
                        dtype: DType::F32,
                        rows: positions,
                        columns: rotary_dim / 2,
                    },
                    content,
                ));
                let out = self.buffer(node, DType::F32)?;
                self.emit(Kernel::Gather { indices, table, out }, out)
            }
            (Op::LayerNorm { eps }, Some(x)) => {
                let x = self.view(node, x)?;
                let gamma = self.weight(node.operands[1], Storage::RowMajor)?;
                let beta = self.weight(node.operands[2], Storage::RowMajor)?;
                let out = self.buffer(node, self.stored_dtype(value))?;
                self.emit(Kernel::LayerNorm { x, gamma, beta, eps: *eps as f32, out }, out)
            }
            (Op::Linear, Some(x)) => {
                let x = self.view(node, x)?;
                self.linear(value, node, x, None)
            }
            (Op::QuantizedLinear { block }, Some(x)) => {
                let x = self.view(node, x)?;
                self.linear(value, node, x, Some(block.unwrap_or(x.width)))
            }
            (Op::Columns { start, width }, Some(x)) => {
                let x = self.view(node, x)?;
                Ok(Place::View(View { buffer: x.buffer, column: x.column + start, width: *width }))
            }
            (Op::Rotary { head_dim }, Some(x)) => {
                let x = self.view(node, x)?;
                let cos = self.view(node, node.operands[1])?;
                let sin = self.view(node, node.operands[2])?;
                let out = self.buffer(node, DType::F32)?;
                self.emit(Kernel::Rotary { x, cos, sin, head_dim: *head_dim, out }, out)
            }
            (Op::CacheUpdate, Some(cache)) => {
                let Some(Place::Cache { layer, kind }) = self.place(cache) else {
                    return Err(fail(node, "its cache is not a cache of the step"));
                };
                let x = self.view(node, node.operands[1])?;
                self.kernels.push(Kernel::Store { x, layer, kind });
                Ok(Place::Cache { layer, kind })
            }
            (Op::Attention { scale }, Some(q)) => {
                let caches = [self.place(node.operands[1]), self.place(node.operands[2])];
                let [
                    Some(Place::Cache { layer, kind: CacheKind::Keys }),
                    Some(Place::Cache { layer: same, kind: CacheKind::Values }),
                ] = caches
                else {
                    return Err(fail(node, "its keys and values are not caches of the step"));
                };
                if layer != same {
                    return Err(fail(node, "its keys and values are of different layers"));
                }
                let q = self.view(node, q)?;
                let out = self.buffer(node, self.stored_dtype(value))?;
                self.emit(Kernel::Attention { q, layer, scale: *scale, out }, out)
            }
            (Op::Cast(dtype), Some(x)) => {
                let x = self.view(node, x)?;
                let into_cache = self.users[value.index()].iter().all(|u| self.graph.node(*u).op == Op::CacheUpdate);
                if self.buffers[x.buffer].dtype == *dtype || into_cache {
                    return Ok(Place::View(x));
                }
                let out = self.buffer(node, *dtype)?;
                self.emit(Kernel::Convert { x, out }, out)
            }
            (Op::Relu2, Some(x)) => {
                let x = self.view(node, x)?;
                let out = self.buffer(node, self.stored_dtype(value))?;
                self.emit(Kernel::Relu2 { x, out }, out)
            }
            (Op::RoundToF8 { scale }, Some(x)) => {
                let x = self.view(node, x)?;
                let out = self.buffer(node, DType::F32)?;
                self.emit(Kernel::RoundToF8 { x, scale: *scale, out }, out)
            }
            (Op::AddScalar(scalar), Some(x)) => {
                let x = self.view(node, x)?;
                let out = self.buffer(node, self.stored_dtype(value))?;
                self.emit(Kernel::AddScalar { x, scalar: *scalar, out }, out)
            }
            (Op::Add, Some(x)) => {
                let x = self.view(node, x)?;
                let y = self.view(node, node.operands[1])?;
                let out = self.buffer(node, DType::F32)?;
                self.emit(Kernel::Add { x, y, out }, out)
            }
            (_, None) => Err(fail(node, "it has no operands")),
        }
    }

    /// A linear layer, with what follows it where that is its only use; `group` inputs share a scale, if it has scales.
    fn linear(&mut self, value: Value, node: &Node, x: View, group: Option<usize>) -> Result<Place> {
        let dtype = self.graph.node(node.operands[1]).ty.dtype;
        let per_channel = group == Some(x.width);
        let (x, x_scales) = match self.target.quantize_activations && dtype == DType::I8 && per_channel {
            true => {
                let (codes, scales) = self.quantize(x);
                (codes, Some(scales))
            }
            false => (x, None),
        };
        let x_dtype = self.buffers[x.buffer].dtype;
        let packing = linear::choose(dtype, x_dtype, self.target.features)
            .ok_or_else(|| fail(node, &format!("no kernel multiplies {x_dtype} by {dtype} weights")))?;
        let packed = |operand| Storage::Packed { packing, operand };
        let weight = self.weight(node.operands[1], packed(Operand::Weight))?;
        let scales = match group {
            Some(_) => Some(self.weight(node.operands[2], packed(Operand::Scales))?),
            None => None,
        };
        let group = group.unwrap_or(x.width);
        let kernel = |epilogue, out| Kernel::Linear { x, x_scales, weight, scales, group, epilogue, out };
        if let [user] = self.users[value.index()][..] {
            let next = self.graph.node(user);
            if next.op == Op::Relu2 {
                let out = self.buffer(next, self.stored_dtype(user))?;
                let place = self.emit(kernel(Epilogue::Relu2, out), out)?;
                self.places[user.index()] = Some(place.clone());
                return Ok(place);
            }
            if let Some(residual) = self.residual(value, user) {
                let place = self.emit(kernel(Epilogue::Accumulate, residual), residual)?;
                self.places[user.index()] = Some(place.clone());
                return Ok(place);
            }
        }
        let out = self.buffer(node, self.stored_dtype(value))?;
        self.emit(kernel(Epilogue::Store, out), out)
    }

    /// Columns as 8-bit integers and their scales, computed once for all linear layers that read them.
    fn quantize(&mut self, x: View) -> (View, View) {
        if let Some(found) = self.quantized.get(&x) {
            return *found;
        }
        let BufferSpec { name, rows, .. } = self.buffers[x.buffer].clone();
        let mut add = |name: String, width, dtype| {
            self.buffers.push(BufferSpec { name, rows, width, dtype, offset: 0 });
            View { buffer: self.buffers.len() - 1, column: 0, width }
        };
        let codes = add(format!("{name}.int8"), x.width, DType::I8);
        let scales = add(format!("{name}.scales"), 1, DType::F32);
        self.kernels.push(Kernel::Quantize { x, out: codes.buffer, scales: scales.buffer });
        self.quantized.insert(x, (codes, scales));
        (codes, scales)
    }

    /// The buffer that `user = residual + layer` can add to in place: it is computed, whole, and nothing reads the
    /// residual after the layer.
    fn residual(&self, layer: Value, user: Value) -> Option<usize> {
        let node = self.graph.node(user);
        if node.op != Op::Add {
            return None;
        }
        let residual = *node.operands.iter().find(|v| **v != layer)?;
        let Some(Place::View(view)) = self.place(residual) else { return None };
        let whole = view.width == self.buffers[view.buffer].width && self.buffers[view.buffer].dtype == DType::F32;
        let last_use = self.users[residual.index()].iter().all(|u| *u == user || *u < layer);
        let aliased = self.users[residual.index()]
            .iter()
            .any(|u| matches!(self.graph.node(*u).op, Op::Columns { .. } | Op::Cast(_)));
        let is_output = self.graph.outputs().contains(&residual);
        (whole && last_use && !aliased && !is_output).then_some(view.buffer)
    }

    /// The element type to store a value in: what all its users convert it to, or FP32.
    fn stored_dtype(&self, value: Value) -> DType {
        let mut users = self.users[value.index()].iter().map(|u| match self.graph.node(*u).op {
            Op::Cast(dtype) => dtype,
            _ => DType::F32,
        });
        match users.next() {
            Some(first) if users.all(|dtype| dtype == first) && !self.graph.outputs().contains(&value) => first,
            _ => DType::F32,
        }
    }

    fn place(&self, value: Value) -> Option<Place> {
        self.places[value.index()].clone()
    }

    fn view(&self, user: &Node, value: Value) -> Result<View> {
        match self.place(value) {
            Some(Place::View(view)) => Ok(view),
            place => {
                let name = &self.graph.node(value).name;
                Err(fail(user, &format!("operand {name} is {place:?}, the CPU needs it computed by the step")))
            }
        }
    }

    fn indices(&self, user: &Node, value: Value) -> Result<Indices> {
        match self.place(value) {
            Some(Place::Input(Input::TokenIds)) => Ok(Indices::TokenIds),
            Some(Place::Input(Input::Positions)) => Ok(Indices::Positions),
            Some(Place::Input(Input::LogitsRows)) => Ok(Indices::LogitsRows),
            place => Err(fail(user, &format!("its indices are {place:?}, not supplied by the step"))),
        }
    }

    fn weight(&mut self, value: Value, storage: Storage) -> Result<usize> {
        let node = self.graph.node(value);
        let Op::Const(expr) = &node.op else {
            return Err(fail(node, "the CPU needs this weight to be a constant"));
        };
        if let Some(index) = self.weight_indices.get(&(value, storage)) {
            return Ok(*index);
        }
        let content = ConstRows::new(expr, &node.ty).map_err(|detail| fail(node, &detail))?;
        let (rows, columns) = (content.rows(), content.width());
        let name = match storage {
            Storage::RowMajor => node.name.clone(),
            Storage::Packed { .. } => format!("{}.panels", node.name),
        };
        let index = self.add_weight(WeightSpec { name, storage, dtype: node.ty.dtype, rows, columns }, content);
        self.weight_indices.insert((value, storage), index);
        Ok(index)
    }

    fn add_weight(&mut self, spec: WeightSpec, content: ConstRows) -> usize {
        self.weights.push(spec);
        self.constants.push(content);
        self.weights.len() - 1
    }

    fn cache_input(&mut self, node: &Node, layer: usize, kind: CacheKind) -> Result<Place> {
        let [_, kv_heads, _, head_dim] = node.ty.shape[..] else {
            return Err(fail(node, "a cache has four dimensions"));
        };
        let (Some(kv_heads), Some(head_dim)) = (kv_heads.as_fixed(), head_dim.as_fixed()) else {
            return Err(fail(node, "heads and head_dim must be known"));
        };
        let cache = self.cache.get_or_insert(CacheSpec { layers: 0, kv_heads, head_dim, dtype: node.ty.dtype });
        if (cache.kv_heads, cache.head_dim, cache.dtype) != (kv_heads, head_dim, node.ty.dtype) {
            return Err(fail(node, "all layers' caches must have one shape"));
        }
        cache.layers = cache.layers.max(layer + 1);
        Ok(Place::Cache { layer, kind })
    }

    fn buffer(&mut self, node: &Node, dtype: DType) -> Result<usize> {
        let rows = match node.ty.shape[0] {
            d if d == Dim::tokens() => RowCount::Tokens,
            d if d == Dim::sym(Sym::R) => RowCount::LogitsRows,
            _ => return Err(fail(node, &format!("rows of {} are neither tokens nor logits rows", node.ty))),
        };
        let width = node.ty.width().ok_or_else(|| fail(node, "the width must be known"))?;
        self.buffers.push(BufferSpec { name: node.name.clone(), rows, width, dtype, offset: 0 });
        Ok(self.buffers.len() - 1)
    }

    fn emit(&mut self, kernel: Kernel, out: usize) -> Result<Place> {
        self.kernels.push(kernel);
        Ok(Place::View(View { buffer: out, column: 0, width: self.buffers[out].width }))
    }

    fn finish(mut self) -> Result<Lowered> {
        let refuse = |detail: String| Error::Graph { op: "program".into(), name: "cpu".into(), detail };
        let logits = self.graph.outputs().iter().find_map(|v| match self.place(*v) {
            Some(Place::View(view)) => Some(view.buffer),
            _ => None,
        });
        let logits = logits.ok_or_else(|| refuse("the graph returns no logits".into()))?;
        let cache = self.cache.take().ok_or_else(|| refuse("the graph has no KV cache".into()))?;
        let arena_bytes = plan_arena(&mut self.buffers, &self.kernels, logits, self.limits)
            .ok_or_else(|| refuse("the arena's size overflows; use a smaller prefill chunk".into()))?;
        let program = Program {
            version: PROGRAM_VERSION,
            cpu: self.target.features,
            limits: self.limits.clone(),
            cache,
            weights: self.weights,
            buffers: self.buffers,
            arena_bytes,
            kernels: self.kernels,
            logits,
        };
        program.validate().map_err(refuse)?;
        Ok(Lowered { program, constants: self.constants })
    }
}

fn fail(node: &Node, detail: &str) -> Error {
    Error::Graph { op: node.op.kind().into(), name: node.name.clone(), detail: detail.into() }
}

/// Gives every buffer the lowest offset that is free while it lives (first fit). Returns the arena's size.
fn plan_arena(buffers: &mut [BufferSpec], kernels: &[Kernel], logits: usize, limits: &Limits) -> Option<usize> {
    let mut lives: Vec<Option<(usize, usize)>> = vec![None; buffers.len()];
    for (time, kernel) in kernels.iter().enumerate() {
        let touched = kernel.reads().into_iter().map(|v| v.buffer).chain(kernel.writes());
        for buffer in touched {
            let life = lives[buffer].get_or_insert((time, time));
            life.1 = time;
        }
    }
    if let Some(life) = &mut lives[logits] {
        life.1 = kernels.len();
    }
    let mut placed: Vec<(usize, usize, (usize, usize))> = Vec::new(); // (offset, end, life)
    let mut arena_bytes = 0;
    for (index, life) in lives.iter().enumerate() {
        let Some(life) = *life else { continue };
        let bytes = buffers[index].max_bytes(limits)?.checked_next_multiple_of(ALIGN)?;
        let mut busy: Vec<(usize, usize)> = placed
            .iter()
            .filter(|(_, _, other)| other.0 <= life.1 && life.0 <= other.1)
            .map(|(offset, end, _)| (*offset, *end))
            .collect();
        busy.sort_unstable();
        let mut offset = 0usize;
        for (start, end) in busy {
            if offset.checked_add(bytes)? <= start {
                break;
            }
            offset = offset.max(end);
        }
        let end = offset.checked_add(bytes)?;
        buffers[index].offset = offset;
        placed.push((offset, end, life));
        arena_bytes = arena_bytes.max(end);
    }
    Some(arena_bytes)
}
