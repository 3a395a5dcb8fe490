//! `.nemo` files for tests: tar archives written here, and tiny-chat as a distributed checkpoint in one.

use std::path::Path;

use aotron::tensor_file::TensorFile;
use serde_json::json;

/// An uncompressed tar archive, of ustar's form.
#[derive(Default)]
pub struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    /// Adds a file.
    pub fn file(&mut self, name: &str, data: &[u8]) -> &mut Tar {
        self.entry(name, b'0', "", data.len() as u64, data)
    }

    /// Adds an entry of any type, with any target, that claims any size.
    pub fn entry(&mut self, name: &str, kind: u8, target: &str, size: u64, data: &[u8]) -> &mut Tar {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[156] = kind;
        header[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// The whole archive.
    pub fn finish(&self) -> Vec<u8> {
        [&self.bytes[..], &[0; 1024]].concat()
    }
}

const ARTIFACT: &str = "0123456789abcdef0123456789abcdef_tokenizer.model";

/// tiny-chat as NeMo would keep it after training on `ranks` tensor-parallel ranks: layers stacked, queries, keys and
/// values fused, every rank's part of every layer a chunk of zarr.
pub fn tiny_chat_nemo(ranks: usize) -> Vec<u8> {
    let folder = Path::new("tests/data/tiny-chat");
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let (layers, hidden, heads) = (size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads"));
    let (groups, head_dim, ffn) = (size("num_key_value_heads"), size("head_dim"), size("intermediate_size"));
    let yaml = format!(
        "num_layers: {layers}\nhidden_size: {hidden}\nffn_hidden_size: {ffn}\nnum_attention_heads: {heads}\n\
         num_query_groups: {groups}\nkv_channels: {head_dim}\nmax_position_embeddings: {}\n\
         normalization: layernorm1p\nlayernorm_epsilon: 1.0e-05\nactivation: squared-relu\nbias: false\n\
         position_embedding_type: rope\nrotary_percentage: {}\nshare_embeddings_and_output_weights: false\n\
         mcore_gpt: true\nprecision: bf16\ntokenizer:\n  library: sentencepiece\n  model: nemo:{ARTIFACT}\n",
        size("max_position_embeddings"),
        config["rope_parameters"]["partial_rotary_factor"]
    );
    let weights = TensorFile::open(&folder.join("model.safetensors")).unwrap();
    let matrix = |name: &str| weights.tensor(name).unwrap_or_else(|| panic!("{name}")).1.to_vec();
    let layer = |index: usize, name: &str| matrix(&format!("model.layers.{index}.{name}.weight"));

    let mut tar = Tar::default();
    tar.file("./model_config.yaml", yaml.as_bytes());
    tar.file(&format!("./{ARTIFACT}"), &std::fs::read(folder.join("tokenizer.model")).unwrap());
    tar.file("./model_weights/metadata.json", br#"{"sharded_backend": "zarr", "sharded_backend_version": 1}"#);
    tar.file("./model_weights/common.pt", b"not read");
    let row = 2 * hidden;
    let fused = |index: usize| {
        let parts = ["q_proj", "k_proj", "v_proj"].map(|part| layer(index, &format!("self_attn.{part}")));
        let of_group = |part: &[u8], group: usize| {
            let bytes = part.len() / groups;
            part[group * bytes..(group + 1) * bytes].to_vec()
        };
        (0..groups).flat_map(|group| parts.each_ref().map(|part| of_group(part, group)).concat()).collect::<Vec<u8>>()
    };
    let qkv_rows = (heads + 2 * groups) * head_dim;
    let mut stacked = |name: &str, shape: [usize; 2], axis: Option<usize>, of_layer: &dyn Fn(usize) -> Vec<u8>| {
        let all: Vec<Vec<u8>> = (0..layers).map(of_layer).collect();
        array(&mut tar, &format!("model.decoder.layers.{name}"), &shape, Some(&all), axis, ranks);
    };
    stacked("self_attention.linear_qkv.weight", [qkv_rows, hidden], Some(0), &fused);
    stacked("self_attention.linear_proj.weight", [hidden, heads * head_dim], Some(1), &|i| {
        layer(i, "self_attn.o_proj")
    });
    stacked("mlp.linear_fc1.weight", [ffn, hidden], Some(0), &|i| layer(i, "mlp.up_proj"));
    stacked("mlp.linear_fc2.weight", [hidden, ffn], Some(1), &|i| layer(i, "mlp.down_proj"));
    for (to, from) in [
        ("self_attention.linear_qkv.layer_norm_", "input_layernorm"),
        ("mlp.linear_fc1.layer_norm_", "post_attention_layernorm"),
    ] {
        for part in ["weight", "bias"] {
            let vector = |i: usize| matrix(&format!("model.layers.{i}.{from}.{part}"));
            stacked(&format!("{to}{part}"), [1, hidden], None, &vector);
        }
    }
    for part in ["weight", "bias"] {
        let vector = vec![matrix(&format!("model.norm.{part}"))];
        array(&mut tar, &format!("model.decoder.final_layernorm.{part}"), &[1, hidden], Some(&vector), None, ranks);
    }
    for (to, from) in [
        ("model.embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("model.output_layer.weight", "lm_head.weight"),
    ] {
        let data = matrix(from);
        let shape = [data.len() / row, hidden];
        array(&mut tar, to, &shape, Some(&[data]), Some(0), ranks);
    }
    tar.finish()
}

/// Adds the array of layers, `[layers, rows, columns]`, or without a layer's axis where there is one layer of a tensor that
/// has none. A matrix of one row is a vector.
fn array(tar: &mut Tar, name: &str, shape: &[usize; 2], layers: Option<&[Vec<u8>]>, axis: Option<usize>, ranks: usize) {
    let layers = layers.unwrap_or_default();
    let [rows, columns] = *shape;
    let is_stacked = name.contains(".layers.");
    let mut chunk = [rows, columns];
    if let Some(axis) = axis {
        assert!(chunk[axis].is_multiple_of(ranks), "{name}");
        chunk[axis] /= ranks;
    }
    let dims = |sizes: [usize; 2]| if rows == 1 { sizes[1..].to_vec() } else { sizes.to_vec() };
    let stack = |count: usize, sizes: [usize; 2]| {
        if is_stacked { [vec![count], dims(sizes)].concat() } else { dims(sizes) }
    };
    let zarray = json!({
        "chunks": stack(1, chunk), "compressor": null, "dtype": "bfloat16", "fill_value": null, "filters": null,
        "order": "C", "shape": stack(layers.len(), *shape), "zarr_format": 2
    });
    tar.file(&format!("./model_weights/{name}/.zarray"), zarray.to_string().as_bytes());
    for (layer, data) in layers.iter().enumerate() {
        for (i, j) in (0..rows / chunk[0]).flat_map(|i| (0..columns / chunk[1]).map(move |j| (i, j))) {
            let of_row = |row: usize| {
                let start = 2 * (row * columns + j * chunk[1]);
                data[start..start + 2 * chunk[1]].to_vec()
            };
            let part: Vec<u8> = (i * chunk[0]..(i + 1) * chunk[0]).flat_map(of_row).collect();
            let index: Vec<String> = stack(layer, [i, j]).iter().map(usize::to_string).collect();
            tar.file(&format!("./model_weights/{name}/{}", index.join(".")), &part);
        }
    }
}
