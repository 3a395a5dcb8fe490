//! Tiny checkpoints for tests: folders with random weights, and safetensors files written by hand.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::nemo::container::{Container, MemberLocation};
use super::schema;
use super::sharded::ShardedTensor;
use super::{ModelConfig, hf_config};
use crate::tensor::DType;

/// A config.json of two layers with grouped heads and a head width that is not `hidden_size / heads`.
pub(crate) fn tiny_config() -> Value {
    json!({
        "architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_act": "relu2",
        "vocab_size": 13, "hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32,
        "norm_eps": 1e-5, "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false,
        "bos_token_id": 2, "eos_token_id": 3, "dtype": "bfloat16", "use_cache": true,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
    })
}

/// A tensor to write: name, dtype in safetensors' spelling, shape, data.
pub(crate) type Tensor = (String, &'static str, Vec<usize>, Vec<u8>);

/// Every tensor of `config`'s model with values in ±0.5, the same for the same `seed`.
pub(crate) fn random_tensors(config: &ModelConfig, dtype: DType, seed: u64) -> Vec<Tensor> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let tensors = schema::expected(config).unwrap().into_iter();
    tensors
        .map(|schema::Expected { name, shape }| {
            let count: usize = shape.iter().product();
            let (written, data) = match dtype {
                DType::F32 => ("F32", (0..count).flat_map(|_| next().to_le_bytes()).collect()),
                DType::F16 => ("F16", (0..count).flat_map(|_| half::f16::from_f32(next()).to_le_bytes()).collect()),
                DType::BF16 => ("BF16", (0..count).flat_map(|_| half::bf16::from_f32(next()).to_le_bytes()).collect()),
                DType::I32 | DType::I8 | DType::I4 | DType::F8 | DType::Bool => panic!("weights are floats"),
            };
            (name, written, shape, data)
        })
        .collect()
}

/// A safetensors file of `tensors` in their order.
pub(crate) fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut data) = (String::from("{\"__metadata__\":{\"format\":\"pt\"}"), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let (start, end) = (data.len(), data.len() + bytes.len());
        write!(header, ",{}", json!(name)).unwrap();
        write!(header, ":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}").unwrap();
        data.extend_from_slice(bytes);
    }
    header.push('}');
    with_header(&header, &data)
}

/// A safetensors file of exactly this header and data.
pub(crate) fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// `config` as converted by [`hf_config`].
pub(crate) fn model_config(config: &Value) -> ModelConfig {
    hf_config::read(Path::new("config.json"), config.as_object().unwrap().clone()).unwrap().model
}

/// Writes a checkpoint of `config` with random weights of `seed`: config.json and model.safetensors.
pub(crate) fn write_checkpoint(folder: &Path, config: &Value, dtype: DType, seed: u64) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tensors = random_tensors(&model_config(config), dtype, seed);
    std::fs::write(folder.join("model.safetensors"), safetensors(&tensors)).unwrap();
}

/// Writes the weights as `shards`, tensors dealt in turn, with their index; config.json too.
pub(crate) fn write_sharded(folder: &Path, config: &Value, dtype: DType, seed: u64, shards: usize) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let (mut dealt, mut weight_map) = (vec![Vec::new(); shards], serde_json::Map::new());
    for (index, tensor) in random_tensors(&model_config(config), dtype, seed).into_iter().enumerate() {
        weight_map.insert(tensor.0.clone(), shard_name(index % shards, shards).into());
        dealt[index % shards].push(tensor);
    }
    for (index, tensors) in dealt.iter().enumerate() {
        std::fs::write(folder.join(shard_name(index, shards)), safetensors(tensors)).unwrap();
    }
    let index = json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// The name of shard `index` (from 0) of `shards`.
pub(crate) fn shard_name(index: usize, shards: usize) -> String {
    format!("model-{:05}-of-{shards:05}.safetensors", index + 1)
}

/// The elements of `tensor` as stored in its shards, row-major; every element must be in exactly one shard.
pub(super) fn stored_elements(container: &Container, tensor: &ShardedTensor) -> Vec<u8> {
    let width = tensor.dtype.bytes();
    let elements: usize = tensor.shape.iter().product();
    let mut found: Vec<Option<&[u8]>> = vec![None; elements];
    for shard in &tensor.shards {
        let axes = tensor.shape.len();
        assert_eq!([shard.origin.len(), shard.shape.len(), shard.strides.len()], [axes; 3]);
        for number in 0..shard.shape.iter().product() {
            // From the innermost axis outward.
            let (mut rest, mut at, mut stored, mut row) = (number, 0, 0, 1);
            for axis in (0..axes).rev() {
                let index = rest % shard.shape[axis];
                rest /= shard.shape[axis];
                assert!(shard.origin[axis] + index < tensor.shape[axis]);
                at += (shard.origin[axis] + index) * row;
                stored += index * shard.strides[axis];
                row *= tensor.shape[axis];
            }
            let start = shard.start + stored * width;
            let bytes = container.bytes(&MemberLocation { file: shard.file, bytes: start..start + width }).unwrap();
            assert_eq!(bytes.len(), width, "outside its file");
            assert!(found[at].replace(bytes).is_none(), "element {at} is in two shards");
        }
    }
    found.into_iter().flat_map(|element| element.expect("every element is in a shard")).copied().collect()
}
