//! Lowers a graph to a program: selects kernels, fuses epilogues and dtype conversions, and plans the arena.

use std::collections::HashMap;

use super::kernels::linear::{self, LinearShape, Operand};
use super::program::*;
use crate::backend::Limits;
use crate::backend::constants::ConstRows;
use crate::error::{Error, Result};
use crate::graph::{Const, Dim, Graph, Input, Node, Op, Sym, Type, Value};
use crate::isa::{CpuFeatures, Isa};
use crate::tensor::DType;

/// CPU to lower a program for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTarget {
    /// Its features, which decide the packings.
    pub features: CpuFeatures,
    /// Linear layers with 8-bit integer weights quantize their inputs too, with per-row scales.
    pub quantize_activations: bool,
}

impl CpuTarget {
    /// This machine, or the CPU that [`CPU_VARIABLE`](crate::isa::CPU_VARIABLE) names, without quantized activations.
    ///
    /// # Errors
    /// As [`Isa::from_environment`].
    pub fn native() -> Result<CpuTarget> {
        Ok(CpuTarget { features: Isa::from_environment()?.features(), quantize_activations: false })
    }
}

/// A program and, for each of its weights, the content to pack.
#[derive(Debug, Clone, PartialEq)]
pub struct LoweredProgram {
    /// The program.
    pub program: Program,
    /// One entry per [`Program::weights`].
    pub constants: Vec<ConstRows>,
}

/// Lowers a graph to the CPU.
///
/// Fusions: a squared ReLU or residual addition into the linear layer before it; a dtype conversion into the kernel
/// that computes its input. Column slices and conversions into the cache are free.
///
/// # Errors
/// [`Error::Graph`] naming the op that cannot be lowered where it stands.
pub fn lower(graph: &Graph, limits: &Limits, target: CpuTarget) -> Result<LoweredProgram> {
    let mut lowering = CpuLowering {
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

/// Location of a value while the program runs.
#[derive(Debug, Clone, PartialEq)]
enum ValueLocation {
    Input(Input),
    Const,
    View(View),
    Cache {
        layer: usize,
        kind: KeysOrValues,
    },
    /// 8-bit codes and their per-row scales.
    Codes {
        codes: View,
        scales: View,
    },
}

struct CpuLowering<'g> {
    graph: &'g Graph,
    limits: &'g Limits,
    target: CpuTarget,
    /// Views that already have 8-bit codes by per-row scales, with the views of those codes and scales.
    quantized: HashMap<View, (View, View)>,
    users: Vec<Vec<Value>>,
    places: Vec<Option<ValueLocation>>,
    weight_indices: HashMap<(Value, Storage), usize>,
    weights: Vec<WeightSpec>,
    constants: Vec<ConstRows>,
    buffers: Vec<BufferSpec>,
    kernels: Vec<ProgramKernel>,
    cache: Option<CacheSpec>,
}

impl CpuLowering<'_> {
    fn node(&mut self, value: Value, node: &Node) -> Result<ValueLocation> {
        let x = node.operands.first().copied();
        match (&node.op, x) {
            (Op::Input(Input::KeyCache(layer)), _) => self.cache_input(node, *layer, KeysOrValues::Keys),
            (Op::Input(Input::ValueCache(layer)), _) => self.cache_input(node, *layer, KeysOrValues::Values),
            (Op::Input(input), _) => Ok(ValueLocation::Input(*input)),
            (Op::Const(_), _) => Ok(ValueLocation::Const),
            (Op::Gather, Some(x)) => {
                let indices = self.indices(node, x)?;
                let table = match self.place(node.operands[1]) {
                    Some(ValueLocation::Const) => Table::Weight(self.weight(node.operands[1], Storage::RowMajor)?),
                    _ => Table::View(self.view(node, node.operands[1])?),
                };
                let out = self.buffer(node, DType::F32)?;
                self.emit(ProgramKernel::Gather { indices, table, out }, out)
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
                self.emit(ProgramKernel::Gather { indices, table, out }, out)
            }
            (Op::LayerNorm { eps }, Some(x)) => {
                let x = self.view(node, x)?;
                let gamma = self.weight(node.operands[1], Storage::RowMajor)?;
                let beta = self.weight(node.operands[2], Storage::RowMajor)?;
                let out = self.buffer(node, self.stored_dtype(value))?;
                self.emit(ProgramKernel::LayerNorm { x, gamma, beta, eps: *eps as f32, out }, out)
            }
            (Op::Linear, Some(x)) => {
                let x = self.view(node, x)?;
                self.linear(value, node, (x, None), None)
            }
            (Op::QuantizedLinear { block }, Some(x)) => {
                let x = match self.place(x) {
                    Some(ValueLocation::Codes { codes, scales }) => (codes, Some(scales)),
                    _ => (self.view(node, x)?, None),
                };
                self.linear(value, node, x, Some(block.unwrap_or(x.0.width)))
            }
            (Op::Columns { start, width }, Some(x)) => {
                let x = self.view(node, x)?;
                Ok(ValueLocation::View(View { buffer: x.buffer, column: x.column + start, width: *width }))
            }
            (Op::Rotary { head_dim }, Some(x)) => {
                let x = self.view(node, x)?;
                let cos = self.view(node, node.operands[1])?;
                let sin = self.view(node, node.operands[2])?;
                let out = self.buffer(node, DType::F32)?;
                self.emit(ProgramKernel::Rotary { x, cos, sin, head_dim: *head_dim, out }, out)
            }
            (Op::CacheUpdate, Some(cache)) => {
                let Some(ValueLocation::Cache { layer, kind }) = self.place(cache) else {
                    return Err(fail(node, "its cache is not a cache of the step"));
                };
                let x = self.view(node, node.operands[1])?;
                self.kernels.push(ProgramKernel::Store { x, layer, kind });
                Ok(ValueLocation::Cache { layer, kind })
            }
            (Op::Attention { scale }, Some(q)) => {
                let caches = [self.place(node.operands[1]), self.place(node.operands[2])];
                let [
                    Some(ValueLocation::Cache { layer, kind: KeysOrValues::Keys }),
                    Some(ValueLocation::Cache { layer: same, kind: KeysOrValues::Values }),
                ] = caches
                else {
                    return Err(fail(node, "its keys and values are not caches of the step"));
                };
                if layer != same {
                    return Err(fail(node, "its keys and values are of different layers"));
                }
                let q = self.view(node, q)?;
                let out = self.buffer(node, self.stored_dtype(value))?;
                self.emit(ProgramKernel::Attention { q, layer, scale: *scale, out }, out)
            }
            (Op::Cast(dtype), Some(x)) => {
                let x = self.view(node, x)?;
                let into_cache = self.users[value.index()].iter().all(|u| self.graph.node(*u).op == Op::CacheUpdate);
                if self.buffers[x.buffer].dtype == *dtype || into_cache {
                    return Ok(ValueLocation::View(x));
                }
                let out = self.buffer(node, *dtype)?;
                self.emit(ProgramKernel::Convert { x, out }, out)
            }
            (Op::Relu2, Some(x)) => {
                let x = self.view(node, x)?;
                let out = self.buffer(node, self.stored_dtype(value))?;
                self.emit(ProgramKernel::Relu2 { x, out }, out)
            }
            (Op::FakeQuantize { code: DType::I8, scale }, Some(x)) => {
                let x = self.view(node, x)?;
                let (codes, scales) = self.quantize(x, &node.name, Some(*scale));
                Ok(ValueLocation::Codes { codes, scales })
            }
            (Op::FakeQuantize { scale, .. }, Some(x)) => {
                let x = self.view(node, x)?;
                let out = self.buffer(node, DType::F32)?;
                self.emit(ProgramKernel::FakeQuantizeF8 { x, scale: *scale, out }, out)
            }
            (Op::AddScalar(scalar), Some(x)) => {
                let x = self.view(node, x)?;
                let out = self.buffer(node, self.stored_dtype(value))?;
                self.emit(ProgramKernel::AddScalar { x, scalar: *scalar, out }, out)
            }
            (Op::Add, Some(x)) => {
                let x = self.view(node, x)?;
                let y = self.view(node, node.operands[1])?;
                let out = self.buffer(node, DType::F32)?;
                self.emit(ProgramKernel::Add { x, y, out }, out)
            }
            (_, None) => Err(fail(node, "it has no operands")),
        }
    }

    /// Emits a linear layer, with its epilogue fused if that is the layer's only user. `x` has scales if it is codes;
    /// `group` is the quantization group size.
    fn linear(
        &mut self,
        value: Value,
        node: &Node,
        (x, x_scales): (View, Option<View>),
        group: Option<usize>,
    ) -> Result<ValueLocation> {
        let dtype = self.graph.node(node.operands[1]).ty.dtype;
        let takes_codes = |group| {
            let shape = LinearShape { outputs: 1, inputs: x.width, group };
            linear::choose(dtype, DType::I8, self.target.features).is_some_and(|packing| packing.check(shape).is_ok())
        };
        let (x, x_scales) = match (x_scales, self.target.quantize_activations && group.is_some_and(takes_codes)) {
            (None, true) => match self.quantized.get(&x).copied() {
                Some((codes, scales)) => (codes, Some(scales)),
                None => {
                    let name = self.buffers[x.buffer].name.clone();
                    let (codes, scales) = self.quantize(x, &format!("{name}.int8"), None);
                    self.quantized.insert(x, (codes, scales));
                    (codes, Some(scales))
                }
            },
            _ => (x, x_scales),
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
        let kernel = |epilogue, out| ProgramKernel::Linear { x, x_scales, weight, scales, group, epilogue, out };
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

    /// Quantizes columns to 8-bit integers, by `scale` or by a scale of each row. Returns the codes and the rows' scales.
    fn quantize(&mut self, x: View, name: &str, scale: Option<f32>) -> (View, View) {
        let rows = self.buffers[x.buffer].rows;
        let mut add = |name: String, width, dtype| {
            self.buffers.push(BufferSpec { name, rows, width, dtype, offset: 0 });
            View { buffer: self.buffers.len() - 1, column: 0, width }
        };
        let codes = add(name.to_owned(), x.width, DType::I8);
        let scales = add(format!("{name}.scales"), 1, DType::F32);
        self.kernels.push(ProgramKernel::Quantize { x, scale, out: codes.buffer, scales: scales.buffer });
        (codes, scales)
    }

    /// The buffer that `user = residual + layer` can accumulate into in place: a computed, whole buffer that nothing
    /// reads after the layer.
    fn residual(&self, layer: Value, user: Value) -> Option<usize> {
        let node = self.graph.node(user);
        if node.op != Op::Add {
            return None;
        }
        let residual = *node.operands.iter().find(|v| **v != layer)?;
        let Some(ValueLocation::View(view)) = self.place(residual) else { return None };
        let whole = view.width == self.buffers[view.buffer].width && self.buffers[view.buffer].dtype == DType::F32;
        let last_use = self.users[residual.index()].iter().all(|u| *u == user || *u < layer);
        let aliased = self.users[residual.index()]
            .iter()
            .any(|u| matches!(self.graph.node(*u).op, Op::Columns { .. } | Op::Cast(_)));
        let is_output = self.graph.outputs().contains(&residual);
        (whole && last_use && !aliased && !is_output).then_some(view.buffer)
    }

    /// Element type to store a value in: the type that all its users convert it to, or FP32.
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

    fn place(&self, value: Value) -> Option<ValueLocation> {
        self.places[value.index()].clone()
    }

    fn view(&self, user: &Node, value: Value) -> Result<View> {
        match self.place(value) {
            Some(ValueLocation::View(view)) => Ok(view),
            place => {
                let name = &self.graph.node(value).name;
                Err(fail(user, &format!("operand {name} is {place:?}, the CPU needs it computed by the step")))
            }
        }
    }

    fn indices(&self, user: &Node, value: Value) -> Result<Indices> {
        match self.place(value) {
            Some(ValueLocation::Input(Input::TokenIds)) => Ok(Indices::TokenIds),
            Some(ValueLocation::Input(Input::Positions)) => Ok(Indices::Positions),
            Some(ValueLocation::Input(Input::LogitsRows)) => Ok(Indices::LogitsRows),
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

    fn cache_input(&mut self, node: &Node, layer: usize, kind: KeysOrValues) -> Result<ValueLocation> {
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
        Ok(ValueLocation::Cache { layer, kind })
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

    fn emit(&mut self, kernel: ProgramKernel, out: usize) -> Result<ValueLocation> {
        self.kernels.push(kernel);
        Ok(ValueLocation::View(View { buffer: out, column: 0, width: self.buffers[out].width }))
    }

    fn finish(mut self) -> Result<LoweredProgram> {
        let refuse = |detail: String| Error::Graph { op: "program".into(), name: "cpu".into(), detail };
        let logits = self.graph.outputs().iter().find_map(|v| match self.place(*v) {
            Some(ValueLocation::View(view)) => Some(view.buffer),
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
        Ok(LoweredProgram { program, constants: self.constants })
    }
}

fn fail(node: &Node, detail: &str) -> Error {
    Error::Graph { op: node.op.kind().into(), name: node.name.clone(), detail: detail.into() }
}

/// Assigns every buffer the lowest offset that is free throughout its lifetime (first fit). Returns the arena's size.
fn plan_arena(buffers: &mut [BufferSpec], kernels: &[ProgramKernel], logits: usize, limits: &Limits) -> Option<usize> {
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
