//! Evaluates a graph in FP64, op by op, for a single sequence, rounding only where a value's type says so. Quantized
//! weights are the codes and scales chosen by `aotron::quantize`, so a difference from a backend's logits is due to
//! that backend's rounding and packing, not to quantization error.

use std::collections::HashMap;
use std::path::Path;

use aotron::graph::{Const, Factors, Graph, Input, Op, Trig};
use aotron::quantize::{Scheme, round_f8, round_i8};
use aotron::tensor::DType;
use half::bf16;

/// A row-major matrix; a vector is one row of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Matrix {
    pub width: usize,
    pub values: Vec<f64>,
}

impl Matrix {
    fn new(width: usize, values: Vec<f64>) -> Matrix {
        assert!(width > 0 && values.len().is_multiple_of(width), "{} values in rows of {width}", values.len());
        Matrix { width, values }
    }

    fn row(&self, index: usize) -> &[f64] {
        &self.values[index * self.width..][..self.width]
    }

    fn rows(&self) -> usize {
        self.values.len() / self.width
    }

    /// Applies `f` to each row.
    fn map_rows(&self, f: impl Fn(&[f64]) -> Vec<f64>) -> Matrix {
        let rows: Vec<Vec<f64>> = self.values.chunks(self.width).map(f).collect();
        Matrix::new(rows[0].len(), rows.concat())
    }
}

fn round(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(value as f32),
        // As in a backend that computes in FP32 and narrows the result.
        DType::BF16 => f64::from(bf16::from_f32(value as f32).to_f32()),
        DType::I32 | DType::I8 | DType::I4 => value,
        DType::F8 | DType::F16 | DType::Bool => panic!("no value of the CPU's graphs is {dtype}"),
    }
}

/// A checkpoint's tensors by name.
pub struct Tensors(HashMap<String, Matrix>);

impl Tensors {
    /// Reads all files of a folder.
    pub fn read(folder: &Path) -> Tensors {
        let mut tensors = HashMap::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if !path.file_name().unwrap().to_str().unwrap().starts_with("model") || path.extension().unwrap() == "json"
            {
                continue;
            }
            let bytes = std::fs::read(path).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for (name, tensor) in file.tensors() {
                let dtype = match tensor.dtype() {
                    safetensors::Dtype::F32 => DType::F32,
                    safetensors::Dtype::F16 => DType::F16,
                    safetensors::Dtype::BF16 => DType::BF16,
                    other => panic!("{name} is {other:?}"),
                };
                let mut values = vec![0f32; tensor.shape().iter().product()];
                dtype.decode(tensor.data(), &mut values);
                let values = values.into_iter().map(f64::from).collect();
                tensors.insert(name, Matrix::new(*tensor.shape().last().unwrap(), values));
            }
        }
        Tensors(tensors)
    }

    fn constant(&self, expr: &Const) -> Matrix {
        match expr {
            Const::Tensor(name) => self.0[name].clone(),
            Const::AddScalar(inner, scalar) => {
                let inner = self.constant(inner);
                let values = inner.values.iter().map(|v| round(DType::F32, v + f64::from(*scalar))).collect();
                Matrix::new(inner.width, values)
            }
            Const::Scaled(inner, factors) => {
                let inner = self.constant(inner);
                let factor = |index: usize| match factors {
                    Factors::OfColumns(factors) => factors[index % inner.width],
                    Factors::OfRows(factors) => factors[index / inner.width],
                };
                let scaled = |(index, v): (usize, &f64)| round(DType::F32, v * f64::from(factor(index)));
                Matrix::new(inner.width, inner.values.iter().enumerate().map(scaled).collect())
            }
            Const::ConcatRows(parts) => {
                let parts: Vec<Matrix> = parts.iter().map(|part| self.constant(part)).collect();
                Matrix::new(parts[0].width, parts.into_iter().flat_map(|part| part.values).collect())
            }
            Const::RotaryTable { trig, theta, rotary_dim, positions } => {
                let row = |position: usize| angles(*trig, *theta, *rotary_dim, position);
                Matrix::new(rotary_dim / 2, (0..*positions).flat_map(row).collect())
            }
            Const::Cast(inner, dtype) => {
                let inner = self.constant(inner);
                Matrix::new(inner.width, inner.values.iter().map(|v| round(*dtype, *v)).collect())
            }
            Const::Codes(matrix, scheme) => self.quantized(matrix, *scheme).0,
            Const::Scales { matrix, scheme, .. } => self.quantized(matrix, *scheme).1,
        }
    }

    fn quantized(&self, matrix: &Const, scheme: Scheme) -> (Matrix, Matrix) {
        let matrix = self.constant(matrix);
        let mut codes: Vec<f32> = matrix.values.iter().map(|v| *v as f32).collect();
        let mut scales = vec![0f32; matrix.rows() * scheme.blocks(matrix.width)];
        scheme.quantize(matrix.width, &mut codes, &mut scales);
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
        (Matrix::new(matrix.width, wide(codes)), Matrix::new(scheme.blocks(matrix.width), wide(scales)))
    }
}

/// Frequencies and angles are rounded to FP32, as in transformers.
fn angles(trig: Trig, theta: f64, rotary_dim: usize, position: usize) -> Vec<f64> {
    (0..rotary_dim / 2)
        .map(|i| {
            let frequency = theta.powf(-2.0 * i as f64 / rotary_dim as f64) as f32;
            let angle = f64::from(position as f32 * frequency);
            round(DType::F32, if trig == Trig::Cos { angle.cos() } else { angle.sin() })
        })
        .collect()
}

/// The graph's constants, indexed by value; `Default` for values that are not constants.
pub fn constants(graph: &Graph, tensors: &Tensors) -> Vec<Matrix> {
    let constant = |op: &Op| match op {
        Op::Const(expr) => tensors.constant(expr),
        _ => Matrix::default(),
    };
    graph.nodes().iter().map(|node| constant(&node.op)).collect()
}

/// The logits of every token of `ids`, `[tokens, vocabulary]`.
pub fn logits(graph: &Graph, constants: &[Matrix], ids: &[u32]) -> Vec<f64> {
    let column = |values: &mut dyn Iterator<Item = usize>| Matrix::new(1, values.map(|v| v as f64).collect());
    let mut values: Vec<Matrix> = Vec::new();
    for (value, node) in graph.iter() {
        let x = |operand: usize| &values[node.operands[operand].index()];
        let mut result = match &node.op {
            Op::Input(Input::TokenIds) => column(&mut ids.iter().map(|id| *id as usize)),
            Op::Input(Input::Positions | Input::LogitsRows) => column(&mut (0..ids.len())),
            Op::Input(Input::PastTokens) => column(&mut [0].into_iter()),
            // Empty: the sequence starts with this step.
            Op::Input(Input::KeyCache(_) | Input::ValueCache(_)) => Matrix::default(),
            Op::Const(_) => constants[value.index()].clone(),
            Op::AddScalar(scalar) => x(0).map_rows(|row| row.iter().map(|v| v + f64::from(*scalar)).collect()),
            Op::Cast(_) => x(0).clone(), // rounded below, as every value is
            Op::CacheUpdate => x(1).clone(),
            Op::Gather => {
                let rows = x(0).values.iter().flat_map(|index| x(1).row(*index as usize).to_vec());
                Matrix::new(x(1).width, rows.collect())
            }
            Op::LayerNorm { eps } => layer_norm(x(0), x(1), x(2), *eps),
            Op::Linear => linear(x(0), x(1)),
            Op::QuantizedLinear { block } => linear(x(0), &dequantized(x(1), x(2), *block)),
            Op::FakeQuantize { code, scale } => {
                let nearest = |v: f32| if *code == DType::F8 { round_f8(v) } else { round_i8(v) };
                x(0).map_rows(|row| {
                    row.iter().map(|v| f64::from(nearest(*v as f32 / scale)) * f64::from(*scale)).collect()
                })
            }
            Op::Columns { start, width } => x(0).map_rows(|row| row[*start..start + width].to_vec()),
            Op::RotaryAngle { trig, theta, rotary_dim } => {
                let row = |position: &f64| angles(*trig, *theta, *rotary_dim, *position as usize);
                Matrix::new(rotary_dim / 2, x(0).values.iter().flat_map(row).collect())
            }
            Op::Rotary { head_dim } => rotary(x(0), x(1), x(2), *head_dim),
            Op::Attention { scale } => {
                let head_dim = graph.node(node.operands[1]).ty.width().unwrap();
                attention(x(0), x(1), x(2), head_dim, f64::from(*scale))
            }
            Op::Relu2 => x(0).map_rows(|row| row.iter().map(|v| v.max(0.0).powi(2)).collect()),
            Op::Add => Matrix::new(x(0).width, x(0).values.iter().zip(&x(1).values).map(|(a, b)| a + b).collect()),
        };
        if !matches!(node.op, Op::Input(_) | Op::Const(_)) {
            result.values.iter_mut().for_each(|v| *v = round(node.ty.dtype, *v));
        }
        values.push(result);
    }
    let is_cache = |op: &Op| matches!(op, Op::CacheUpdate);
    let output = graph.outputs().iter().find(|value| !is_cache(&graph.node(**value).op)).unwrap();
    std::mem::take(&mut values[output.index()].values)
}

fn layer_norm(x: &Matrix, gamma: &Matrix, beta: &Matrix, eps: f64) -> Matrix {
    x.map_rows(|row| {
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / row.len() as f64;
        let normal = row.iter().map(|v| (v - mean) / (variance + eps).sqrt());
        normal.zip(&gamma.values).zip(&beta.values).map(|((v, gamma), beta)| v * gamma + beta).collect()
    })
}

fn linear(x: &Matrix, weight: &Matrix) -> Matrix {
    x.map_rows(|row| weight.values.chunks(weight.width).map(|w| w.iter().zip(row).map(|(w, x)| w * x).sum()).collect())
}

fn dequantized(codes: &Matrix, scales: &Matrix, block: Option<usize>) -> Matrix {
    let block = block.unwrap_or(codes.width);
    let weight = |(index, code): (usize, &f64)| code * scales.row(index / codes.width)[index % codes.width / block];
    Matrix::new(codes.width, codes.values.iter().enumerate().map(weight).collect())
}

fn rotary(x: &Matrix, cos: &Matrix, sin: &Matrix, head_dim: usize) -> Matrix {
    let half = cos.width;
    let mut result = x.clone();
    for (token, row) in result.values.chunks_mut(x.width).enumerate() {
        for head in row.chunks_mut(head_dim) {
            for (j, (cos, sin)) in cos.row(token).iter().zip(sin.row(token)).enumerate() {
                let (a, b) = (head[j], head[j + half]);
                (head[j], head[j + half]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
    result
}

fn attention(q: &Matrix, keys: &Matrix, values: &Matrix, head_dim: usize, scale: f64) -> Matrix {
    let queries_per_kv = q.width / keys.width;
    let mut mixed = Vec::with_capacity(q.values.len());
    for token in 0..q.rows() {
        for (head, q) in q.row(token).chunks(head_dim).enumerate() {
            let of =
                |matrix: &Matrix, at: usize| matrix.row(at)[head / queries_per_kv * head_dim..][..head_dim].to_vec();
            let dot = |key: Vec<f64>| q.iter().zip(&key).map(|(q, k)| q * k).sum::<f64>() * scale;
            let scores: Vec<f64> = (0..=token).map(|at| dot(of(keys, at))).collect();
            let largest = scores.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut out = vec![0.0; head_dim];
            for (at, weight) in weights.iter().enumerate() {
                out.iter_mut().zip(of(values, at)).for_each(|(out, v)| *out += weight / sum * v);
            }
            mixed.extend(out);
        }
    }
    Matrix::new(q.width, mixed)
}
