//! Graph-to-graph passes: each rebuilds the graph (so that the result type-checks again) and reports, site by site,
//! what it changed or why it did not.

use std::collections::HashMap;
use std::fmt;

use super::calibration::Calibration;
use super::quantize::{fake_quantize_inputs, quantize_weights};
use super::smoothing;
use crate::error::Result;
use crate::graph::{Const, Dim, Graph, Narrowing, Node, Op, Type, Value};
use crate::quantize::Scheme;
use crate::tensor::DType;

/// Report of one pass over the sites it considered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassReport {
    /// Name of the pass.
    pub pass: &'static str,
    /// Values that it rewrote.
    pub applied: Vec<String>,
    /// Values that it left alone, with the reason.
    pub left: Vec<(String, String)>,
}

impl PassReport {
    pub(super) fn new(pass: &'static str) -> PassReport {
        PassReport { pass, applied: Vec::new(), left: Vec::new() }
    }
}

impl fmt::Display for PassReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} applied", self.pass, self.applied.len())?;
        if let (Some(first), true) = (self.applied.first(), self.applied.len() > 1) {
            write!(f, " ({first} … {})", self.applied[self.applied.len() - 1])?;
        } else if let Some(only) = self.applied.first() {
            write!(f, " ({only})")?;
        }
        for (site, reason) in &self.left {
            write!(f, "\n  left {site}: {reason}")?;
        }
        Ok(())
    }
}

/// Precision of a plan; the precision passes rewrite the graph accordingly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Everything in FP32.
    F32,
    /// Weights, inputs of linear layers and KV cache in BF16; sums, norms, softmax and the residual stream in FP32.
    Bf16,
    /// As BF16, with the weights of linear layers other than the head as 8-bit integers with per-channel scales.
    Int8,
    /// As BF16, with the weights of linear layers other than the head as 4-bit integers with group size 128.
    Int4,
    /// As BF16, with the weights and inputs of linear layers other than the head as E4M3 floats: per-channel weight
    /// scales, and one input scale per layer, from a calibration.
    Fp8,
    /// As INT8, with the inputs of linear layers as 8-bit integers too: one scale per layer, from a calibration that
    /// first evens out their channels ([`smoothing`](super::smoothing)).
    W8a8,
}

impl Precision {
    /// All precisions: floats, weight-only ones, then those that quantize the inputs of linear layers too.
    pub const ALL: [Precision; 6] =
        [Precision::F32, Precision::Bf16, Precision::Int8, Precision::Int4, Precision::Fp8, Precision::W8a8];

    /// Quantization scheme of the linear layers' weights, if any.
    pub fn scheme(self) -> Option<Scheme> {
        match self {
            Precision::F32 | Precision::Bf16 => None,
            Precision::Int8 | Precision::W8a8 => Some(Scheme::INT8),
            Precision::Int4 => Some(Scheme::INT4),
            Precision::Fp8 => Some(Scheme::FP8),
        }
    }

    /// Type of the codes that inputs of linear layers are quantized to, if any.
    pub fn input_code(self) -> Option<DType> {
        match self {
            Precision::F32 | Precision::Bf16 | Precision::Int8 | Precision::Int4 => None,
            Precision::Fp8 => Some(DType::F8),
            Precision::W8a8 => Some(DType::I8),
        }
    }

    /// Returns true if the inputs of linear layers are quantized, which requires calibrated scales.
    pub fn needs_calibration(self) -> bool {
        self.input_code().is_some()
    }

    /// Returns true if channels of these inputs are evened out before. Integers have one step for large and small
    /// channels, floats do not.
    pub fn smooths(self) -> bool {
        self.input_code() == Some(DType::I8)
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Int8 => "int8",
            Precision::Int4 => "int4",
            Precision::Fp8 => "fp8",
            Precision::W8a8 => "w8a8",
        })
    }
}

/// Runs every pass in order. `positions` is the longest sequence the plan supports, in tokens; `calibration` is used if
/// [`Precision::needs_calibration`].
///
/// # Errors
/// [`crate::Error::Graph`] if a rewritten graph does not type-check, which is a defect of a pass, or a layer has no
/// scale in the calibration.
pub fn run(
    graph: Graph,
    precision: Precision,
    positions: usize,
    calibration: Option<&Calibration>,
) -> Result<(Graph, Vec<PassReport>)> {
    let tables = |graph: &Graph| rotary_tables(graph, positions);
    type Pass<'p> = &'p dyn Fn(&Graph) -> Result<(Graph, PassReport)>;
    let smooth = |graph: &Graph| smoothing::fold_factors(graph, calibration);
    let mut passes: Vec<Pass<'_>> = vec![&fold_constants, &fuse_linears, &tables];
    if precision.smooths() {
        passes.push(&smooth);
    }
    if precision != Precision::F32 {
        passes.push(&narrow_to_bf16);
    }
    let quantize = precision.scheme().map(|scheme| {
        let scaled = calibration.filter(|_| precision.needs_calibration());
        move |graph: &Graph| quantize_weights(graph, scheme, scaled)
    });
    let round = precision.input_code().map(|code| move |graph: &Graph| fake_quantize_inputs(graph, code, calibration));
    if let Some(quantize) = &quantize {
        passes.push(quantize);
    }
    if let Some(round) = &round {
        passes.push(round);
    }
    passes.push(&remove_dead_values);
    let mut graph = graph;
    let mut reports = Vec::with_capacity(passes.len());
    for pass in passes {
        let (rewritten, report) = pass(&graph)?;
        graph = rewritten;
        reports.push(report);
    }
    Ok((graph, reports))
}

/// The graph as [`run`] has it before it narrows anything.
///
/// # Errors
/// As [`run`].
pub(super) fn fused(graph: &Graph) -> Result<Graph> {
    let (folded, _) = fold_constants(graph)?;
    Ok(fuse_linears(&folded)?.0)
}

/// A graph under construction, with the new value of each old one.
pub(super) struct Rewrite<'g> {
    old: &'g Graph,
    pub(super) new: Graph,
    pub(super) moved: Vec<Option<Value>>,
}

impl<'g> Rewrite<'g> {
    pub(super) fn new(old: &'g Graph) -> Rewrite<'g> {
        Rewrite { old, new: Graph::new(), moved: vec![None; old.nodes().len()] }
    }

    pub(super) fn operand(&self, value: Value) -> Result<Value> {
        self.moved[value.index()].ok_or_else(|| crate::Error::Graph {
            op: self.old.node(value).op.kind().into(),
            name: self.old.node(value).name.clone(),
            detail: "a pass dropped this value while another still uses it".into(),
        })
    }

    fn operands(&self, node: &Node) -> Result<Vec<Value>> {
        node.operands.iter().map(|v| self.operand(*v)).collect()
    }

    pub(super) fn copy(&mut self, value: Value) -> Result<Value> {
        let node = self.old.node(value);
        let copied = match &node.op {
            Op::Input(input) => self.new.input(&node.name, *input, node.ty.clone()),
            Op::Const(expr) => self.new.constant(&node.name, expr.clone(), node.ty.clone()),
            op => {
                let operands = self.operands(node)?;
                self.new.add(&node.name, op.clone(), &operands)?
            }
        };
        self.moved[value.index()] = Some(copied);
        Ok(copied)
    }

    pub(super) fn finish(mut self) -> Result<Graph> {
        for output in self.old.outputs() {
            let value = self.operand(*output)?;
            self.new.output(value);
        }
        Ok(self.new)
    }
}

pub(super) fn const_of(graph: &Graph, value: Value) -> Option<&Const> {
    match &graph.node(value).op {
        Op::Const(expr) => Some(expr),
        _ => None,
    }
}

/// Folds ops of constants into constants: LayerNorm1P's `1 + w` costs nothing at run time.
fn fold_constants(graph: &Graph) -> Result<(Graph, PassReport)> {
    let mut report = PassReport::new("fold-constants");
    let mut r = Rewrite::new(graph);
    for (value, node) in graph.iter() {
        let operand = node.operands.first().and_then(|operand| const_of(graph, *operand));
        if let Some(folded) = operand.and_then(|inner| node.op.folded(inner)) {
            r.moved[value.index()] = Some(r.new.constant(&node.name, folded, node.ty.clone()));
            report.applied.push(node.name.clone());
            continue;
        }
        if node.op.folds() {
            report.left.push((node.name.clone(), "its operand is computed by the step".into()));
        }
        r.copy(value)?;
    }
    Ok((r.finish()?, report))
}

/// Fuses linear layers that share an input into one, followed by column slices: queries, keys and values take one GEMM.
fn fuse_linears(graph: &Graph) -> Result<(Graph, PassReport)> {
    let mut report = PassReport::new("fuse-linears");
    let mut groups: HashMap<Value, Vec<Value>> = HashMap::new();
    for (value, node) in graph.iter() {
        if node.op == Op::Linear {
            groups.entry(node.operands[0]).or_default().push(value);
        }
    }
    let mut r = Rewrite::new(graph);
    for (value, node) in graph.iter() {
        if r.moved[value.index()].is_some() {
            continue;
        }
        let group = match (&node.op, groups.get(&node.operands.first().copied().unwrap_or(value))) {
            (Op::Linear, Some(group)) if group.len() > 1 => group,
            (Op::Linear, _) => {
                report.left.push((node.name.clone(), "no other linear layer reads its input".into()));
                r.copy(value)?;
                continue;
            }
            _ => {
                r.copy(value)?;
                continue;
            }
        };
        let weights: Option<Vec<Const>> =
            group.iter().map(|v| const_of(graph, graph.node(*v).operands[1]).cloned()).collect();
        let widths: Option<Vec<usize>> = group.iter().map(|v| graph.node(*v).ty.width()).collect();
        let (Some(weights), Some(widths)) = (weights, widths) else {
            report.left.push((node.name.clone(), "a weight of the group is not a constant".into()));
            r.copy(value)?;
            continue;
        };
        let weight_type = &graph.node(node.operands[1]).ty;
        let rows: usize = widths.iter().sum();
        let ty = Type { dtype: weight_type.dtype, shape: vec![Dim::fixed(rows), weight_type.shape[1]] };
        let names: Vec<&str> = group.iter().map(|v| last_part(&graph.node(*v).name)).collect();
        let prefix = node.name.strip_suffix(names[0]).unwrap_or("");
        let name = format!("{prefix}{}", names.concat());
        let weight = r.new.constant(format!("{name}.weight"), Const::ConcatRows(weights), ty);
        let x = r.operand(node.operands[0])?;
        let fused = r.new.add(&name, Op::Linear, &[x, weight])?;
        let mut start = 0;
        for (member, width) in group.iter().zip(widths) {
            let slice = r.new.add(&graph.node(*member).name, Op::Columns { start, width }, &[fused])?;
            r.moved[member.index()] = Some(slice);
            start += width;
        }
        report.applied.push(name);
    }
    report.left.dedup_by(|a, b| a.1 == b.1);
    Ok((r.finish()?, report))
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Tabulates the rotary angles of all positions at build time; a step gathers the rows it needs.
fn rotary_tables(graph: &Graph, positions: usize) -> Result<(Graph, PassReport)> {
    let mut report = PassReport::new("rotary-tables");
    let mut r = Rewrite::new(graph);
    for (value, node) in graph.iter() {
        let Op::RotaryAngle { trig, theta, rotary_dim } = node.op else {
            r.copy(value)?;
            continue;
        };
        let ty = Type::new(DType::F32, [Dim::fixed(positions), (rotary_dim / 2).into()]);
        let expr = Const::RotaryTable { trig, theta, rotary_dim, positions };
        let table = r.new.constant(format!("{}.table", node.name), expr, ty);
        let indices = r.operand(node.operands[0])?;
        r.moved[value.index()] = Some(r.new.add(&node.name, Op::Gather, &[indices, table])?);
        report.applied.push(node.name.clone());
    }
    Ok((r.finish()?, report))
}

/// Narrows the KV cache to BF16, and the operands that ops take in BF16: inputs and weights of linear layers, the
/// embedding, values written to the cache.
fn narrow_to_bf16(graph: &Graph) -> Result<(Graph, PassReport)> {
    let mut report = PassReport::new("bf16");
    let mut r = Rewrite::new(graph);
    let mut casts: HashMap<Value, Value> = HashMap::new();
    for (value, node) in graph.iter() {
        if let Op::Input(input) = node.op
            && input.is_cache()
        {
            let ty = Type { dtype: DType::BF16, shape: node.ty.shape.clone() };
            r.moved[value.index()] = Some(r.new.input(&node.name, input, ty));
            continue;
        }
        let is_narrowed: Vec<bool> = node
            .op
            .operands()
            .iter()
            .zip(&node.operands)
            .map(|(spec, operand)| match spec.narrowing {
                Narrowing::Never => false,
                Narrowing::Always => true,
                Narrowing::CheckpointTensors => matches!(const_of(graph, *operand), Some(Const::Tensor(_))),
            })
            .collect();
        if !is_narrowed.contains(&true) {
            r.copy(value)?;
            continue;
        }
        let mut operands = Vec::with_capacity(node.operands.len());
        for (operand, is_narrowed) in node.operands.iter().zip(&is_narrowed) {
            operands.push(if *is_narrowed { narrowed(&mut r, &mut casts, *operand)? } else { r.operand(*operand)? });
        }
        r.moved[value.index()] = Some(r.new.add(&node.name, node.op.clone(), &operands)?);
        let weights = node.operands.iter().zip(&is_narrowed);
        if weights.into_iter().any(|(operand, is_narrowed)| *is_narrowed && const_of(graph, *operand).is_some()) {
            report.applied.push(node.name.clone());
        }
    }
    Ok((r.finish()?, report))
}

fn narrowed(r: &mut Rewrite<'_>, casts: &mut HashMap<Value, Value>, value: Value) -> Result<Value> {
    if let Some(done) = casts.get(&value) {
        return Ok(*done);
    }
    let node = r.old.node(value);
    let name = format!("{}.bf16", node.name);
    let cast = match &node.op {
        Op::Const(expr) => {
            let ty = Type { dtype: DType::BF16, shape: node.ty.shape.clone() };
            r.new.constant(name, Const::Cast(Box::new(expr.clone()), DType::BF16), ty)
        }
        _ => {
            let x = r.operand(value)?;
            r.new.add(name, Op::Cast(DType::BF16), &[x])?
        }
    };
    casts.insert(value, cast);
    Ok(cast)
}

/// Drops every value that no result depends on.
fn remove_dead_values(graph: &Graph) -> Result<(Graph, PassReport)> {
    let mut report = PassReport::new("dead-values");
    let mut live = vec![false; graph.nodes().len()];
    let mut pending: Vec<Value> = graph.outputs().to_vec();
    while let Some(value) = pending.pop() {
        if !std::mem::replace(&mut live[value.index()], true) {
            pending.extend(&graph.node(value).operands);
        }
    }
    let mut r = Rewrite::new(graph);
    for (value, node) in graph.iter() {
        if live[value.index()] {
            r.copy(value)?;
        } else {
            report.applied.push(node.name.clone());
        }
    }
    Ok((r.finish()?, report))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::ModelConfig;
    use crate::compile::LinearKind;

    fn config() -> ModelConfig {
        ModelConfig {
            vocab_size: 50,
            hidden_size: 24,
            intermediate_size: 40,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 8,
            rotary_dim: 4,
            rope_theta: 10000.0,
            max_position_embeddings: 64,
            norm_eps: 1e-5,
            tie_word_embeddings: false,
            dtype: DType::BF16,
            bos_token_id: Some(2),
            eos_token_ids: vec![3],
        }
    }

    fn count(graph: &Graph, op: &Op) -> usize {
        graph.nodes().iter().filter(|n| std::mem::discriminant(&n.op) == std::mem::discriminant(op)).count()
    }

    #[test]
    fn passes_leave_only_what_a_step_computes() {
        let graph = crate::model::build_graph(&config()).unwrap();
        assert_eq!(count(&graph, &Op::Linear), 2 * 6 + 1);
        assert_eq!(count(&graph, &Op::AddScalar(0.0)), 5);
        let (graph, reports) = run(graph, Precision::F32, 64, None).unwrap();
        assert_eq!(count(&graph, &Op::Linear), 2 * 4 + 1, "q, k and v are one linear layer");
        assert_eq!(count(&graph, &Op::AddScalar(0.0)), 0, "1 + w is folded");
        let angle = Op::RotaryAngle { trig: crate::graph::Trig::Cos, theta: 0.0, rotary_dim: 0 };
        assert_eq!(count(&graph, &angle), 0, "angles are tabulated");
        let users = graph.users();
        for (value, node) in graph.iter() {
            assert!(!users[value.index()].is_empty() || graph.outputs().contains(&value), "{} is dead", node.name);
        }
        let fused = reports.iter().find(|r| r.pass == "fuse-linears").unwrap();
        assert_eq!(fused.applied, ["layers.0.attention.qkv", "layers.1.attention.qkv"]);
        assert_eq!(fused.left.len(), 1, "reasons are not repeated: {:?}", fused.left);
    }

    #[test]
    fn bf16_narrows_linears_and_caches_only() {
        let (graph, _) = run(crate::model::build_graph(&config()).unwrap(), Precision::Bf16, 64, None).unwrap();
        for node in graph.nodes() {
            match node.op {
                Op::Linear => {
                    assert_eq!(graph.node(node.operands[0]).ty.dtype, DType::BF16, "{}", node.name);
                    assert_eq!(graph.node(node.operands[1]).ty.dtype, DType::BF16, "{}", node.name);
                    assert_eq!(node.ty.dtype, DType::F32, "{}", node.name);
                }
                Op::CacheUpdate => assert_eq!(node.ty.dtype, DType::BF16),
                Op::LayerNorm { .. } | Op::Attention { .. } | Op::Add => assert_eq!(node.ty.dtype, DType::F32),
                _ => {}
            }
        }
    }

    #[test]
    fn quantized_layers_are_all_but_the_head() {
        for precision in [Precision::Int8, Precision::Int4] {
            let scheme = precision.scheme().unwrap();
            let (graph, reports) = run(crate::model::build_graph(&config()).unwrap(), precision, 64, None).unwrap();
            let quantized = Op::QuantizedLinear { block: scheme.block() };
            assert_eq!(graph.nodes().iter().filter(|n| n.op == quantized).count(), 2 * 4);
            let head: Vec<&Node> = graph.nodes().iter().filter(|n| n.op == Op::Linear).collect();
            assert_eq!(head.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(), ["logits"]);
            for node in graph.nodes().iter().filter(|n| n.op == quantized) {
                let dtypes = node.operands.iter().map(|v| graph.node(*v).ty.dtype).collect::<Vec<_>>();
                assert_eq!(dtypes, [DType::BF16, scheme.dtype(), DType::F32], "{}", node.name);
            }
            let unused = graph.nodes().iter().filter(|n| n.name.ends_with("proj.weight.bf16")).count();
            assert_eq!(unused, 0, "no weight is kept twice");
            let report = reports.iter().find(|r| r.pass == "quantize-weights").unwrap();
            assert_eq!((report.applied.len(), report.left.len()), (8, 1), "{report}");
        }
    }

    #[test]
    fn fp8_needs_a_scale_for_each_layer() {
        let graph = || crate::model::build_graph(&config()).unwrap();
        let error = run(graph(), Precision::Fp8, 64, None).unwrap_err().to_string();
        assert!(error.contains("layers.0.attention.qkv") && error.contains("calibration"), "{error}");
    }

    #[test]
    fn layers_without_a_scale_stay_in_bf16() {
        let kept = Calibration::uniform(0.5).without(&[LinearKind::QkvProj, LinearKind::DownProj]);
        let graph = crate::model::build_graph(&config()).unwrap();
        let (graph, reports) = run(graph, Precision::Fp8, 64, Some(&kept)).unwrap();
        assert_eq!(count(&graph, &Op::QuantizedLinear { block: None }), 2 * 2);
        assert_eq!(count(&graph, &Op::FakeQuantize { code: DType::F8, scale: 0.5 }), 2 * 2);
        for node in graph.nodes().iter().filter(|node| node.op == Op::Linear) {
            assert_eq!(graph.node(node.operands[1]).ty.dtype, DType::BF16, "{}", node.name);
        }
        let left: Vec<&str> = reports.iter().flat_map(|r| &r.left).map(|(at, _)| at.as_str()).collect();
        assert!(left.contains(&"layers.1.attention.qkv") && left.contains(&"layers.0.mlp.down"), "{left:?}");
    }
}
