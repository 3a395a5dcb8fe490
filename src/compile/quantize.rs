//! Passes that store the weights of linear layers as codes and scales, and fake-quantize their inputs. They run on a
//! graph already narrowed to BF16, so activations, embedding, head and cache are BF16. All backends read the same
//! expressions: the constants [`Const::Codes`] and [`Const::Scales`], and the op [`Op::QuantizedLinear`].

use std::collections::HashMap;

use super::calibration::Calibration;
use super::passes::{PassReport, Rewrite, const_of};
use crate::error::{Error, Result};
use crate::graph::{Const, Dim, Graph, Op, Type};
use crate::quantize::Scheme;
use crate::tensor::DType;

/// Quantizes the weights of all linear layers but the head, and but those that `calibration`, if their inputs need one,
/// has no scale for.
pub(super) fn quantize_weights(
    graph: &Graph,
    scheme: Scheme,
    calibration: Option<&Calibration>,
) -> Result<(Graph, PassReport)> {
    let mut report = PassReport::new("quantize-weights");
    let mut r = Rewrite::new(graph);
    for (value, node) in graph.iter() {
        if node.op != Op::Linear {
            r.copy(value)?;
            continue;
        }
        let weight = graph.node(node.operands[1]);
        let reason = match (const_of(graph, node.operands[1]), weight.ty.shape.as_slice()) {
            _ if graph.outputs().contains(&value) => "the head stays as it is: its errors are the logits' errors",
            _ if calibration.is_some_and(|c| c.scale(&weight.name).is_none()) => "it stays in BF16 by the recipe",
            (Some(expr), [rows, columns]) => match (rows.as_fixed(), columns.as_fixed()) {
                (Some(rows), Some(columns)) => {
                    // Quantize the checkpoint's values, not their BF16-rounded copies.
                    let matrix = match expr {
                        Const::Cast(inner, DType::BF16) => inner.clone(),
                        expr => Box::new(expr.clone()),
                    };
                    let name = weight.name.strip_suffix(".bf16").unwrap_or(&weight.name);
                    let ty = Type::new(scheme.dtype(), [Dim::fixed(rows), Dim::fixed(columns)]);
                    let codes = Const::Codes(matrix.clone(), scheme);
                    let codes = r.new.constant(format!("{name}.{}", scheme.dtype()), codes, ty);
                    let ty = Type::new(DType::F32, [Dim::fixed(rows), scheme.blocks(columns).into()]);
                    let scales = Const::Scales { matrix, scheme, columns };
                    let scales = r.new.constant(format!("{name}.scales"), scales, ty);
                    let x = r.operand(node.operands[0])?;
                    let op = Op::QuantizedLinear { block: scheme.block() };
                    r.moved[value.index()] = Some(r.new.add(&node.name, op, &[x, codes, scales])?);
                    report.applied.push(node.name.clone());
                    continue;
                }
                _ => "the weight's shape is not known",
            },
            _ => "its weight is not a constant",
        };
        report.left.push((node.name.clone(), reason.into()));
        r.copy(value)?;
    }
    Ok((r.finish()?, report))
}

/// Fake-quantizes the inputs of quantized linear layers to codes of type `code`, with the scales of a calibration.
pub(super) fn fake_quantize_inputs(
    graph: &Graph,
    code: DType,
    calibration: Option<&Calibration>,
) -> Result<(Graph, PassReport)> {
    let mut report = PassReport::new("fake-quantize-inputs");
    let mut r = Rewrite::new(graph);
    let mut rounded = HashMap::new();
    for (value, node) in graph.iter() {
        let Op::QuantizedLinear { .. } = node.op else {
            r.copy(value)?;
            continue;
        };
        let codes = graph.node(node.operands[1]);
        let scale = calibration.and_then(|c| c.scale(&codes.name)).ok_or_else(|| Error::Graph {
            op: node.op.kind().into(),
            name: node.name.clone(),
            detail: "its inputs have no scale: there was no calibration".into(),
        })?;
        let x = node.operands[0];
        let x = match rounded.get(&(x, scale.to_bits())) {
            Some(done) => *done,
            None => {
                let name = format!("{}.input.{code}", node.name);
                let operand = r.operand(x)?;
                let done = r.new.add(name, Op::FakeQuantize { code, scale }, &[operand])?;
                rounded.insert((x, scale.to_bits()), done);
                done
            }
        };
        let operands = [x, r.operand(node.operands[1])?, r.operand(node.operands[2])?];
        r.moved[value.index()] = Some(r.new.add(&node.name, node.op.clone(), &operands)?);
        report.applied.push(node.name.clone());
    }
    Ok((r.finish()?, report))
}
