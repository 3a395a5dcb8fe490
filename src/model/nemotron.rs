//! Nemotron (NVIDIA's GPT: LayerNorm1P, squared ReLU, partial rotary positions, no biases in the linear layers).
//!
//! LayerNorm1P stores `w` and scales by `1 + w`. The addition is done in FP32, as in transformers in FP32 (the
//! reference for every precision here); in BF16, transformers rounds the sum to BF16.

use crate::checkpoint::{ModelConfig, TensorRole};
use crate::error::{Error, Result};
use crate::graph::{Const, Dim, Graph, Input, Op, Sym, Trig, Type, Value};
use crate::tensor::DType::{F32, I32};

/// The graph of one step: token ids in, logits of the requested rows out, every layer's caches updated. All arithmetic
/// is FP32; the precision pass narrows it.
///
/// # Errors
/// [`crate::Error::Graph`] if the config's sizes are inconsistent.
pub fn build_graph(config: &ModelConfig) -> Result<Graph> {
    Builder { graph: Graph::new(), config }.build()
}

struct Builder<'c> {
    graph: Graph,
    config: &'c ModelConfig,
}

/// Inputs of every layer besides the residual stream.
#[derive(Clone, Copy)]
struct StepInputs {
    cos: Value,         // f32[B·T, rotary_dim / 2]
    sin: Value,         // f32[B·T, rotary_dim / 2]
    past_tokens: Value, // i32[B]
}

impl Builder<'_> {
    fn build(mut self) -> Result<Graph> {
        let c = self.config;
        let tokens = Dim::tokens();
        let token_ids = self.graph.input("token_ids", Input::TokenIds, Type::new(I32, [tokens]));
        let positions = self.graph.input("positions", Input::Positions, Type::new(I32, [tokens]));
        let past_tokens = self.graph.input("past_tokens", Input::PastTokens, Type::new(I32, [Dim::sym(Sym::B)]));
        let logits_rows = self.graph.input("logits_rows", Input::LogitsRows, Type::new(I32, [Dim::sym(Sym::R)]));

        let angle = |trig| Op::RotaryAngle { trig, theta: c.rope_theta, rotary_dim: c.rotary_dim };
        let cos = self.graph.add("rotary.cos", angle(Trig::Cos), &[positions])?;
        let sin = self.graph.add("rotary.sin", angle(Trig::Sin), &[positions])?;
        let step = StepInputs { cos, sin, past_tokens };

        let embedding = self.weight(TensorRole::Embedding, 0)?;
        let name = TensorRole::Embedding.module(0);
        let mut h = self.graph.add(name, Op::Gather, &[token_ids, embedding])?; // f32[B·T, hidden]
        for layer in 0..c.num_layers {
            h = self.attention_block(layer, h, step)?;
            h = self.mlp_block(layer, h)?;
        }

        let last = self.graph.add("wanted", Op::Gather, &[logits_rows, h])?; // f32[R, hidden]
        let last = self.layer_norm([TensorRole::FinalNormWeight, TensorRole::FinalNormBias], 0, last)?;
        let head = if c.tie_word_embeddings { embedding } else { self.weight(TensorRole::Head, 0)? };
        let logits = self.graph.add(TensorRole::Head.module(0), Op::Linear, &[last, head])?; // f32[R, vocab]
        self.graph.output(logits);
        Ok(self.graph)
    }

    /// `h + o_proj(attention(ln1(h)))`
    fn attention_block(&mut self, layer: usize, h: Value, step: StepInputs) -> Result<Value> {
        let c = self.config;
        let name = |part: &str| format!("layers.{layer}.attention.{part}");

        let x = self.layer_norm([TensorRole::InputNormWeight, TensorRole::InputNormBias], layer, h)?;
        let q = self.linear(TensorRole::Query, layer, x)?;
        let k = self.linear(TensorRole::Key, layer, x)?;
        let v = self.linear(TensorRole::Value, layer, x)?;

        let rotary = Op::Rotary { head_dim: c.head_dim };
        let q = self.graph.add(name("q_rotary"), rotary.clone(), &[q, step.cos, step.sin])?;
        let k = self.graph.add(name("k_rotary"), rotary, &[k, step.cos, step.sin])?;

        let cache = Type::new(F32, [Dim::sym(Sym::B), c.num_kv_heads.into(), Dim::sym(Sym::S), c.head_dim.into()]);
        let keys = self.graph.input(name("key_cache"), Input::KeyCache(layer), cache.clone());
        let values = self.graph.input(name("value_cache"), Input::ValueCache(layer), cache);
        let keys = self.graph.add(name("keys"), Op::CacheUpdate, &[keys, k, step.past_tokens])?;
        let values = self.graph.add(name("values"), Op::CacheUpdate, &[values, v, step.past_tokens])?;
        self.graph.output(keys);
        self.graph.output(values);

        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let mixed = self.graph.add(name("mixed"), Op::Attention { scale }, &[q, keys, values, step.past_tokens])?;
        let out = self.linear(TensorRole::AttentionOutput, layer, mixed)?;
        self.graph.add(format!("layers.{layer}.attention"), Op::Add, &[h, out])
    }

    /// `h + down_proj(relu(up_proj(ln2(h)))²)`
    fn mlp_block(&mut self, layer: usize, h: Value) -> Result<Value> {
        let x = self.layer_norm([TensorRole::PostNormWeight, TensorRole::PostNormBias], layer, h)?;
        let up = self.linear(TensorRole::Up, layer, x)?;
        let active = self.graph.add(format!("layers.{layer}.mlp.relu2"), Op::Relu2, &[up])?;
        let down = self.linear(TensorRole::Down, layer, active)?;
        self.graph.add(format!("layers.{layer}.mlp"), Op::Add, &[h, down])
    }

    /// LayerNorm1P: gamma is the stored weight plus one.
    fn layer_norm(&mut self, [weight, bias]: [TensorRole; 2], layer: usize, x: Value) -> Result<Value> {
        let name = weight.module(layer);
        let weight = self.weight(weight, layer)?;
        let gamma = self.graph.add(format!("{name}.gamma"), Op::AddScalar(1.0), &[weight])?;
        let beta = self.weight(bias, layer)?;
        self.graph.add(name, Op::LayerNorm { eps: self.config.norm_eps }, &[x, gamma, beta])
    }

    fn linear(&mut self, role: TensorRole, layer: usize, x: Value) -> Result<Value> {
        let weight = self.weight(role, layer)?;
        self.graph.add(role.module(layer), Op::Linear, &[x, weight])
    }

    fn weight(&mut self, role: TensorRole, layer: usize) -> Result<Value> {
        let name = role.name(layer);
        let Some(shape) = role.shape(self.config) else {
            return Err(Error::Graph { op: "const".into(), name, detail: "its sizes overflow".into() });
        };
        let ty = Type::new(F32, shape.into_iter().map(Dim::fixed));
        Ok(self.graph.constant(name.clone(), Const::Tensor(name), ty))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::Checkpoint;

    /// The readers use the same list, so a tensor that is read but never used fails here.
    #[test]
    fn the_graph_reads_every_tensor_of_the_checkpoint_in_its_shape() {
        for folder in ["tests/data/tiny-chat", "tests/data/shapes/gqa", "tests/data/shapes/theta"] {
            let checkpoint = Checkpoint::open(Path::new(folder)).unwrap();
            let graph = build_graph(checkpoint.config()).unwrap();
            let mut read: Vec<(&str, Vec<usize>)> = Vec::new();
            for node in graph.nodes() {
                if let Op::Const(Const::Tensor(name)) = &node.op {
                    read.push((name, node.ty.shape.iter().map(|dim| dim.as_fixed().unwrap()).collect()));
                }
            }
            read.sort();
            let mut stored: Vec<(&str, Vec<usize>)> =
                checkpoint.tensors().map(|view| (view.name, view.shape.to_vec())).collect();
            stored.sort();
            assert_eq!(read, stored, "{folder}");
        }
    }
}
