//! SmoothQuant (Xiao et al., 2022): evens out the channels of a layer's inputs, so that one step fits them all. Channel
//! `j` is divided by a factor `f_j`, and column `j` of the weight multiplied by it, which changes no output.
//!
//! The division costs nothing at run time, since it is folded into what computes the inputs:
//! - the gamma and beta of a norm, for queries, keys and values, and the first layer of the MLP;
//! - the rows of the first layer of the MLP by `1 / sqrt(f_j)`, for its second: inputs are `max(x, 0)²`;
//! - the rows of the values by `1 / f_j`, for attention's output, which is linear in them. With grouped queries several
//!   columns share a channel of the values, and so a factor.
//!
//! The factors become part of the constants ([`Const::Scaled`]), so all backends read the same expressions.

pub mod choice;

use std::collections::HashMap;

use super::calibration::Calibration;
use super::passes::{PassReport, Rewrite, const_of};
use crate::error::Result;
use crate::graph::{Const, Factors, Graph, Op, Value};

/// A linear layer whose inputs can be divided.
pub(super) struct Site {
    /// Its weight.
    weight: Value,
    /// Name of its weight.
    pub name: String,
    source: Source,
    /// The channel of the source that each input comes from.
    pub channels: Vec<usize>,
}

/// Constants that take the division.
enum Source {
    /// Gamma and beta of a norm.
    Norm([Value; 2]),
    /// The weight of a linear layer whose outputs' squared ReLU the inputs are.
    SquaredRelu(Value),
    /// The rows from `first` on of the weight that computes attention's values.
    Values { weight: Value, first: usize },
}

impl Site {
    /// Number of channels, each with one factor.
    pub fn channel_count(&self) -> usize {
        self.channels.iter().max().map_or(0, |most| most + 1)
    }
}

/// The layers of a graph whose inputs can be divided: of those that read what only they use, computed from constants that
/// nothing else uses. Linear layers are fused already.
pub(super) fn sites(graph: &Graph) -> Vec<Site> {
    let users = graph.users();
    let is_own = |value: Value| users[value.index()].len() == 1 && !graph.outputs().contains(&value);
    let own_constant = |value: Value| (const_of(graph, value).is_some() && is_own(value)).then_some(value);
    let mut sites = Vec::new();
    for (value, node) in graph.iter() {
        // The head stays as it is.
        if node.op != Op::Linear || graph.outputs().contains(&value) {
            continue;
        }
        let (x, weight) = (node.operands[0], node.operands[1]);
        let (Some(weight), Some(width)) = (own_constant(weight), graph.node(x).ty.width()) else { continue };
        let before = graph.node(x);
        let found = match &before.op {
            _ if !is_own(x) => None,
            Op::LayerNorm { .. } => own_constant(before.operands[1])
                .zip(own_constant(before.operands[2]))
                .map(|(gamma, beta)| (Source::Norm([gamma, beta]), (0..width).collect())),
            Op::Relu2 => of_linear(graph, before.operands[0])
                .filter(|_| is_own(before.operands[0]))
                .and_then(own_constant)
                .map(|weight| (Source::SquaredRelu(weight), (0..width).collect())),
            Op::Attention { .. } => of_values(graph, &users, before.operands[2]).and_then(|(weight, first, rows)| {
                let head_dim = graph.node(before.operands[2]).ty.width()?;
                let queries = width.checked_div(rows)?.max(1);
                let channel = |input: usize| input / head_dim / queries * head_dim + input % head_dim;
                Some((Source::Values { weight: own_constant(weight)?, first }, (0..width).map(channel).collect()))
            }),
            _ => None,
        };
        if let Some((source, channels)) = found {
            sites.push(Site { weight, name: graph.node(weight).name.clone(), source, channels });
        }
    }
    sites
}

/// The weight of the linear layer that computes a value.
fn of_linear(graph: &Graph, value: Value) -> Option<Value> {
    let node = graph.node(value);
    (node.op == Op::Linear).then(|| node.operands[1])
}

/// The weight that attention's values are computed by, and its rows that do: the first, and their number.
fn of_values(graph: &Graph, users: &[Vec<Value>], values: Value) -> Option<(Value, usize, usize)> {
    let update = graph.node(values);
    let new = *update.operands.get(1).filter(|_| update.op == Op::CacheUpdate)?;
    let (linear, first) = match graph.node(new).op {
        Op::Columns { start, .. } => (*graph.node(new).operands.first()?, start),
        _ => (new, 0),
    };
    let is_own = |value: Value| users[value.index()].len() == 1;
    // The caches' outputs are the updated values, read by attention alone.
    (is_own(values) && is_own(new)).then_some(())?;
    Some((of_linear(graph, linear)?, first, graph.node(new).ty.width()?))
}

/// Folds the factors of a calibration into the constants.
pub(super) fn fold_factors(graph: &Graph, calibration: Option<&Calibration>) -> Result<(Graph, PassReport)> {
    let mut report = PassReport::new("smooth-inputs");
    let mut folded: HashMap<Value, Vec<Factors>> = HashMap::new();
    for site in sites(graph) {
        let Some(factors) = calibration.and_then(|c| c.factors(&site.name, site.channel_count())) else {
            report
                .left
                .push((site.name, "the calibration has no factors for it, or its weights have them already".into()));
            continue;
        };
        let of_inputs = site.channels.iter().filter_map(|channel| factors.get(*channel).copied()).collect();
        folded.entry(site.weight).or_default().push(Factors::OfColumns(of_inputs));
        match site.source {
            Source::Norm(constants) => {
                let divisors = Factors::OfColumns(factors.iter().map(|factor| 1.0 / factor).collect());
                for constant in constants {
                    folded.entry(constant).or_default().push(divisors.clone());
                }
            }
            Source::SquaredRelu(weight) => {
                let divisors = factors.iter().map(|factor| 1.0 / factor.sqrt()).collect();
                folded.entry(weight).or_default().push(Factors::OfRows(divisors));
            }
            Source::Values { weight, first } => {
                let rows = graph.node(weight).ty.shape.first().and_then(|rows| rows.as_fixed()).unwrap_or(0);
                let mut divisors = vec![1.0; rows];
                divisors.iter_mut().skip(first).zip(&*factors).for_each(|(divisor, factor)| *divisor = 1.0 / factor);
                folded.entry(weight).or_default().push(Factors::OfRows(divisors.into()));
            }
        }
        report.applied.push(site.name);
    }
    let mut r = Rewrite::new(graph);
    for (value, node) in graph.iter() {
        match (&node.op, folded.remove(&value)) {
            (Op::Const(expr), Some(factors)) => {
                let scaled = |inner, factors| Const::Scaled(Box::new(inner), factors);
                let expr = factors.into_iter().fold(expr.clone(), scaled);
                r.moved[value.index()] = Some(r.new.constant(&node.name, expr, node.ty.clone()));
            }
            _ => {
                r.copy(value)?;
            }
        }
    }
    Ok((r.finish()?, report))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::backend::cpu::lower::{CpuTarget, lower};
    use crate::backend::cpu::streamed::run_streamed;
    use crate::backend::{Chunk, Limits, Rows, Step};
    use crate::checkpoint::Checkpoint;
    use crate::compile::passes::fused;
    use crate::model::build_graph;

    const IDS: [u32; 5] = [3, 17, 5, 40, 9];

    /// Logits of some tokens in FP32.
    fn logits(graph: &Graph, checkpoint: &Checkpoint) -> Vec<f32> {
        let limits = Limits {
            slots: 1,
            max_sequence_tokens: IDS.len(),
            max_step_tokens: IDS.len(),
            max_logits_rows: IDS.len(),
            vocab_size: checkpoint.config().vocab_size,
        };
        let lowered = lower(graph, &limits, CpuTarget::native().unwrap()).unwrap();
        let chunk = Chunk { slot: 0, past_tokens: 0, tokens: &IDS, rows: Rows::All };
        let step = Step::prefill(&limits, &[chunk]).unwrap();
        let logits = run_streamed(&lowered, checkpoint, &step, &|_| Ok(())).unwrap();
        (0..IDS.len()).flat_map(|row| logits.row(row).unwrap().to_vec()).collect()
    }

    #[test]
    fn factors_change_constants_but_no_logits() {
        for folder in ["tests/data/tiny-chat", "tests/data/shapes/gqa", "tests/data/shapes/theta"] {
            let checkpoint = Checkpoint::open(Path::new(folder)).unwrap();
            let graph = fused(&build_graph(checkpoint.config()).unwrap()).unwrap();
            let sites = sites(&graph);
            assert_eq!(sites.len(), 4 * checkpoint.config().num_layers, "{folder}");
            let mut calibration = Calibration::default();
            for (index, site) in sites.iter().enumerate() {
                let factor = |channel: usize| 1.5f32.powi(((channel * 7 + index) % 9) as i32 - 4);
                calibration.insert_factors(&site.name, (0..site.channel_count()).map(factor).collect());
            }
            let (folded, report) = fold_factors(&graph, Some(&calibration)).unwrap();
            assert_eq!((report.applied.len(), report.left.len()), (sites.len(), 0), "{folder}");
            let scaled = folded.nodes().iter().filter(|node| matches!(node.op, Op::Const(Const::Scaled(..))));
            assert_eq!(scaled.count(), 8 * checkpoint.config().num_layers, "four matrices and two norms, {folder}");
            let (expected, found) = (logits(&graph, &checkpoint), logits(&folded, &checkpoint));
            let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
            let off = expected.iter().zip(&found).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(off < 1e-4 * largest, "{folder}: {off:e} of {largest:e}");
        }
    }

    #[test]
    fn layers_without_factors_are_left() {
        let checkpoint = Checkpoint::open(Path::new("tests/data/tiny-chat")).unwrap();
        let graph = fused(&build_graph(checkpoint.config()).unwrap()).unwrap();
        let (same, report) = fold_factors(&graph, Some(&Calibration::default())).unwrap();
        assert_eq!((report.applied.len(), report.left.len()), (0, 4 * checkpoint.config().num_layers));
        assert_eq!(same.nodes().len(), graph.nodes().len());
    }
}
