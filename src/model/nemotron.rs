//! Nemotron (NVIDIA's GPT: LayerNorm1P, squared ReLU, partial rotary positions, no biases in the linear layers).
//!
//! LayerNorm1P stores `w` and scales by `1 + w`. The addition is made in FP32, which is what transformers computes
//! when it runs a model in FP32 (the reference for every precision here); it rounds the sum to BF16 when it runs
//! in BF16.

use crate::checkpoint::{EMBEDDING, ModelConfig};
use crate::error::Result;
use crate::graph::{Const, Dim, Graph, Input, Op, Sym, Trig, Type, Value};
use crate::tensor::DType::{F32, I32};

/// The graph of one step: token ids in, logits of the wanted rows out, every layer's caches updated.
/// All arithmetic is FP32; the precision pass narrows it.
///
/// # Errors
/// [`crate::Error::Graph`] if the config's sizes do not fit together.
pub fn build_graph(config: &ModelConfig) -> Result<Graph> {
    Builder { graph: Graph::new(), config }.build()
}

struct Builder<'c> {
    graph: Graph,
    config: &'c ModelConfig,
}

/// What every layer reads beside the residual stream.
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

        let embedding = self.weight(EMBEDDING, &[c.vocab_size, c.hidden_size]);
        let mut h = self.graph.add("embedding", Op::Gather, &[token_ids, embedding])?; // f32[B·T, hidden]
        for layer in 0..c.num_layers {
            h = self.attention_block(layer, h, step)?;
            h = self.mlp_block(layer, h)?;
        }

        let last = self.graph.add("wanted", Op::Gather, &[logits_rows, h])?; // f32[R, hidden]
        let last = self.layer_norm("norm", "model.norm", last)?;
        let head = if c.tie_word_embeddings {
            embedding
        } else {
            self.weight("lm_head.weight", &[c.vocab_size, c.hidden_size])
        };
        let logits = self.graph.add("logits", Op::Linear, &[last, head])?; // f32[R, vocab]
        self.graph.output(logits);
        Ok(self.graph)
    }

    /// `h + o_proj(attention(ln1(h)))`
    fn attention_block(&mut self, layer: usize, h: Value, step: StepInputs) -> Result<Value> {
        let c = self.config;
        let name = |part: &str| format!("layers.{layer}.attention.{part}");
        let hf = |part: &str| format!("model.layers.{layer}.self_attn.{part}_proj");
        let [q_width, kv_width] = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim];

        let x = self.layer_norm(&name("norm"), &format!("model.layers.{layer}.input_layernorm"), h)?;
        let q = self.linear(&name("q"), &hf("q"), x, [q_width, c.hidden_size])?;
        let k = self.linear(&name("k"), &hf("k"), x, [kv_width, c.hidden_size])?;
        let v = self.linear(&name("v"), &hf("v"), x, [kv_width, c.hidden_size])?;

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
        let out = self.linear(&name("o"), &hf("o"), mixed, [c.hidden_size, q_width])?;
        self.graph.add(format!("layers.{layer}.attention"), Op::Add, &[h, out])
    }

    /// `h + down_proj(relu(up_proj(ln2(h)))²)`
    fn mlp_block(&mut self, layer: usize, h: Value) -> Result<Value> {
        let c = self.config;
        let name = |part: &str| format!("layers.{layer}.mlp.{part}");
        let hf = |part: &str| format!("model.layers.{layer}.mlp.{part}_proj");

        let x = self.layer_norm(&name("norm"), &format!("model.layers.{layer}.post_attention_layernorm"), h)?;
        let up = self.linear(&name("up"), &hf("up"), x, [c.intermediate_size, c.hidden_size])?;
        let active = self.graph.add(name("relu2"), Op::Relu2, &[up])?;
        let down = self.linear(&name("down"), &hf("down"), active, [c.hidden_size, c.intermediate_size])?;
        self.graph.add(format!("layers.{layer}.mlp"), Op::Add, &[h, down])
    }

    /// LayerNorm1P: gamma is the stored weight plus one.
    fn layer_norm(&mut self, name: &str, hf: &str, x: Value) -> Result<Value> {
        let width = [self.config.hidden_size];
        let weight = self.weight(&format!("{hf}.weight"), &width);
        let gamma = self.graph.add(format!("{name}.gamma"), Op::AddScalar(1.0), &[weight])?;
        let beta = self.weight(&format!("{hf}.bias"), &width);
        self.graph.add(name, Op::LayerNorm { eps: self.config.norm_eps }, &[x, gamma, beta])
    }

    fn linear(&mut self, name: &str, hf: &str, x: Value, shape: [usize; 2]) -> Result<Value> {
        let weight = self.weight(&format!("{hf}.weight"), &shape);
        self.graph.add(name, Op::Linear, &[x, weight])
    }

    fn weight(&mut self, hf: &str, shape: &[usize]) -> Value {
        let ty = Type::new(F32, shape.iter().map(|n| Dim::fixed(*n)));
        self.graph.constant(hf, Const::Tensor(hf.into()), ty)
    }
}
